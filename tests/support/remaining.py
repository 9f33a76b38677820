"""How much of the tests is left, in a line now and then: tests done, tests that failed, about how many minutes more."""

import re
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

EVERY_SECONDS = 30.0
FIRST_SHARE = 0.05
LONG_SECONDS = 120.0
UNIT_SECONDS = 0.15
"""What a test takes that has no line below, on one of two cores."""
SECONDS = {
    "chaos/": 400.0,
    "integration/": 30.0,
    "integration/test_dead_nodes": 150.0,
    "integration/test_embedded_ray": 45.0,
    "integration/test_every_objective": 2.5,
    "integration/test_jobs": 120.0,
    "integration/test_learning": 8.0,
    "integration/test_objective_runs": 80.0,
    "integration/test_placement": 8.0,
    "integration/test_pool": 5.0,
    "integration/test_predictions": 150.0,
    "integration/test_prometheus": 20.0,
    "integration/test_recovery": 90.0,
    "integration/test_report_in_browser": 3.0,
    "integration/test_resharding": 4.0,
    "integration/test_runs": 80.0,
    "integration/test_same_curve": 150.0,
    "integration/test_stage_folders": 8.0,
    "integration/test_stage_runs": 60.0,
    "integration/test_stages_match": 40.0,
    "integration/test_starved": 150.0,
    "integration/test_sweep_runs": 200.0,
    "integration/test_tldr_chain": 60.0,
    "integration/test_two_runs": 200.0,
    "integration/test_weight_sync": 5.0,
}
"""About what a test of a folder or a file takes. A few tests of the real stack take longer than a thousand others: by
their number alone they would promise hours. Only how they compare matters; `pytest --durations=0` measures."""
PATTERN = re.compile("|".join(re.escape(name) for name in sorted(SECONDS, key=len, reverse=True)))


def cost(test: str) -> float:
    """Seconds that a test takes, by its name; its file before its folder."""
    known = PATTERN.search(test)
    return SECONDS[known[0]] if known else UNIT_SECONDS


class LongFilesFirst:
    """Files of many minutes begin first, or one process ends with such a file while the other has nothing left.

    Nothing else is put in order: among files of about the same time, and in each, the order is as it was.
    """

    @pytest.hookimpl(trylast=True)  # of the tests that were chosen
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        seconds: Counter[Path] = Counter()
        for item in items:
            seconds[item.path] += cost(item.nodeid)
        items.sort(key=lambda item: -(seconds[item.path] // LONG_SECONDS))


class Remaining:
    """In the process that prints: of all workers, where there are some."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.left: dict[str, float] = {}
        self.done = self.failed = 0
        self.cost_done = 0.0
        self.start = self.told = time.monotonic()

    def begin(self, tests: Collection[str]) -> None:
        self.left = {test: cost(test) for test in tests}
        self.start = self.told = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.begin([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        if not self.left:  # all workers collect the same
            self.begin(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.done += 1
        self.cost_done += self.left.pop(nodeid, 0.0)
        now = time.monotonic()
        if now - self.told >= EVERY_SECONDS and self.left:
            self.told = now
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter.ensure_newline()
            reporter.write_line(self.line(now - self.start))

    def line(self, seconds: float) -> str:
        """What is done, and what is left at the pace until now."""
        failed = f"{self.failed} failed" if self.failed else "none failed"
        line = f"{self.done} of {self.done + len(self.left)} tests done in {minutes(seconds)}, {failed}"
        cost_left = sum(self.left.values())
        if self.cost_done < FIRST_SHARE * (self.cost_done + cost_left):  # a pace of a few tests says nothing
            return line
        return f"{line}; about {minutes(seconds * cost_left / self.cost_done)} left"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
