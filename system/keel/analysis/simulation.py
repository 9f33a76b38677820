"""A run on a clock that jumps: the controller's two loops, the buffer's admission rule, the pools' choice of a worker.

    admit -> generator -> reference -> scorer -> buffer -> learner -> publish -> load into every generator -> advance

Groups are admitted by the buffer's own `AdmissionWindow`, trained in admission order, and the window moves when the
last generator holds the new weights: as in buffer.py. At max_staleness 0 batches go round robin, else to the least
waited-for worker; a worker does one thing at a time and a busy generator loads after its call: as in pool.py. Seconds
of workers are counted by `Utilization`, the piece of code that counts those of a real run.

Left out: lost workers, failed samples, dropped groups and refills, new references, start-up.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from operator import attrgetter
from typing import Protocol

from keel.analysis.virtual_time import Clock, Event, Process, VirtualLock
from keel.observability.utilization import STAGES, WAITING, Utilization
from keel.rollout.admission import AdmissionWindow

Counted = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a run, as far as they decide which role waits for which."""

    workers: Mapping[str, int]
    """Workers by role: generator, scorer and, where there is one, reference."""
    ranks: int
    groups_per_step: int
    groups_per_batch: int
    max_staleness: int
    steps: int
    evaluate_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    checkpoint_every: int = 0
    threads: Mapping[str, float] = field(default_factory=dict)
    """Cores that one worker (learner: one rank) of a role computes on."""
    cpu_ratios: Mapping[str, float] = field(default_factory=dict)
    """Share of a worker's seconds in which it computes, not waits; without an entry all of them."""
    cores: float | None = None
    """Cores that all workers share; None: each has its own."""


class Durations(Protocol):
    """Seconds of everything, on cores of its own. Functions of what is done, not of when it is asked."""

    def stage(self, role: str, tickets: Sequence[int]) -> float:
        """One batch at one worker of a role; no tickets: the held-out prompts."""

    def step(self, version: int) -> float:
        """The learner's step to this version, all ranks together."""

    def load(self, version: int, worker: int) -> float:
        """One generator takes over weights that were published."""

    def driver(self, what: str) -> float:
        """`add` to, `take` from and `advance` the buffer; `publish` weights; `checkpoint`."""


@dataclass(frozen=True)
class Timeline:
    """The events of a simulated run. Times are seconds since the loops began."""

    admitted: list[tuple[float, tuple[int, ...]]]
    """Tickets that share a generator batch, in the order of admission."""
    accepted: list[tuple[float, tuple[int, ...]]]
    """The same when their rows were in the buffer."""
    recorded: list[float]
    """Time at which each step was done: trained, loaded, evaluated where due."""
    waited: list[float]
    """Seconds the learner waited for the rollouts of each step."""
    staleness: list[Counter[int]]
    """By step: groups by how many versions late they were trained."""
    counted: list[Counted]
    """By step: increments of busy, idle, queue and phase seconds since the step before, as in metrics.jsonl."""

    @property
    def step_seconds(self) -> list[float]:
        return [after - before for before, after in pairwise([0.0, *self.recorded])]


class _Worker:
    def __init__(self, clock: Clock) -> None:
        self.waiting = 0
        self.version = 0
        self.turn, self.actor = VirtualLock(clock), VirtualLock(clock)


class _Pool:
    """The part of pool.Pool that assigns calls to workers."""

    def __init__(self, role: str, clock: Clock, shape: Shape, utilization: Utilization) -> None:
        self.role, self.clock, self.utilization = role, clock, utilization
        self.workers = [_Worker(clock) for _ in range(shape.workers[role])]
        self.threads = shape.threads.get(role, 0.0)
        self.cpu_ratio = shape.cpu_ratios.get(role, 1.0)
        self._by_ticket = shape.max_staleness == 0
        self._turns = self._running = self._in_line = 0

    def call(self, seconds: float, made_by: Callable[[int], None] = lambda version: None) -> Process:
        """Pass one batch through one worker; `made_by` receives the version of the worker's weights."""
        worker = self._pick()
        worker.waiting += 1
        self._count(in_line=1)
        yield from worker.turn.take()
        self._count(in_line=-1, running=1)
        yield from worker.actor.take()
        made_by(worker.version)
        yield self.clock.sleep(seconds * (1 - self.cpu_ratio))
        yield self.clock.compute(seconds * self.cpu_ratio, self.threads)
        worker.actor.give()
        worker.waiting -= 1
        worker.turn.give()
        self._count(running=-1)

    def load(self, version: int, durations: Durations) -> list[Event]:
        """Load the weights in every worker, in a busy one after its call; returns the events of their ends."""
        return [self.clock.spawn(self._load(place, version, durations)) for place in range(len(self.workers))]

    def _load(self, place: int, version: int, durations: Durations) -> Process:
        worker = self.workers[place]
        yield from worker.actor.take()
        yield self.clock.compute(durations.load(version, place), self.threads)
        worker.version = version
        worker.actor.give()

    def _pick(self) -> _Worker:
        if not self._by_ticket:
            return min(self.workers, key=attrgetter("waiting"))
        self._turns += 1
        return self.workers[(self._turns - 1) % len(self.workers)]

    def _count(self, running: int = 0, in_line: int = 0) -> None:
        self._running += running
        self._in_line += in_line
        self.utilization.occupied(self.role, self._running, self._in_line, len(self.workers))


class Simulation:
    """One run from version 0."""

    def __init__(self, shape: Shape, durations: Durations) -> None:
        self.shape, self.durations = shape, durations
        self.clock = Clock(shape.cores)
        self.utilization = Utilization(self.clock)
        self.pools = [_Pool(role, self.clock, shape, self.utilization) for role in STAGES if role in shape.workers]
        self.line = Timeline([], [], [], [], [], [])
        self._learner_threads = shape.ranks * shape.threads.get("learner", 0.0)
        self._window = AdmissionWindow(shape.groups_per_step, shape.groups_per_batch, shape.max_staleness)
        self._version = self._next_ticket = 0
        self._live: deque[int] = deque()
        self._ready: set[int] = set()
        self._made_by: dict[int, int] = {}
        self._opened, self._added = Event(), Event()

    def run(self) -> Timeline:
        self.utilization.ranks(self.shape.ranks)
        for pool in self.pools:
            self.utilization.occupied(pool.role, 0, 0, len(pool.workers))
        learned = self.clock.spawn(self._learn())
        self.clock.spawn(self._rollouts())
        self.clock.run(learned)
        return self.line

    def _tell(self, event: Event) -> Event:
        """Wake the waiting processes; the event of the next time."""
        self.clock.happen(event)
        return Event()

    def _rollouts(self) -> Process:
        while True:
            while not self._window.openings:
                yield self._opened
            size = self._window.admit(len(self._live))
            tickets = range(self._next_ticket, self._next_ticket + size)
            self._next_ticket += size
            self._live.extend(tickets)
            self.line.admitted.append((self.clock.now, tuple(tickets)))
            self.clock.spawn(self._one(tickets))

    def _one(self, tickets: range) -> Process:
        yield from self._generate_and_score(tickets)
        yield self.clock.sleep(self.durations.driver("add"))
        self._ready.update(tickets)
        self.line.accepted.append((self.clock.now, tuple(tickets)))
        self._added = self._tell(self._added)

    def _generate_and_score(self, tickets: range) -> Process:
        def made_by(version: int) -> None:
            self._made_by |= dict.fromkeys(tickets, version)

        for pool in self.pools:
            seconds = self.durations.stage(pool.role, tickets)
            yield from pool.call(seconds, made_by) if pool.role == STAGES[0] else pool.call(seconds)

    def _learn(self) -> Process:
        shape = self.shape
        yield from self._evaluate()
        while self._version < shape.steps:
            yield from self._step()
            last = self._version == shape.steps
            if last or _due(shape.evaluate_every, self._version):
                yield from self._evaluate()
            if not last:
                yield self.clock.sleep(self.durations.driver("advance"))
                self._window.advance()
                self._opened = self._tell(self._opened)
            self.line.recorded.append(self.clock.now)
            self.line.counted.append(self.utilization.drain())
            if last or _due(shape.checkpoint_every, self._version):
                yield from self._driving("checkpoint", "checkpoint")

    def _step(self) -> Process:
        self.utilization.doing(WAITING)
        began, groups = self.clock.now, self.shape.groups_per_step
        while len(self._live) < groups or not all(ticket in self._ready for ticket in islice(self._live, groups)):
            yield self._added
        tickets = [self._live.popleft() for _ in range(groups)]
        self._window.taken += groups
        self._ready.difference_update(tickets)
        self.line.staleness.append(Counter(self._version - self._made_by.pop(ticket) for ticket in tickets))
        yield self.clock.sleep(self.durations.driver("take"))
        self.line.waited.append(self.clock.now - began)
        self.utilization.doing("learner_step")
        yield self.clock.compute(self.durations.step(self._version + 1), self._learner_threads)
        yield from self._driving("weight_sync", "publish")
        yield from self.pools[0].load(self._version + 1, self.durations)
        self._version += 1

    def _driving(self, phase: str, what: str) -> Process:
        """Spend the time of the learner's actors on work beside a step."""
        self.utilization.doing(phase)
        yield self.clock.compute(self.durations.driver(what), self._learner_threads)

    def _evaluate(self) -> Process:
        self.utilization.doing("evaluation")
        yield from self._generate_and_score(range(0))


def _due(every: int, version: int) -> bool:
    return bool(every) and version % every == 0
