"""A tiny model and a configuration for the real stack: vLLM, Ray, Arrow files, DeepSpeed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rewards
import yaml

import keel as package
from keel import doctor, tiny

RUN_SECONDS = 1500
TEST_SECONDS = 1800
"""Far beyond what they take (minutes at most): a machine may be slow, and a test stalls where the next one loads a model."""
AUTHENTICATION = "RAY_AUTH_MODE"
os.environ[AUTHENTICATION] = "disabled"
"""Before Ray is imported: all Rays of this process are of one mind. Commands that it starts do not inherit it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))
    # Long files first, or one process ends with them while the other has nothing left: few tests are long tests.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, count[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def quiet_cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def write_config(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write the self-test configuration with blocks changed: write_config(run={"steps": 4})."""

    def write(name: str = "run", **blocks: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        path = doctor.self_test_config(folder, str(tiny_model))
        tree = yaml.safe_load(path.read_text())
        for block, values in blocks.items():
            tree[block] = {**tree.get(block, {}), **values} if isinstance(values, dict) else values
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file whose seconds a batch of `rewards:paced` takes; without it, none."""
    monkeypatch.setenv(rewards.PACE, str(tmp_path / "pace"))
    return tmp_path / "pace"


@pytest.fixture
def keel() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command line in its own process group; whatever is left of it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        started.append(start_keel(*arguments))
        return started[-1]

    yield start
    for process in started:
        kill(process)


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
