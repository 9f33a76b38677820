"""A tiny model and a configuration for the real stack: vLLM, Ray, Arrow files, DeepSpeed."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray  # noqa: F401 it sets up its loggers once, when it is imported: not in the middle of a module
import yaml

import process_state
import rewards
from commands import AUTHENTICATION, kill, start_keel
from keel.cli import doctor
from keel.learner import tiny

TEST_SECONDS = 1800
"""Far beyond what they take (minutes at most): a machine may be slow, and a test stalls where the next one loads a model."""
os.environ[AUTHENTICATION] = "disabled"
"""Before Ray is imported: all Rays of this process are of one mind. Commands that it starts do not inherit it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="module", autouse=True)
def stack_for_a_module(_module_leaves_no_trace: None) -> Iterator[None]:
    """Ray and DeepSpeed set variables, log levels and formats of a process that starts them, and put nothing back."""
    before = process_state.snapshot()
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    process_state.restore(before)


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
