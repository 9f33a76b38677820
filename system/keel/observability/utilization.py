"""Counts the busy and idle seconds of workers by role, and what the idle ones wait for, while they pass.

    pools     occupied(role, running, waiting, serving)   at every change
    learner   doing(phase)                                 the learn loop's phases

`keel explain`, the live table, metrics.jsonl and Prometheus all show these numbers.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STAGES = ("generator", "reference", "scorer")
"""In the order in which a batch passes through them."""
LEARNER = "learner"
WAITING, STEPPING = "rollouts", "learner_step"
"""Phases of the learn loop: in the first the learner waits for a stage, in the second it works."""


@dataclass
class _Role:
    running: int = 0
    waiting: int = 0
    """Batches in line for a worker."""
    serving: int = 0

    @property
    def backlog(self) -> float:
        """Batches at this stage a worker."""
        return (self.running + self.waiting) / max(self.serving, 1)


class Utilization:
    """Integrates the states of all roles over time. `drain` hands out what was counted since the last one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._then = clock()
        self._roles: dict[str, _Role] = {}
        self._ranks = 0
        self._phase = "start"
        self._counted: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def occupied(self, role: str, running: int, waiting: int, serving: int) -> None:
        """Note how many workers of a role run, how many batches wait for one, and how many workers serve."""
        self._pass()
        self._roles[role] = _Role(running, waiting, serving)

    def ranks(self, count: int) -> None:
        """Set the number of the learner's ranks, which work together."""
        self._pass()
        self._ranks = count

    def doing(self, phase: str) -> None:
        """The learn loop enters a phase."""
        self._pass()
        self._phase = phase

    def drain(self) -> dict[str, dict[str, float]]:
        """Increments of busy, idle, queue and phase seconds, as counters of the metric table take them."""
        self._pass()
        counted = {name: dict(values) for name, values in self._counted.items()}
        self._counted.clear()
        return counted

    @property
    def starting(self) -> bool:
        """Whether the run has not begun to work."""
        return self._phase == "start"

    def _pass(self) -> None:
        now = self._clock()
        seconds, self._then = now - self._then, now
        self._count("phase", self._phase, seconds)
        for name, role in self._roles.items():
            self._count("busy", name, seconds * role.running)
            self._count("queue", name, seconds * role.waiting)
            idle = max(role.serving - role.running, 0)
            if idle:
                self._count("idle", f"{name}/{self._awaited(name)}", seconds * idle)
        if self._ranks:
            on = None if self._phase == STEPPING else self._awaited(LEARNER)
            where = ("idle", f"{LEARNER}/{on}") if on else ("busy", LEARNER)
            self._count(*where, seconds * self._ranks)

    def _count(self, what: str, label: str, seconds: float) -> None:
        if seconds:
            self._counted[f"{what}_seconds_total"][label] += seconds

    def _awaited(self, role: str) -> str:
        """Name what an idle role waits for: the stage before it with the longest queue, else the learn loop's phase.

        While the learner waits too, it is the stage with the longest queue of all. `driver`: no stage has a batch.
        """
        before = STAGES[: STAGES.index(role)] if role in STAGES else STAGES
        if (role != LEARNER or self._phase == WAITING) and (fullest := self._fullest(before)):
            return fullest
        if self._phase != WAITING:
            return LEARNER if self._phase == STEPPING else self._phase
        return self._fullest([stage for stage in STAGES if stage != role]) or "driver"

    def _fullest(self, stages: Sequence[str]) -> str | None:
        """The stage with the most batches a worker; of equals the one nearest to the learner."""
        backlogs = [
            (self._roles[name].backlog, place, name) for place, name in enumerate(stages) if name in self._roles
        ]
        backlog, _, name = max(backlogs, default=(0.0, 0, ""))
        return name if backlog else None
