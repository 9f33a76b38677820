"""How much of the tests is left, in a line now and then: tests done, tests that failed, about how many minutes more."""

import re
import time
from collections.abc import Collection

import pytest

EVERY_SECONDS = 30.0
FIRST_SHARE = 0.05
UNIT_SECONDS = 0.15
"""What a test takes that has no line below, on one of two cores."""
SECONDS = {
    "integration/": 10.0,
}
"""What a test of a file or a folder takes. A few tests of the real stack take longer than a thousand others: counted
alone they would promise hours. `pytest --durations=0` measures; what has changed a little may stay."""
PATTERN = re.compile("|".join(re.escape(name) for name in sorted(SECONDS, key=len, reverse=True)))


def cost(test: str) -> float:
    """Seconds that a test takes, by its name; its file before its folder."""
    known = PATTERN.search(test)
    return SECONDS[known[0]] if known else UNIT_SECONDS


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
