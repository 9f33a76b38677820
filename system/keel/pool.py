"""Interchangeable Ray actors behind one: routes calls, keeps deadlines, replaces the lost, grows and shrinks.

    call -> a serving worker's turn -> answer | WorkerLost (and in the background: kill, spawn, load, serve again)

A worker that dies, misses a deadline, breaks the column contract or fails a load is lost. Only a worker that has
started and holds the newest load serves. Calls go on as long as one does; they wait while none does.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from keel.actor_settings import DeadlineSettings
from keel.parts import Observer
from keel.protocols import LoadReceipt, WorkerLost
from keel.schema import ContractError

Spawn = Callable[[int], ActorHandle]
GONE = (RayActorError, OutOfMemoryError)
"""What Ray raises for an actor that died or cannot be reached."""


class NoWorkers(RuntimeError):
    """Nobody of a role serves, and those that were started in their place did not come up either."""


@dataclass(eq=False)
class _Worker:
    index: int
    name: str
    handle: ActorHandle
    receipt: LoadReceipt | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One call at a time, so that a deadline begins when the worker does."""
    waiting: int = 0


class Pool:
    """`count` actors of a role, desired; those that serve may be fewer for a while.

    An exception raised by the actor's own code surfaces as it is.
    """

    def __init__(
        self,
        role: str,
        spawn: Spawn,
        count: int,
        deadlines: DeadlineSettings,
        *,
        restarts: int,
        patience_seconds: float,
        by_ticket: bool,
        observer: Observer | None = None,
    ) -> None:
        """`restarts`: attempts to start a worker again before the pool gives up, if nobody else serves."""
        self.role, self.count = role, count
        self._spawn, self._deadlines, self._restarts = spawn, deadlines, restarts
        self._patience_seconds, self._by_ticket = patience_seconds, by_ticket
        self._observer = observer or Observer()
        self._serving: list[_Worker] = []  # in the order of their indices
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._turn = itertools.count()
        self._loaded: Any = None
        self._has_served = False

    @property
    def serving(self) -> int:
        return len(self._serving)

    async def first(self) -> None:
        """One worker serves; no other is asked for meanwhile. Raises NoWorkers."""
        if not self._serving and not self._coming:
            self._bring_up(0)
        await self._someone()

    def give_way(self) -> None:
        """End those who are not up yet, so that room which comes free is not theirs; `ready` brings them up again."""
        for index in list(self._coming):
            self._coming.pop(index).cancel()

    async def ready(self) -> None:
        """All workers serve; or one does, and the others had `patience_seconds` more, once. Raises NoWorkers."""
        first_time = not self._has_served
        self.resize(self.count)
        await self._someone()
        if self._coming and first_time:
            await asyncio.wait(self._coming.values(), timeout=self._patience_seconds)
        if self.serving < self.count:
            self._observer.event("degraded", role=self.role, desired=self.count, actual=self.serving)

    def resize(self, count: int) -> None:
        """Want so many workers from now on: new ones come up in the background, spare ones end after their call."""
        assert count >= 1, count
        self.count = count
        present = {worker.index for worker in self._serving} | set(self._coming)
        for index in sorted(set(range(count)) - present):
            self._bring_up(index)
        for index in [index for index in self._coming if index >= count]:
            self._coming.pop(index).cancel()
        for worker in [worker for worker in self._serving if worker.index >= count]:
            self._serving.remove(worker)
            task = asyncio.create_task(self._retire(worker))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._show()

    def stop(self) -> None:
        """End all workers: what comes next needs their memory."""
        for task in [*self._coming.values(), *self._retiring]:
            task.cancel()
        for worker in self._serving:
            _kill(worker)

    async def call(self, method: str, *arguments: Any, deadline: float) -> tuple[Any, Any]:
        """(handle to the batch, receipt) of one worker's method. Raises WorkerLost."""
        while True:
            await self._someone()
            worker = self._pick()
            worker.waiting += 1
            try:
                async with worker.turn:
                    if worker in self._serving:  # not lost or retired while this call waited for its turn
                        return await self._ask(worker, method, arguments, deadline)
            finally:
                worker.waiting -= 1

    async def load(self, weights: Any) -> Sequence[LoadReceipt]:
        """Everyone who serves takes over the weights; those who fail are replaced. Receipts of all that serve then."""
        self._loaded = weights
        await asyncio.gather(*(self._load_or_lose(worker) for worker in list(self._serving)))
        await self._someone()
        return [worker.receipt for worker in self._serving if worker.receipt is not None]

    async def _ask(self, worker: _Worker, method: str, arguments: Any, deadline: float) -> tuple[Any, Any]:
        try:
            async with asyncio.timeout(deadline):
                handle, receipt = getattr(worker.handle, method).options(num_returns=2).remote(*arguments)
                return handle, await receipt
        except (*GONE, TimeoutError) as error:
            raise self._lose(worker, f"{_why(error, deadline)} during {method}") from error
        except ObjectLostError as error:  # with the node of whoever made it; no fault of this worker
            raise WorkerLost(f"the input of {worker.name} for {method} was lost") from error
        except RayTaskError as error:
            if not isinstance(error.cause, ContractError):
                raise unwrapped(error) from error
            raise self._lose(worker, f"gave garbage during {method}: {error.cause}") from error

    def _pick(self) -> _Worker:
        """Round robin in the order of tickets when that must not depend on timing, else the least waited for."""
        if self._by_ticket:
            return self._serving[next(self._turn) % len(self._serving)]
        return min(self._serving, key=lambda worker: worker.waiting)

    async def _someone(self) -> None:
        """Wait until a worker serves. Raises what kept the last ones from coming up."""
        while not self._serving:
            assert self._coming, f"pool of {self.role} was not started"
            done, _ = await asyncio.wait(self._coming.values(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def _lose(self, worker: _Worker, reason: str) -> WorkerLost:
        """Kill a worker and let another take its place; once for every loss."""
        lost = WorkerLost(f"{worker.name} {reason}")
        if worker in self._serving:
            self._serving.remove(worker)
            _kill(worker)
            self._tell_lost(worker.name, reason)
            if worker.index < self.count:
                self._bring_up(worker.index)
            self._show()
        return lost

    def _bring_up(self, index: int) -> None:
        task = asyncio.create_task(self._start(index))
        self._coming[index] = task

        def came(done: asyncio.Task[None]) -> None:
            if self._coming.get(index) is done and not done.cancelled() and done.exception() is None:
                del self._coming[index]  # one that failed stays: whoever waits reads why

        task.add_done_callback(came)

    async def _start(self, index: int) -> None:
        """Spawn, load, serve; again and again while others serve, `restarts` times when nobody does."""
        began = time.monotonic()
        for attempt in itertools.count():
            worker = _Worker(index, f"{self.role}-{index}", self._spawn(index))
            try:
                await self._come_up(worker)
            except (*GONE, ObjectLostError, TimeoutError, RayTaskError) as error:
                _kill(worker)
                reason = f"{_why(error, self._deadlines.start_seconds)} while starting"
                self._tell_lost(worker.name, reason)
                tried_enough = attempt >= self._restarts or not self._has_served
                if tried_enough and not self._serving:
                    raise NoWorkers(f"no {self.role} serves: {worker.name} {reason}: {error}") from error
                await asyncio.sleep(min(2.0**attempt, 30.0))
                continue
            except asyncio.CancelledError:
                _kill(worker)
                raise
            break
        self._serving = sorted([*self._serving, worker], key=lambda each: each.index)
        seconds = round(time.monotonic() - began, 3)
        self._observer.event("worker_started", role=self.role, worker=worker.name, seconds=seconds)
        self._has_served = True
        self._show()

    async def _come_up(self, worker: _Worker) -> None:
        async with asyncio.timeout(self._deadlines.start_seconds):
            await worker.handle.__ray_ready__.remote()
        held = None
        while held is not self._loaded:  # there may be newer weights when these are loaded
            held = self._loaded
            await self._load(worker, held)

    async def _load(self, worker: _Worker, weights: Any) -> None:
        # a worker that is busy loads after its call
        seconds = self._deadlines.load_seconds + self._deadlines.generate_seconds * worker.turn.locked()
        async with asyncio.timeout(seconds):
            worker.receipt = await worker.handle.load.remote(weights)

    async def _load_or_lose(self, worker: _Worker) -> None:
        try:
            await self._load(worker, self._loaded)
        except (*GONE, ObjectLostError, TimeoutError, RayTaskError) as error:
            self._lose(worker, f"{_why(error, self._deadlines.load_seconds)} during load")

    async def _retire(self, worker: _Worker) -> None:
        async with worker.turn:
            _kill(worker)

    def _tell_lost(self, worker: str, reason: str) -> None:
        self._observer.add({"workers_lost_total": {self.role: 1.0}})
        self._observer.event("worker_lost", role=self.role, worker=worker, reason=reason)

    def _show(self) -> None:
        numbers = {"workers": {self.role: float(self.serving)}, "workers_desired": {self.role: float(self.count)}}
        self._observer.set(numbers)


def unwrapped(error: RayTaskError) -> BaseException:
    """What an actor raised: errors of Keel as they are, which have one line to show; others with Ray's traceback."""
    cause: BaseException = error.cause
    return cause if type(cause).__module__.startswith("keel.") else error


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ValueError):  # Ray was shut down
        ray.kill(worker.handle, no_restart=True)


def _why(error: BaseException, deadline: float) -> str:
    if isinstance(error, TimeoutError):
        return f"did not answer within {deadline:.0f} s"
    if isinstance(error, RayTaskError):
        return f"failed ({type(error.cause).__name__}: {error.cause})"
    return "died"
