"""The command line in a process of its own: started, waited for, killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import keel as package

RUN_SECONDS = 1500
"""Far beyond what a run of the tests takes (minutes at most): a machine may be slow."""
AUTHENTICATION = "RAY_AUTH_MODE"
"""Set for the process of the tests alone (conftest.py)."""


def start_keel(*arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    """The command line in its own process group, in a folder; the Keel of this process, rewards of these tests."""
    paths = [str(Path(__file__).parent), str(Path(package.__file__).parent.parent)]
    return subprocess.Popen(
        [sys.executable, "-m", "keel", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != AUTHENTICATION}
        | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=folder,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    out, err = process.communicate(timeout=RUN_SECONDS)
    return process.returncode, out, err


def kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)
