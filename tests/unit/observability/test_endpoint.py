"""What a run answers over HTTP, and the file by which Prometheus finds it. The requests are raw sockets or urllib."""

import gzip
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from pydantic import ValidationError

from keel.config.monitoring import MetricsSettings
from keel.errors import ConfigError
from keel.observability import endpoint
from keel.observability.metrics import RunMetrics

PAGES = ("/metrics", "/sd", "/-/healthy", "/")


@pytest.fixture
def metrics(tmp_path: Path) -> RunMetrics:
    addresses = RunMetrics("mine", tmp_path / "metrics.jsonl")
    addresses.add({"steps_total": 3.0})
    return addresses


@pytest.fixture
def port(metrics: RunMetrics, tmp_path: Path) -> Iterator[int]:
    with endpoint.serving(MetricsSettings(port=0), "mine", tmp_path, metrics.page) as url:
        yield port_of(url)


def port_of(url: str) -> int:
    result = re.fullmatch(r"http://.*:(\d+)/metrics", url)
    assert result, url
    return int(result[1])


def ask(port: int, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers, body."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def discovered(content: bytes) -> tuple[str, dict[str, str]]:
    (group,) = json.loads(content)
    (target,) = group["targets"]
    return target, group["labels"]


def test_the_page_is_text_or_open_metrics_and_compressed_when_asked(port: int) -> None:
    status, headers, text = ask(port, "/metrics")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    assert {family.name for family in parse_text(text.decode())} >= {"keel_steps"}
    status, headers, packed = ask(port, "/metrics", Accept_Encoding="gzip")
    assert (status, headers["Content-Encoding"], gzip.decompress(packed)) == (200, "gzip", text)
    status, headers, text = ask(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "application/openmetrics-text")
    (steps,) = [family for family in parse_open_metrics(text.decode()) if family.name == "keel_steps"]
    assert [(sample.labels, sample.value) for sample in steps.samples] == [({"run": "mine"}, 3.0)]


def test_discovery_answers_the_whole_list_as_json(port: int, tmp_path: Path) -> None:
    for _ in range(2):
        status, headers, content = ask(port, "/sd")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        target, labels = discovered(content)
        assert target == f"127.0.0.1:{port}"
        identity = labels.pop("__meta_keel_identity")
        assert labels == {"run": "mine", "__meta_keel_directory": str(tmp_path)}
        assert re.fullmatch(r"mine-[0-9a-f]{8}", identity)


def test_everything_else_is_not_there(port: int) -> None:
    assert ask(port, "/-/healthy")[0] == ask(port, "/")[0] == 200
    assert all(page in ask(port, "/")[2].decode() for page in PAGES[:3])
    for path in ("/nothing", "/metrics/", "/sd/..", "/%2e%2e/etc/passwd", "/favicon.ico", "/config.yaml"):
        assert ask(port, path)[0] == 404, path
    for path in PAGES:
        status, headers, _ = ask(port, path, method="POST")
        assert status == 405 and "GET" in headers["Allow"], path
    assert ask(port, "/-/healthy", method="HEAD")[0::2] == (200, b"")


def test_slow_and_broken_clients_keep_nobody_waiting_and_are_not_spoken_of(
    port: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.5)
    silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(100)]
    for client in silent[::2]:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: ")
    for garbage in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"A" * 70_000 + b"\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(garbage)  # and away, without reading
    began = time.monotonic()
    assert ask(port, "/metrics")[0] == 200
    assert time.monotonic() - began < 5
    assert all(client.recv(1) == b"" for client in silent)  # the server hung up
    for client in silent:
        client.close()
    assert ask(port, "/-/healthy")[0] == 200
    assert capfd.readouterr() == ("", "")
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def test_the_port_is_free_again_when_the_run_ends(metrics: RunMetrics, tmp_path: Path) -> None:
    with endpoint.serving(MetricsSettings(port=0), "mine", tmp_path, metrics.page) as url:
        port = port_of(url)
        with pytest.raises(ConfigError, match=rf"^metrics.port={port}: cannot listen on 127.0.0.1 .*metrics.port=0"):
            endpoint.check(MetricsSettings(port=port))
    endpoint.check(MetricsSettings(port=port))
    with endpoint.serving(MetricsSettings(port=port), "mine", tmp_path, metrics.page):
        assert ask(port, "/sd")[0] == 200


def test_what_is_counted_together_is_seen_together(metrics: RunMetrics, port: int) -> None:
    """No page between two counters of one call, and no step without its tokens."""
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            metrics.add({"completion_tokens_total": 7.0, "trained_tokens_total": 7.0, "evaluations_total": 1.0})

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        for _ in range(60):
            page = ask(port, "/metrics")[2].decode()
            result = {sample.name: sample.value for family in parse_text(page) for sample in family.samples}
            tokens, trained = result["keel_completion_tokens_total"], result["keel_trained_tokens_total"]
            assert tokens == trained == 7 * result["keel_evaluations_total"]
    finally:
        stop.set()
        thread.join()


# ---- the file for Prometheus' file discovery


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_file_says_what_the_endpoint_says_and_goes_with_the_run(metrics: RunMetrics, tmp_path: Path) -> None:
    shared = tmp_path / "a" / "shared"
    settings = MetricsSettings(port=0, discovery_directory=str(shared))
    endpoint.check(settings)
    assert not shared.exists()
    with endpoint.serving(settings, "mine", tmp_path, metrics.page) as url:
        (name,) = files(shared)
        assert re.fullmatch(r"keel-mine-[0-9a-f]{8}\.json", name)
        content = (shared / name).read_bytes()
        assert content == ask(port_of(url), "/sd")[2]
        assert f"keel-{discovered(content)[1]['__meta_keel_identity']}.json" == name
    assert files(shared) == []


def test_the_file_of_a_run_that_failed_or_was_killed_stays_until_it_goes_on(
    metrics: RunMetrics, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    settings = MetricsSettings(port=0, discovery_directory=str(shared))

    def ended_by(error: type[BaseException]) -> None:
        with pytest.raises(error, match="in between"), endpoint.serving(settings, "mine", tmp_path, metrics.page):
            raise error("in between")

    ended_by(KeyboardInterrupt)
    assert files(shared) == []
    child = os.fork()
    if child == 0:
        with endpoint.serving(settings, "mine", tmp_path, metrics.page):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    killed = files(shared)
    assert len(killed) == 1
    ended_by(RuntimeError)
    assert files(shared) == killed  # the same file, of the same run directory
    (tmp_path / "other").mkdir()
    with endpoint.serving(settings, "mine", tmp_path / "other", metrics.page):
        assert len(files(shared)) == 2  # another run of the same name
    with endpoint.serving(settings, "mine", tmp_path, metrics.page):
        pass
    assert files(shared) == []


def test_a_discovery_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^metrics.discovery_directory=.*/file/x: cannot be written; expected"):
        endpoint.check(MetricsSettings(port=0, discovery_directory=str(tmp_path / "file" / "x")))


# ---- under which name others reach the run


@pytest.mark.parametrize(
    ("blocks", "target"),
    [
        ({}, "127.0.0.1"),
        ({"host": "127.0.0.2"}, "127.0.0.2"),
        ({"host": "localhost"}, "localhost"),
        ({"advertise": "node-7.cluster.local"}, "node-7.cluster.local"),
        ({"host": "0.0.0.0", "advertise": "10.0.0.7"}, "10.0.0.7"),
        ({"advertise": "fd00::7"}, "[fd00::7]"),
    ],
)
def test_the_target_is_what_others_reach(
    metrics: RunMetrics, tmp_path: Path, blocks: dict[str, str], target: str
) -> None:
    with endpoint.serving(MetricsSettings(port=0, **blocks), "mine", tmp_path, metrics.page) as url:  # type: ignore[arg-type]
        assert url.rpartition(":")[0] == f"http://{target}"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_run_on_every_address_names_one_of_this_machine(metrics: RunMetrics, tmp_path: Path, host: str) -> None:
    subject = {item.address for addresses in psutil.net_if_addrs().values() for item in addresses}
    try:
        endpoint.check(MetricsSettings(port=0, host=host))
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with endpoint.serving(MetricsSettings(port=0, host=host), "mine", tmp_path, metrics.page) as url:
        address = url.removeprefix("http://").rpartition(":")[0]
        assert address.strip("[]") in subject or address == socket.gethostname()
        assert ask(port_of(url), "/-/healthy", host=address.strip("[]"))[0] == 200


@pytest.mark.parametrize("host", ["host:9464", "http://host", "", "a b", "-x", "10.0.0.1/8", "[::1]", "a..b", "a" * 64])
def test_a_host_is_no_url(host: str) -> None:
    for setting in ("host", "advertise"):
        with pytest.raises(ValidationError, match="host name or an IP address, without a port"):
            MetricsSettings.model_validate({setting: host})
