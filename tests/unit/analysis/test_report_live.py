"""The served page: made again when files change, for this machine's own address alone."""

import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

import report_runs
from keel import files, reads
from keel.analysis import report, report_live, report_page
from keel.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return report_runs.online(tmp_path / "run", steps=2)


@pytest.fixture
def client(run: Path) -> Iterator[httpx.Client]:
    with report_live.serving([run], 0) as (address, server):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with httpx.Client(base_url=address, trust_env=False) as asks:
            yield asks
        server.shutdown()
        thread.join()


def test_the_page_follows_the_files(client: httpx.Client, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = client.get("/")
    live = re.search(r'data-live="(\d+) (\w+)"', first.text)
    assert live and live[1] == "10" and client.get("/state").text == live[2]
    assert "connect-src 'self';" in first.text and "ended" not in first.text.partition("<main>")[0]
    collect = report.collect
    monkeypatch.setattr(report, "collect", lambda directories: pytest.fail("made again without a change"))
    assert client.get("/").text == first.text
    monkeypatch.setattr(report, "collect", collect)
    files.append_json(run / "metrics.jsonl", report_runs.line(3, 5.0, 7))
    assert client.get("/state").text != live[2]
    assert '"steps":[1,2,3]' in client.get("/").text and '"steps":[1,2,3]' not in first.text


def test_what_else_is_asked_for_is_refused(client: httpx.Client, run: Path) -> None:
    assert client.get("/", headers={"Host": "evil.example:80"}).status_code == 403
    assert client.get("/", headers={"Host": "localhost:80"}).status_code == 200
    assert client.get("/config.yaml").status_code == 404 and client.post("/").status_code == 501
    files.append_json(run / "events.jsonl", {"event": "retry", "time": 1.0})
    (run / "rollouts" / "step-000001.arrow").write_bytes(b"half")
    answer = client.get("/")
    assert answer.status_code == 503 and "expected the files of a run" in answer.text


def test_a_file_that_vanishes_while_it_is_looked_at_is_a_503(
    client: httpx.Client, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Between the look whether a file is there and that at its size it is gone."""
    is_there = reads.is_there

    def and_gone(path: Path) -> bool:
        known = is_there(path)
        if path.name == "events.jsonl":
            path.unlink(missing_ok=True)
        return known

    monkeypatch.setattr(reads, "is_there", and_gone)
    for path in ("/state", "/"):
        files.append_json(run / "events.jsonl", {"event": "retry", "time": 1.0})
        answer = client.get(path)
        assert answer.status_code == 503 and "events.jsonl" in answer.text
    assert client.get("/state").status_code == 200 and "Traceback" not in capfd.readouterr().err


def test_a_client_that_has_left_leaves_no_traceback(
    client: httpx.Client, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The connection is reset while the page is made; the answer meets a closed pipe."""
    asked, left, ended = threading.Event(), threading.Event(), threading.Event()

    def html(collected: object, live: str) -> str:
        asked.set()
        assert left.wait(9)
        return "x" * 10_000_000

    files.append_json(run / "events.jsonl", {"event": "retry", "time": 1.0})  # the page is made again
    monkeypatch.setattr(report_page, "html", html)
    shutdown_request = ThreadingHTTPServer.shutdown_request
    monkeypatch.setattr(
        ThreadingHTTPServer, "shutdown_request", lambda *arguments: shutdown_request(*arguments) or ended.set()
    )
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost:80\r\n\r\n")
        assert asked.wait(9)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left.set()
    assert ended.wait(9) and "Traceback" not in capfd.readouterr().err


def test_bad_directories_and_ports_are_refused_before_anything_is_served(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the directory of a run"), report_live.serving([tmp_path], 0):
        pass
    with report_live.serving([run], 0) as (_, server):
        port = server.server_port
        with pytest.raises(ConfigError, match=rf"^--port={port}: .*; expected a free port, or 0 for any$"):
            report_live.serving([run], port).__enter__()
