"""A clock that jumps from one event to the next, and processes that wait for events. One run, one order: no threads.

    process    a generator that yields the events it waits for, and delegates with `yield from`
    sleep      takes its seconds whatever else happens
    compute    takes threads of `cores` that all computing shares: when more threads are active than there are cores,
               all are slowed down alike (processor sharing)

Computing is kept on a second time line, the work done by each active job since the start: jobs that came in earlier
end earlier on it whatever the rate is, so both time lines are heaps and an event costs O(log events).
"""

import heapq
import itertools
from collections import deque
from collections.abc import Generator
from typing import Any

Process = Generator["Event", None, Any]


class Event:
    """An event that happens once and resumes the processes that wait for it, in order, at the same instant."""

    __slots__ = ("happened", "waiting")

    def __init__(self) -> None:
        self.happened = False
        self.waiting: list[tuple[Process, Event]] = []


class Clock:
    """`cores`: None computes everything at once, as on machines of one worker each."""

    def __init__(self, cores: float | None = None) -> None:
        self.now = 0.0
        self._cores = cores
        self._order = itertools.count()
        self._ready: deque[tuple[Process, Event]] = deque()
        self._sleeping: list[tuple[float, int, Event]] = []
        self._computing: list[tuple[float, int, Event, float]] = []
        self._work = 0.0
        """Seconds every job would have computed that was there from the start."""
        self._threads = 0.0

    def __call__(self) -> float:
        return self.now

    def spawn(self, process: Process) -> Event:
        """Begin a process, after those that resume at this instant; the event of its end."""
        end = Event()
        self._ready.append((process, end))
        return end

    def sleep(self, seconds: float) -> Event:
        event = Event()
        heapq.heappush(self._sleeping, (self.now + seconds, next(self._order), event))
        return event

    def compute(self, seconds: float, threads: float) -> Event:
        """The end of work that would take these seconds on cores that are not shared."""
        if self._cores is None or not threads:
            return self.sleep(seconds)
        event = Event()
        heapq.heappush(self._computing, (self._work + seconds, next(self._order), event, threads))
        self._threads += threads
        return event

    def happen(self, event: Event) -> None:
        event.happened = True
        self._ready.extend(event.waiting)
        event.waiting.clear()

    def run(self, until: Event) -> None:
        """Run until the event happened. Asserts that some process can make it happen."""
        while True:
            while self._ready and not until.happened:
                self._resume(*self._ready.popleft())
            if until.happened:
                return
            self._jump()

    def _resume(self, process: Process, end: Event) -> None:
        for event in process:
            if not event.happened:
                event.waiting.append((process, end))
                return
        self.happen(end)

    def _jump(self) -> None:
        """Jump to the next end of a sleep or of work."""
        assert self._sleeping or self._computing, "deadlock: every process waits for another"
        rate = self._rate()
        wakes = self._sleeping[0][0] if self._sleeping else float("inf")
        done = self.now + (self._computing[0][0] - self._work) / rate if self._computing else float("inf")
        then = min(wakes, done)
        self._work += (then - self.now) * rate
        self.now = then
        if wakes <= done:
            self.happen(heapq.heappop(self._sleeping)[2])
            return
        self._work, _, event, threads = heapq.heappop(self._computing)
        self._threads = self._threads - threads if self._computing else 0.0
        self.happen(event)

    def _rate(self) -> float:
        return 1.0 if self._cores is None or self._threads <= self._cores else self._cores / self._threads


class VirtualLock:
    """A lock with one holder at a time, first come first served, as asyncio.Lock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._held = False
        self._line: deque[Event] = deque()

    def take(self) -> Process:
        if not self._held:
            self._held = True
            return
        event = Event()
        self._line.append(event)
        yield event

    def give(self) -> None:
        """Pass the lock to the next in line, at once."""
        if self._line:
            self._clock.happen(self._line.popleft())
        else:
            self._held = False
