"""Runs as jobs: against a job server that keeps Ray's rules, and what is said where there is none."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests
import yaml
from ray.job_submission import JobDetails

import tools
from fakes import settings_for
from keel import checkpoint, files
from keel.cli import main
from keel.cluster import control, job_server, jobs
from keel.config import loader
from keel.errors import ConfigError
from keel.online import status as run_status
from runs import Writer

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

ADDRESS = "http://head:8265"
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE")


class Server:
    """What Ray's client promises of a cluster; a command that is asked is run here, as its shell would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.clock = 1_000

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], **options: Any) -> str:
        if submission_id in self.jobs:
            raise RuntimeError(
                "Request failed with status code 400: Traceback (most recent call last):\n"
                f"ValueError: Job with submission_id {submission_id} already exists. Please use a different one.\n."
            )
        uploaded = Path(runtime_env["working_dir"])
        if uploaded.suffix == ".zip" and uploaded.is_file():  # else what an earlier upload is called
            working = self.folder / submission_id
            with zipfile.ZipFile(uploaded) as archive:
                archive.extractall(working)
            uploaded = working
        assert uploaded.is_dir(), uploaded
        self.clock += 1_000
        self.jobs[submission_id] = {
            "type": "SUBMISSION",
            "submission_id": submission_id,
            "status": "PENDING",
            "entrypoint": entrypoint,
            "start_time": self.clock,
            "metadata": options.pop("metadata", {}),
            "runtime_env": {"working_dir": str(uploaded)},
            "options": options,
            "logs": f"Running entrypoint for job {submission_id}: {entrypoint}\n",
        }
        if submission_id.startswith("keel-ask-"):
            self._run(submission_id)
        return submission_id

    def _run(self, job: str) -> None:
        subject = self.jobs[job]
        self.asked.append(subject["entrypoint"])
        shell = subject["entrypoint"].replace("python -m", f"{sys.executable} -m")
        folder, bare = subject["runtime_env"]["working_dir"], {"PATH": os.environ["PATH"]}  # Keel is what came along
        done = subprocess.run(shell, shell=True, cwd=folder, env=bare, capture_output=True, text=True)
        subject["logs"] += done.stdout + done.stderr
        self.end(job, "FAILED" if done.returncode else "SUCCEEDED", done.returncode)

    def end(self, job: str, status: str, code: int | None = None) -> None:
        self.jobs[job] |= {"status": status, "driver_exit_code": code, "end_time": self.clock, "message": "the reason"}

    def get_job_info(self, job: str) -> JobDetails:
        if job not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return JobDetails(**self.jobs[job])

    def list_jobs(self) -> list[JobDetails]:
        driver = JobDetails(type="DRIVER", job_id="01000000", status="RUNNING", entrypoint="python other.py")
        return [driver, *(JobDetails(**job) for job in reversed(self.jobs.values()))]

    def get_job_logs(self, job: str) -> str:
        return self.jobs[job]["logs"]

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for line in self.jobs[job]["logs"].splitlines(keepends=True):
            await asyncio.sleep(0)
            yield line
        self.end(job, "SUCCEEDED", 0)

    def stop_job(self, job: str) -> bool:
        self.end(job, "STOPPED")
        return True

    def delete_job(self, job: str) -> bool:
        assert self.jobs[job]["status"] in ("SUCCEEDED", "FAILED", "STOPPED")
        del self.jobs[job]
        return True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The only address where anybody answers, and a working directory with a configuration."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    server = Server(tmp_path / "cluster")

    @contextlib.contextmanager
    def cluster(address: str) -> Iterator[Server]:
        assert address == ADDRESS, address
        yield server

    monkeypatch.setattr(job_server, "cluster", cluster)
    monkeypatch.setattr(jobs, "_SEEN_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    tree = settings_for(steps=5).model_dump(mode="json")
    tree["run"] |= {"name": "mine", "directory": str(tmp_path / "runs" / "{name}")}
    tree["cluster"] |= {"address": "local", "driver_cpus": 0.5, "driver_resources": {"head": 1.0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return server


def keel(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command says: standard output, or the one line of a refusal."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match=r"\A\d*\Z") as ended:
        patch.setattr(sys, "argv", ["keel", *arguments])
        main.main()
    out, err = capsys.readouterr()
    assert ended.value.code == code, (ended.value.code, out, err)
    if code:
        assert err.count("\n") == 1, err
    return err if code else out


def submit(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return json.loads(keel(capsys, "submit", "config.yaml", *arguments, "--address", ADDRESS, "--json"))


def test_what_is_submitted_runs_the_configuration_as_it_was_given(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = submit(capsys, "run.steps=7")
    (job,) = server.jobs
    subject = server.jobs[job]
    assert answer["job"] == job == "keel-mine-" + job[-8:] and answer["new"] and answer["attempt"] == 1
    assert subject["entrypoint"] == "python -m keel train config.yaml"
    assert subject["options"] == {"entrypoint_num_cpus": 0.5, "entrypoint_resources": {"head": 1.0}}
    staged = loader.load(tmp_path / "cluster" / job / "config.yaml")
    here = loader.load("config.yaml", ["run.steps=7", "prompts.source=files/prompts.jsonl", "cluster.address=null"])
    assert staged == here and (tmp_path / "cluster" / job / "files" / "prompts.jsonl").is_file()
    metadata = subject["metadata"]
    assert metadata["keel_digest"] == loader.digest(staged) == answer["digest"]
    assert (metadata["keel_run"], metadata["keel_directory"]) == ("mine", str(tmp_path / "runs" / "mine"))


def test_a_run_that_is_alive_is_found_and_one_that_is_over_has_another_attempt(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit(capsys)["job"]
    for status in ("PENDING", "RUNNING"):
        server.jobs[first]["status"] = status
        again = submit(capsys)
        assert (again["job"], again["new"], again["state"]) == (first, False, status) and len(server.jobs) == 1
    line = keel(capsys, "submit", "config.yaml", "run.seed=9", "--address", ADDRESS, code=2)
    assert line == f"keel: run.name=mine: runs with other settings as {first}; expected those, or another run.name\n"
    assert submit(capsys, "run.name=other")["job"].startswith("keel-other-")
    for number, ended in enumerate([("FAILED", 1), ("STOPPED", None), ("SUCCEEDED", 0)], start=2):
        server.end(first if number == 2 else f"{first}-{number - 1}", *ended)
        assert submit(capsys)["job"] == f"{first}-{number}"


def test_of_two_who_submit_at_once_the_second_finds_the_job_of_the_first(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = submit(capsys)
    known = server.list_jobs
    monkeypatch.setattr(server, "list_jobs", lambda: [])  # as it was when the second one looked
    second = submit(capsys)
    assert (second["job"], second["new"]) == (first["job"], False)
    assert "runs with other settings" in keel(
        capsys, "submit", "config.yaml", "run.seed=9", "--address", ADDRESS, code=2
    )
    assert len(known()) == 2


def test_status_lists_jobs_and_asks_the_run_beside_itself(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the command on the cluster; nothing of the question is left."""
    job = submit(capsys)["job"]
    assert keel(capsys, "status", "mine", "--address", ADDRESS).count("pending") == 1 and server.asked == []
    server.jobs[job]["status"] = "RUNNING"
    seen = json.loads(keel(capsys, "status", "mine", "--address", ADDRESS, "--json"))
    assert seen["run"] is None, "there is no run directory yet"
    write_run(tmp_path / "runs" / "mine")
    seen = json.loads(keel(capsys, "status", job, "--address", ADDRESS, "--json"))
    assert seen["job"]["job"] == job and seen["run"] == run_status.of(tmp_path / "runs" / "mine")
    assert set(server.jobs) == {job} and len(server.asked) == 2
    server.end(job, "FAILED", 130)  # its uploaded files may be gone: the next question brings its own
    shutil.rmtree(tmp_path / "cluster" / job)
    listed = json.loads(keel(capsys, "status", "--address", ADDRESS, "--json"))["jobs"]
    assert [(item["run"], item["attempt"], item["state"]) for item in listed] == [("mine", 1, "STOPPED")]
    assert "step 2 of 4" in keel(capsys, "status", "mine", "--address", ADDRESS)


def test_logs_are_those_of_an_attempt(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    first = submit(capsys)["job"]
    server.end(first, "FAILED", 1)
    second = submit(capsys)["job"]
    for job in (first, second):
        server.jobs[job]["logs"] += f"this is {job} [bold]\n"
    assert f"this is {second} [bold]\n" in keel(capsys, "logs", "mine", "--address", ADDRESS, "--follow")
    assert f"this is {first} [bold]\n" in keel(capsys, "logs", "mine", "--address", ADDRESS, "--attempt", "1")
    assert "no attempt 3" in keel(capsys, "logs", "mine", "--address", ADDRESS, "--attempt", "3", code=2)
    assert "no run of that name" in keel(capsys, "logs", "absent", "--address", ADDRESS, code=2)


def test_a_silent_log_is_followed_as_long_as_the_server_answers(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, asked = submit(capsys)["job"], 0

    def info(job: str) -> JobDetails:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise requests.ConnectTimeout("gone")
        return JobDetails(**server.jobs[job])

    async def silent(job: str) -> AsyncIterator[str]:
        yield "a line\n"
        await asyncio.sleep(60)

    monkeypatch.setattr(server, "get_job_info", info)
    monkeypatch.setattr(server, "tail_job_logs", silent)
    monkeypatch.setattr(jobs, "_SILENCE_SECONDS", 0.05)
    answer: list[str] = []
    with pytest.raises(requests.ConnectTimeout, match="gone"):
        jobs.follow(server, job, answer.append)  # type: ignore[arg-type]
    assert answer == ["a line\n"] and asked == 3
    asked = -1000
    server.end(job, "FAILED", 1)
    assert jobs.follow(server, job, answer.append).state == "FAILED"  # type: ignore[arg-type]


def test_a_run_that_has_begun_and_cannot_be_asked_can_be_ended(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(capsys)["job"]
    server.jobs[job]["status"] = "RUNNING"
    line = keel(capsys, "stop", "mine", "--address", ADDRESS, code=2)
    assert line.endswith(f"; or --now, which ends {job} as it is\n")


def test_a_question_that_is_not_taken_keeps_its_own_error(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(capsys)
    attempt = jobs.attempts(server)[0]  # type: ignore[arg-type]

    def refuse(**options: Any) -> str:
        raise requests.ReadTimeout("gone")

    monkeypatch.setattr(server, "submit_job", refuse)
    with pytest.raises(requests.ReadTimeout, match="gone"):
        jobs.on_cluster(server, attempt, ["status", "mine"])  # type: ignore[arg-type]


def test_stop_now_ends_the_job_and_what_is_not_alive_is_refused(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(capsys)["job"]
    assert "still pending" in keel(capsys, "stop", "mine", "--address", ADDRESS, code=2)
    server.jobs[job]["status"] = "RUNNING"
    write_run(tmp_path / "runs" / "mine")
    line = keel(capsys, "stop", "mine", "--address", ADDRESS, code=2)
    assert "broken off at step 2 of 4" in line, "the command on the cluster finds no live process"
    assert json.loads(keel(capsys, "stop", "mine", "--address", ADDRESS, "--now", "--json"))["job"] == job
    assert server.jobs[job]["status"] == "STOPPED"
    assert "is over (STOPPED)" in keel(capsys, "stop", "mine", "--address", ADDRESS, code=2)
    assert "SIGTERM" in keel(capsys, "stop", str(tmp_path / "runs" / "mine"), "--now", code=2)


def write_run(directory: Path) -> None:
    """Two of four steps, then the process was gone."""
    settings = settings_for(steps=4)
    Writer(directory, settings_for(steps=2)).train()
    files.write(directory / "config.yaml", loader.dump(settings).encode())
    files.write_json(directory / "scale.json", {"desired": {"generator": 2}, "actual": {"generator": 1}})


def test_where_a_run_stands_comes_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run)
    result = run_status.of(run)
    last = files.read_json_lines(run / "metrics.jsonl")[-1]
    assert (result["state"], result["step"], result["steps"], result["checkpoint"]) == ("broken off", 2, 4, 2)
    assert (result["wanted"], result["present"]) == ({"generator": 2}, {"generator": 1})
    assert result["reward"] == last.get("reward") and result["event"] is None
    assert keel(capsys, "status", str(run)).splitlines()[0].endswith(f"go on with: keel resume {run}")
    files.append_json(run / "events.jsonl", {"event": "stopped", "time": 5.0, "step": 2})
    assert run_status.of(run)["state"] == "stopped"
    with files.lock(run):
        assert run_status.of(run)["state"] == "live"
        assert files.held(run)
    assert not files.held(run)
    files.write(run / "config.yaml", loader.dump(settings_for(steps=2)).encode())
    assert run_status.of(run)["state"] == "ended"
    newest = checkpoint.latest(run)
    assert newest is not None
    files.write(run / "config.yaml", loader.dump(settings_for(steps=4)).encode())
    state = json.loads((newest / "state.json").read_text()) | {"finished": True}
    (newest / "state.json").write_text(json.dumps(state))
    assert run_status.of(run)["state"] == "ended", "an objective may want no further step"
    with pytest.raises(ConfigError, match="ended at step 2 of 4; expected a live run"):
        run_status.stop(run)


@pytest.mark.parametrize("last_event", ["stopped", "resources_found"])
def test_a_run_that_breaks_off_while_it_is_asked_to_stop_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, last_event: str
) -> None:
    run = tmp_path / "run"
    write_run(run)
    lock = files.lock(run)

    def end(directory: Path) -> None:
        files.append_json(directory / "events.jsonl", {"event": last_event, "time": 5.0})
        lock.close()

    monkeypatch.setattr(run_status, "_ask", end)
    answer = keel(capsys, "stop", str(run), code=0 if last_event == "stopped" else 1)
    assert ("stopped, as asked, at step 2" in answer) == (last_event == "stopped")
    assert ("broken off at step 2" in answer) != (last_event == "stopped")


def test_a_run_that_ends_before_it_can_be_asked_to_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    write_run(run)
    files.append_json(run / "events.jsonl", {"event": "stopped", "time": 5.0})
    lock = files.lock(run)
    monkeypatch.setattr(run_status, "control_of", lambda directory: lock.close() or _no_control(directory))
    assert run_status.stop(run)["state"] == "stopped"


def test_a_stop_that_nobody_hears_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    write_run(run)
    monkeypatch.setattr(run_status, "_STARTS_SECONDS", 0.0)
    with files.lock(run), pytest.raises(run_status.NotStopped, match=r"has not answered for 0 s \(.*no control.json"):
        run_status.stop(run)


def test_a_cluster_of_another_ray_says_which_and_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = tmp_path / "run", []
    write_run(run)
    where = {"address": "head:6379", "namespace": "mine", "actor": "control", "authentication": "disabled"}
    files.write_json(run / "control.json", where)

    def init(address: str, **options: Any) -> None:
        asked.append(address)
        raise RuntimeError("Version mismatch: The cluster was started with:\n  Ray: 2.1\nThis process:\n  Ray: 2.2\n")

    monkeypatch.setattr(control, "reach", lambda address: None)
    monkeypatch.setattr(control.ray, "init", init)
    with files.lock(run), pytest.raises(ConfigError, match=r"Version mismatch: .* Ray: 2.1 This process: Ray: 2.2"):
        run_status.stop(run)
    assert asked == ["head:6379"]


def _no_control(directory: Path) -> None:
    raise ConfigError(f"RUN_DIR={directory}: no control.json in it")


def test_a_question_that_no_node_has_resources_for_is_given_up(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that may take as long as the run likes once it has begun."""
    job = submit(capsys)["job"]
    server.jobs[job]["status"] = "RUNNING"
    monkeypatch.setattr(server, "_run", lambda job: None)
    monkeypatch.setattr(jobs, "_BEGIN_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.0)
    assert "still PENDING after 0 s" in keel(capsys, "stop", "mine", "--address", ADDRESS, code=1)
    assert set(server.jobs) == {job}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["submit", "config.yaml"], "--address: missing; expected that of Ray's dashboard"),
        (["submit", "config.yaml", "run.directory=runs/{name}"], "run.directory=runs/{name}: relative; expected an"),
        (
            ["submit", "config.yaml", "metrics.discovery_directory=seen"],
            "metrics.discovery_directory=seen: relative; exp",
        ),
        (["submit", "config.yaml", f"run.name={'a' * 201}"], f"run.name='{'a' * 201}': string should have at most 200"),
        (["submit", "config.yaml", "run.stepz=1"], "run.stepz: unknown setting; did you mean steps?"),
        (["status", "absent"], "RUN=absent: no such directory; expected a run directory, or --address and"),
        (["stop", "absent"], "RUN=absent: no such directory; expected a run directory, or --address and"),
        (["status", "."], "RUN_DIR=.: no config.yaml in it"),
        (["status", "."], "RUN_DIR=.: its config.yaml is no run's own"),
    ],
)
def test_what_cannot_be_is_one_line(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str, tmp_path: Path
) -> None:
    if line.endswith("no config.yaml in it"):
        (tmp_path / "config.yaml").unlink()
    if line.endswith("no run's own"):
        (tmp_path / "config.yaml").write_text("prompts: {source: rows.jsonl}")
    assert keel(capsys, *arguments, code=2).startswith(f"keel: {line}")


def test_the_environment_names_the_address_as_for_ray(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "--address: missing" in keel(capsys, "submit", "config.yaml", code=2)
    monkeypatch.setenv("RAY_ADDRESS", ADDRESS)
    assert keel(capsys, "submit", "config.yaml").startswith("Submitted keel-mine-")
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ADDRESS)
    assert keel(capsys, "submit", "config.yaml").startswith("Attached  keel-mine-")
    (job,) = server.jobs
    server.jobs[job]["status"] = "RUNNING"
    for command in ("scale", "explain", "stop"):
        keel(capsys, command, "mine", code=2)  # nothing is written yet
        assert f"python -m keel {command} " in server.asked[-1]


# ---- addresses where no job server is, by real sockets


def serving(status: int, body: bytes) -> contextlib.AbstractContextManager[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    return tools.served(Handler)


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (404, b"", "is no job server of Ray"),
        (200, b"<html>", "is no job server of Ray"),
        (200, b"{}", "is no job server of Ray"),
        (
            401,
            b"missing token",
            "the cluster wants a token (Authentication required: missing token); expected RAY_AUTH",
        ),
        (403, b"wrong token", "the cluster wants a token (Authentication failed: wrong token); expected RAY_AUTH"),
    ],
)
def test_an_answer_of_somebody_else_is_one_line(
    capsys: pytest.CaptureFixture[str], status: int, body: bytes, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # --address counts more
    with serving(status, body) as address:
        assert line in keel(capsys, "status", "--address", address, code=2)


def test_nobody_at_an_address_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
    for address, line in {
        "http://127.0.0.1:1": "no answer from a job server (ConnectionError)",
        "http://[": "no answer from a job server (InvalidURL)",
        "head:8265": "--address=head:8265: expected that of Ray's dashboard, such as http://HOST:8265",
        "ray://head:10001": "expected that of Ray's dashboard, such as http://HOST:8265",
    }.items():
        assert line in keel(capsys, "status", "--address", address, code=2)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("Request failed with status code 500: Traceback\nValueError: no logs.\n"),
            "ValueError: no logs.",
        ),
        (requests.ConnectionError("reset"), "no answer any more (ConnectionError); what runs there continues"),
        (aiohttp.ServerDisconnectedError(), "no answer any more (ServerDisconnectedError); what runs there continues"),
    ],
)
def test_a_cluster_that_fails_later_is_no_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def attempts(client: Any) -> Any:
        raise error

    monkeypatch.setattr(job_server, "_connected", lambda address: None)
    monkeypatch.setattr(jobs, "attempts", attempts)
    assert keel(capsys, "status", "--address", ADDRESS, code=1).endswith(f"{ADDRESS}: {line}\n")
