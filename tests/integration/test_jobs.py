"""Runs as jobs of a real cluster on this machine: submitted, watched, asked to stop, submitted again."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import keel as package
import rewards
from commands import finish, kill, start_keel, wait_for
from keel import checkpoint, files
from keel.cluster.actors import tried
from keel.cluster.jobs import LIMIT_BYTES
from live import PATIENCE_SECONDS, Start, answer, check_intact, events_of, free_port, last_step, refusal
from test_runs import metrics_of

pytestmark = pytest.mark.slow
STEPS = 60
BINARIES = Path(sys.executable).parent


@pytest.fixture(scope="module")
def pace_of_cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file whose seconds a batch of `rewards:paced` takes; the cluster's processes know it from their environment."""
    return tmp_path_factory.mktemp("pace") / "pace"


@pytest.fixture(scope="module")
def address(pace_of_cluster: Path) -> Iterator[str]:
    """A head with a dashboard, without Keel on its path: what a job needs comes with it."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kj", dir="/tmp") as folder:  # short: sockets lie in it
        options = {"port": 0, "dashboard-host": "127.0.0.1", "dashboard-port": port, "num-cpus": 6}
        options["dashboard-agent-listen-port"] = free_port()  # without one of its own no job starts beside another Ray
        options |= {"object-store-memory": 2**27, "temp-dir": folder}
        environment = os.environ | {
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",
            rewards.PACE: str(pace_of_cluster),
        }
        environment.pop("PYTHONPATH", None)
        command = [BINARIES / "ray", "start", "--head", "--block", "--disable-usage-stats"]
        arguments = [*map(str, command), *(f"--{name}={value}" for name, value in options.items())]
        url = f"http://127.0.0.1:{port}"
        heads: list[subprocess.Popen[str]] = []

        def start_head() -> None:
            out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            heads.append(subprocess.Popen(arguments, env=environment, start_new_session=True, **out))
            wait_for(lambda: heads[-1].poll() is not None or answers(url), PATIENCE_SECONDS, "a job server")
            if heads[-1].poll() is not None:
                raise RuntimeError(heads[-1].communicate()[0])

        try:
            tried(start_head)
            yield url
        finally:
            for head in heads:
                kill(head)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def jobs_of(address: str) -> set[str]:
    """Ids of all jobs and drivers that the job server knows."""
    with urllib.request.urlopen(f"{address}/api/jobs/", timeout=30) as reply:
        return {item["submission_id"] for item in json.load(reply)}


def job_of(address: str, job: str) -> dict[str, Any]:
    """What the job server says, without Ray's client."""
    with urllib.request.urlopen(f"{address}/api/jobs/{job}", timeout=30) as reply:
        return json.load(reply)


def wait_job(address: str, job: str, condition: Callable[[], Any], what: str) -> None:
    """Until it is so; a job that ended meanwhile is an error, with what it said."""
    over = ("SUCCEEDED", "FAILED", "STOPPED")
    wait_for(lambda: condition() or job_of(address, job)["status"] in over, PATIENCE_SECONDS, what)
    assert condition(), job_of(address, f"{job}/logs")["logs"]


@pytest.fixture
def folder(tmp_path: Path, write_config: Start) -> Path:
    """A user's folder: a configuration with relative prompts, its own reward, a run directory that is absolute."""
    config = write_config(
        "user",
        run={"name": "first", "steps": STEPS, "directory": str(tmp_path / "runs" / "{name}")},
        rewards=[{"name": "low", "source": "rewards:paced"}],
        prompts={"source": "prompts.jsonl"},
        scorers={"threads": 1},
        checkpoint={"every_steps": 50},
        evaluation={"every_steps": 0},
    )
    (config.parent / "rewards.py").write_text(Path(rewards.__file__).read_text())
    return config.parent


def test_a_run_is_submitted_watched_stopped_and_submitted_again(
    address: str, folder: Path, tmp_path: Path, pace_of_cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keel(*arguments: str) -> subprocess.Popen[str]:
        return start_keel(*arguments, folder=folder)

    run, at = tmp_path / "runs" / "first", ("--address", address)
    pace_of_cluster.write_text("1.0")
    others = jobs_of(address)
    began = time.monotonic()
    first = answer(keel, "submit", "config.yaml", *at)
    job = first["job"]
    assert first["new"] and (first["run"], first["attempt"]) == ("first", 1), first
    assert {"keel", "module rewards", "prompts.source=prompts.jsonl"} == set(first["uploaded"]), first
    again = answer(keel, "submit", "config.yaml", *at)
    assert not again["new"] and (again["job"], again["digest"]) == (job, first["digest"]), again
    assert f"runs with other settings as {job}" in refusal(keel, "submit", "config.yaml", "run.seed=3", *at)
    monkeypatch.setenv("RAY_max_grpc_message_size", "100000")  # what Ray's own limit is taken from
    assert "more to upload than the 0.1 MB Ray takes" in refusal(keel, "submit", "config.yaml", "run.name=large", *at)
    monkeypatch.delenv("RAY_max_grpc_message_size")

    wait_job(address, job, lambda: last_step(run) >= 2, "two steps")
    print(f"two steps {time.monotonic() - began:.1f} s after submit")
    pace_of_cluster.write_text("10.0")  # or a slow machine's commands would take longer than the run
    began = time.monotonic()
    seen = answer(keel, "status", "first", *at)
    print(f"status took {time.monotonic() - began:.1f} s")
    assert (seen["job"]["state"], seen["run"]["state"], seen["run"]["steps"]) == ("RUNNING", "live", STEPS), seen
    assert seen["run"]["step"] >= 2 and seen["run"]["present"] == {
        "generator": 1,
        "reference": 1,
        "scorer": 1,
        "learner": 1,
    }
    print(*finish(keel("status", *at)), sep="\n")
    assert answer(keel, "scale", "first", *at)["desired"]["generator"] == 1

    began = time.monotonic()
    code, out, err = finish(keel("stop", "first", *at))
    print(f"stop took {time.monotonic() - began:.1f} s", out, err)
    at_step = last_step(run)
    assert code == 0 and f"stopped, as asked, at step {at_step} of {STEPS}; go on with: keel resume {run}" in out
    assert checkpoint.steps(run) == [at_step] and at_step < STEPS
    assert [event["step"] for event in events_of(run, "stopped")] == [at_step]
    ended = job_of(address, job)
    assert (ended["status"], ended["driver_exit_code"]) == ("FAILED", 130), ended
    assert "expected a live run" in refusal(keel, "stop", "first", *at)
    check_intact(keel, run)
    before = metrics_of(run)

    pace_of_cluster.unlink()
    second = answer(keel, "submit", "config.yaml", *at)
    assert second["new"] and second["job"] == f"{job}-2", second
    code, out, err = finish(keel("logs", "first", *at, "--follow"))
    assert code == 0 and f"resuming from step-{at_step:06d}" in out, (out, err)
    assert "Ray: joined the cluster" in out and "(RAY_ADDRESS=" in out, out
    assert [line["step"] for line in metrics_of(run)] == list(range(1, STEPS + 1))
    assert metrics_of(run)[:at_step] == before
    check_intact(keel, run)
    seen = answer(keel, "status", "first", *at)
    assert (seen["job"]["attempt"], seen["job"]["state"], seen["run"]["state"]) == (2, "SUCCEEDED", "ended"), seen
    code, out, _ = finish(keel("logs", "first", *at, "--attempt", "1"))
    assert code == 0 and f"stopped, as asked, after step {at_step}" in out, out
    assert jobs_of(address) - others == {job, f"{job}-2"}  # questions leave no jobs behind


def test_rays_own_command_runs_keel_and_now_ends_it(
    address: str, folder: Path, tmp_path: Path, pace_of_cluster: Path
) -> None:
    """Also what Ray itself refuses to take, which is the limit that Keel names; and an end without a checkpoint."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["run"] |= {"name": "plain", "steps": 2}
    del tree["cluster"]["address"]
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "keel").symlink_to(Path(package.__file__).parent)
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [str(BINARIES / "ray"), "job", "submit", "--address", address, "--working-dir", str(folder)]
    pace_of_cluster.unlink(missing_ok=True)
    done = subprocess.run(
        [*command, "--", "python", "-m", "keel", "train", "config.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "plain"
    assert [line["step"] for line in metrics_of(run)] == [1, 2]

    def keel(*arguments: str) -> subprocess.Popen[str]:
        return start_keel(*arguments, folder=folder)

    check_intact(keel, run)
    package_of = urllib.request.Request(
        f"{address}/api/packages/gcs/_ray_pkg_0.zip", bytes(LIMIT_BYTES + 1), method="PUT"
    )
    with pytest.raises(urllib.error.HTTPError, match=r"HTTP Error [45]\d\d"):
        urllib.request.urlopen(package_of, timeout=60)

    killed = answer(keel, "submit", "config.yaml", "run.name=killed", "run.steps=1000", "--address", address)["job"]
    wait_job(address, killed, lambda: last_step(tmp_path / "runs" / "killed") >= 1, "a step")
    assert answer(keel, "stop", killed, "--now", "--address", address)["state"] == "STOPPED"
    assert not files.held(tmp_path / "runs" / "killed")
