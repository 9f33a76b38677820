"""What holds for every test: it leaves the process as it found it, and random numbers follow from the printed seed."""

import sys
import zlib
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

import leaks
import process_state
from remaining import LongFilesFirst, Remaining


def pytest_configure(config: pytest.Config) -> None:
    if randomly := sys.modules.get("pytest_randomly"):
        randomly.entrypoint_reseeds = []  # DeepSpeed's: it would be imported, torch with it, for the lightest of tests
    config.pluginmanager.register(LongFilesFirst())
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Remaining(config))


def seed_torch(item: pytest.Item) -> None:
    """Like pytest-randomly's seeds of `random` and numpy: from the printed seed and the test's name."""
    seed = item.config.getoption("randomly_seed", None)
    if "torch" in sys.modules and isinstance(seed, int):
        sys.modules["torch"].manual_seed((seed + zlib.crc32(item.nodeid.encode())) % 2**32)


pytest_runtest_setup = pytest_runtest_call = pytest.hookimpl(tryfirst=True)(seed_torch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("exhaustive"):  # make test runs none that CI leaves out: CI calls make test
            item.add_marker(pytest.mark.slow)


OF_A_TEST = ("warning filter", "signal SIGALRM")
"""pytest and pytest-timeout have other ones for each test, so larger scopes see them change."""
_told: set[str] = set()
"""What has failed a test of this process already: its module and the session are not to blame."""


def watched(where: str, told: Container[str] = (), without: tuple[str, ...] = ()) -> Iterator[None]:
    """Fails with a line for everything that is not as it was, but for what a smaller scope has told."""
    before = process_state.snapshot()
    yield
    left = leaks.left_behind(before)
    lines = [line for name, line in left.items() if name not in told and not name.startswith(without)]
    _told.update(left)
    if lines:
        pytest.fail(f"{where} left the process changed:\n" + "\n".join(lines), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _session_leaves_no_trace() -> Iterator[None]:
    yield from watched("a fixture of the session", _told, OF_A_TEST)


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_no_trace(_session_leaves_no_trace: None, request: pytest.FixtureRequest) -> Iterator[None]:
    if on_the_real_stack(request.node.path):
        before = process_state.snapshot()
        yield
        _told.update(leaks.differences(before, process_state.snapshot()))
        return
    yield from watched(f"a fixture of {request.node.name}", _told, OF_A_TEST)


@pytest.fixture(autouse=True)
def _test_leaves_no_trace(_module_leaves_no_trace: None, request: pytest.FixtureRequest) -> Iterator[None]:
    if on_the_real_stack(request.node.path):
        return (yield)
    yield from watched("the test")


@pytest.fixture(autouse=True)
def _hook_and_threads(_test_leaves_no_trace: None) -> Iterator[None]:
    """Put back what every command of Keel's sets for the process that it has for itself: typer's hook, torch's threads."""
    hook = sys.excepthook
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    sys.excepthook = hook
    if threads is not None:
        sys.modules["torch"].set_num_threads(threads)


def on_the_real_stack(path: Path) -> bool:
    """Ray, vLLM and DeepSpeed change a process by design: their modules are not judged but put back, once each."""
    return path.parent.name in ("integration", "chaos")


@pytest.fixture
def restored_process() -> Iterator[None]:
    """For a test of what changes its process because it has it for itself, as a command has: all is put back."""
    before = process_state.snapshot()
    yield
    process_state.restore(before)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Importing a test file changes nothing either: what other files see would depend on which are collected."""
    if not isinstance(collector, pytest.Module):
        return (yield)
    before = process_state.snapshot()
    report = yield
    left = leaks.left_behind_by_import(before, collector.path)
    if left and report.outcome == "passed":
        report.outcome = "failed"
        report.longrepr = f"importing {collector.name} left the process changed:\n" + "\n".join(left.values())
    return report
