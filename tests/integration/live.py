"""A run that is alive: what its files say while it runs, what commands answer, and how it is ended."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from commands import finish, wait_for
from keel import files
from keel.cluster.actors import tried

PATIENCE_SECONDS = 1200
ENDS_WITHIN_SECONDS = 10
LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own agents end a minute after their raylet, having tried to tell a GCS that is gone; they hold nothing."""
Start = Callable[..., Any]


def free_port() -> int:
    """Of a range that no client gets a port from, nor Ray's workers or a learner group; never the same one, of no other process."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = iter(range(3000 + 1000 * _WORKER, 4000 + 1000 * _WORKER))


def title_of(process: psutil.Process) -> str:
    """Its command line, as one text; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def add_node(cluster: Cluster, **options: Any) -> None:
    """The first is the head. Tried again where its agent came up too late."""
    tried(lambda: cluster.add_node(object_store_memory=2**27, **options))


def events_of(run: Path, *names: str, since: float = 0.0, **fields: Any) -> list[dict[str, Any]]:
    """Events of some names, or of all, with these fields, since a time."""
    result = [item for item in files.read_json_lines(run / "events.jsonl") if item["time"] > since]
    named = [item for item in result if not names or item["event"] in names]
    return [item for item in named if all(item.get(key) == value for key, value in fields.items())]


def last_step(run: Path) -> int:
    lines = files.read_json_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def wait(process: Any, condition: Callable[[], Any], what: str) -> None:
    """Until it is so; a run that ended meanwhile is an error, with what it said."""
    wait_for(lambda: condition() or process.poll() is not None, PATIENCE_SECONDS, what)
    assert condition(), f"the run ended ({process.returncode}) before {what}: {process.stderr.read()}"


def more_steps(process: Any, run: Path, count: int = 2) -> None:
    before = last_step(run)
    wait(process, lambda: last_step(run) >= before + count, f"{count} steps after {before}")


def ranks_of(run: Path) -> list[int]:
    return [event["ranks"] for event in events_of(run, "running")]


def answer(keel: Start, *arguments: Any) -> Any:
    """The JSON of a command that ends well."""
    code, out, err = finish(keel(*map(str, arguments), "--json"))
    assert code == 0, err
    return json.loads(out)


def refusal(keel: Start, *arguments: Any, code: int = 2) -> str:
    """The one line of a command that is refused."""
    ended, _, err = finish(keel(*map(str, arguments)))
    lines = err.strip().splitlines()
    assert (ended, len(lines)) == (code, 1), err
    return lines[0]


def check_intact(keel: Start, run: Path) -> Any:
    report = answer(keel, "verify", run)
    assert report["intact"] and not report["findings"], report
    return report


def end(process: Any, *signals: signal.Signals) -> None:
    """Signals to the driver alone; it says how to go on, and nothing that it started is left."""
    started = psutil.Process(process.pid).children(recursive=True)
    titles = {item.pid: title_of(item) for item in started}
    began = time.monotonic()
    for item in signals:
        process.send_signal(item)
        time.sleep(0.3)
    code, _, err = finish(process)
    seconds = time.monotonic() - began
    print(f"{[item.name for item in signals]}: {code} after {seconds:.1f} s")
    assert code == 130 and seconds < ENDS_WITHIN_SECONDS, (code, seconds, err)
    assert err.strip() == "keel: interrupted; `keel resume RUN_DIR` resumes from the last checkpoint", err
    held = [item for item in started if not titles[item.pid].startswith(LINGERING)]
    _, alive = psutil.wait_procs(held, timeout=60)
    assert not alive, [titles[item.pid] for item in alive]
