"""Ray's own client, as Keel gives it deadlines and patience, against a server that answers as Ray's does."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import ray

import tools
from keel.cluster import job_server

_NO_AGENT = (500, "No available agent to submit job, please try again later.")
_TAKEN = (200, json.dumps({"job_id": "keel-a", "submission_id": "keel-a"}))
JOB = {"entrypoint": "true", "submission_id": "keel-a"}


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(job_server, "_POLL_SECONDS", 0.0)


@contextlib.contextmanager
def serving(submissions: list[tuple[int, str]], uploads: list[int] | None = None) -> Iterator[str]:
    """A job server that gives these answers to submissions, one after the other; none of them left: no answer.

    It takes 50 MiB a second of what is uploaded, and notes the bytes.
    """
    over = threading.Event()
    uploads = [] if uploads is None else uploads

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/api/version": {"ray_version": ray.__version__, "version": "4"}, "/api/jobs/": []}
            present = self.path in known
            self._answer(200 if present else 404, json.dumps(known[self.path]) if present else "")

        def do_PUT(self) -> None:
            left = int(self.headers["Content-Length"])
            while left:
                time.sleep(0.02)
                left -= len(self.rfile.read(min(left, 2**20)))
            uploads.append(int(self.headers["Content-Length"]))
            self._answer(200, "")

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/api/jobs/" and sent["submission_id"] == "keel-a", (self.path, sent)
            if not submissions:
                over.wait(30)
                return
            self._answer(*submissions.pop(0))

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *arguments: Any) -> None: ...

    with tools.served(Handler) as address:
        try:
            yield address
        finally:
            over.set()


def test_a_head_without_its_agent_is_waited_for_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [_NO_AGENT, _NO_AGENT, _TAKEN]
    with serving(answers) as address, job_server.cluster(address) as client:
        assert client.submit_job(**JOB) == "keel-a"
    assert not answers
    assert capsys.readouterr().err.count("waiting for the agent of the cluster's head") == 1


def test_an_agent_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "_AGENT_SECONDS", 0.0)
    with (
        serving([_NO_AGENT, _TAKEN]) as address,
        pytest.raises(
            job_server.JobError,
            match=r"No available agent .*: another Ray on the head's machine .*--dashboard-agent-listen-port",
        ),
        job_server.cluster(address) as client,
    ):
        client.submit_job(**JOB)


def test_another_refusal_is_not_tried_again() -> None:
    answers = [(400, "ValueError: Job with submission_id keel-a already exists."), _TAKEN]
    with (
        serving(answers) as address,
        pytest.raises(job_server.JobError, match="already exists"),
        job_server.cluster(address) as client,
    ):
        client.submit_job(**JOB)
    assert answers == [_TAKEN]


def test_a_server_that_does_not_answer_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with (
        serving([]) as address,
        pytest.raises(job_server.JobError, match="no answer any more"),
        job_server.cluster(address) as client,
    ):
        monkeypatch.setattr(job_server, "_ANSWER_SECONDS", 0.3)
        client.submit_job(**JOB)
    assert time.monotonic() - began < 20


def test_an_upload_may_take_longer_than_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib3 sends a whole body within the time for connecting."""
    archive = tmp_path / "bundle.zip"
    archive.write_bytes(bytes(2**25))
    uploads: list[int] = []
    with serving([_TAKEN], uploads) as address, job_server.cluster(address) as client:
        monkeypatch.setattr(job_server, "_CONNECT_SECONDS", 0.1)
        client.submit_job(**JOB, runtime_env={"working_dir": str(archive)})
    assert uploads == [2**25]
