"""Interchangeable Ray actors behind one: routes calls, keeps deadlines, replaces the lost, grows and shrinks.

    call -> a serving worker's turn -> answer | WorkerLost (and in the background: kill, spawn, load, serve again)

A worker that dies, misses a deadline, breaks the column contract or fails a load is lost. Only a worker that has
started and holds the newest load serves. Calls go on as long as one does; they wait while none does. A worker that
waits for room is no failing worker.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import ObjectLostError, RayTaskError

from keel.cluster.ray_errors import GONE, answer, own_fault, why
from keel.cluster.worker import NoWorkers, Spawn, Worker
from keel.config.workers import DeadlineSettings
from keel.errors import LearnerLost, WorkerLost
from keel.protocols import LoadReceipt, Observer
from keel.schema import ContractError

_BACK_OFF_SECONDS = 30.0


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
        self.deadlines = deadlines
        self._spawn, self._restarts = spawn, restarts
        self._patience_seconds, self._by_ticket = patience_seconds, by_ticket
        self._observer = observer or Observer()
        self._serving: list[Worker] = []  # in the order of their indices
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._retiring: dict[asyncio.Task[None], Worker] = {}
        self._turn = itertools.count()
        self._running = self._in_line = 0
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
        self._coming = {index: task for index, task in self._coming.items() if not task.done()}
        present = {worker.index for worker in self._serving} | set(self._coming)
        for index in sorted(set(range(count)) - present):
            self._bring_up(index)
        for index in [index for index in self._coming if index >= count]:
            self._coming.pop(index).cancel()
        for worker in [worker for worker in self._serving if worker.index >= count]:
            self._serving.remove(worker)
            task = asyncio.create_task(self._retire(worker))
            self._retiring[task] = worker
            task.add_done_callback(self._retiring.pop)
        self._show()

    def stop(self) -> None:
        """End all workers: what comes next needs their memory."""
        for task in [*self._coming.values(), *self._retiring]:
            task.cancel()
        for worker in [*self._serving, *self._retiring.values()]:
            worker.kill()
        self._serving.clear()  # whoever still asks them is told that they are lost, and nobody takes their place

    async def call(self, method: Callable[..., Any], *arguments: Any, deadline: float) -> tuple[Any, Any]:
        """Run a method of the actor class on one worker: (handle to the batch, receipt). Raises WorkerLost."""
        self._count(in_line=1)
        try:
            worker = await self._turn_of_one()
        finally:
            self._count(in_line=-1)
        asking = asyncio.create_task(self._ask(worker, method.__name__, arguments, deadline))
        self._count(running=1)
        asking.add_done_callback(functools.partial(self._asked, worker))
        # whoever asked may be cancelled, the actor works on: it keeps its turn until it has answered
        return await asyncio.shield(asking)

    async def _turn_of_one(self) -> Worker:
        """A worker that serves, whose turn is the caller's."""
        while True:
            await self._someone()
            worker = self._pick()
            worker.waiting += 1
            try:
                await worker.turn.acquire()
            except asyncio.CancelledError:
                worker.waiting -= 1
                raise
            if worker in self._serving:
                return worker
            worker.end_turn()  # lost or retired while this call waited for its turn

    def _asked(self, worker: Worker, asking: asyncio.Task[Any]) -> None:
        worker.end_turn()
        self._count(running=-1)
        if not asking.cancelled():
            asking.exception()  # read, also when whoever asked is gone

    def _count(self, running: int = 0, in_line: int = 0) -> None:
        self._running += running
        self._in_line += in_line
        self._observer.occupied(self.role, self._running, self._in_line, self.serving)

    @property
    def loaded(self) -> Any:
        """The weights, or the handle to them, of the newest load; None before the first."""
        return self._loaded

    def forget_load(self) -> None:
        """Drop the cached weights handle; its object may have died with a node."""
        self._loaded = None

    async def load_weights(self, weights: Any) -> Sequence[LoadReceipt]:
        """Everyone who serves takes over the weights; those who fail are replaced. Receipts of all that serve then.

        Raises LearnerLost when the weights themselves are lost.
        """
        self._loaded = weights
        await asyncio.gather(*(self._load_or_lose(worker) for worker in list(self._serving)))
        await self._someone()
        return [worker.receipt for worker in self._serving if worker.receipt is not None]

    async def _ask(self, worker: Worker, method: str, arguments: Any, deadline: float) -> tuple[Any, Any]:
        def died(reason: str) -> WorkerLost:
            return self._lose(worker, f"died during {method}")

        # lost with the node of the worker that made it; not this worker's fault
        input_lost = WorkerLost(f"the input of {worker.name} for {method} was lost")
        try:
            async with asyncio.timeout(deadline):
                handle, receipt = getattr(worker.handle, method).options(num_returns=2).remote(*arguments)
                return handle, await answer(receipt, worker.name, died, input_lost)
        except ContractError as error:
            raise self._lose(worker, f"gave garbage during {method}: {error}") from error
        except TimeoutError as error:
            raise self._lose(worker, f"{why(error, deadline)} during {method}") from error

    def _pick(self) -> Worker:
        """Round robin in the order of tickets when that must not depend on timing, else the least waited for."""
        if self._by_ticket:
            return self._serving[next(self._turn) % len(self._serving)]
        return min(self._serving, key=lambda worker: worker.waiting)

    async def _someone(self) -> None:
        """Wait until a worker serves. Raises what kept the last ones from coming up."""
        while not self._serving:
            assert self._coming, f"pool of {self.role} was not started"
            coming = [task for task in self._coming.values() if not task.done()]
            if not coming:
                for task in self._coming.values():
                    task.result()
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)

    def _lose(self, worker: Worker, reason: str) -> WorkerLost:
        """Kill a worker and let another take its place; once for every loss."""
        lost = WorkerLost(f"{worker.name} {reason}")
        if worker in self._serving:
            self._serving.remove(worker)
            worker.kill()
            self._tell_lost(worker.name, reason)
            if worker.index < self.count:
                self._bring_up(worker.index)
            self._show()
        return lost

    def _bring_up(self, index: int) -> None:
        task = asyncio.create_task(self._start(index))
        self._coming[index] = task

        def came(done: asyncio.Task[None]) -> None:
            if done.cancelled() or done.exception() is not None:
                return  # one that failed stays: whoever waits reads why
            if self._coming.get(index) is done:
                del self._coming[index]
            ended = [(other, each) for other, each in self._coming.items() if each.done() and not each.cancelled()]
            for other in [other for other, each in ended if each.exception()]:  # not one that came up just now, too
                self._bring_up(other)  # it gave up when nobody served

        task.add_done_callback(came)

    async def _start(self, index: int) -> None:
        """Room, spawn, load, serve; again and again while others serve, `restarts` times when nobody does."""
        began = time.monotonic()
        back_off, alone = 1.0, 0
        while True:
            worker = Worker(index, f"{self.role}-{index}", self._spawn)
            try:
                await worker.settle(lambda: self.serving, self.deadlines.room_seconds, self._observer)
                await self._come_up(worker)
            except (*GONE, ObjectLostError, TimeoutError, RayTaskError) as error:
                worker.kill()
                reason = f"{why(error, self.deadlines.start_seconds)} while starting"
                self._tell_lost(worker.name, reason)
                if not isinstance(error, ObjectLostError):  # of weights: there will be others
                    alone = 0 if self._serving else alone + 1
                hopeless = not self._has_served and own_fault(error)
                if not self._serving and (hopeless or alone > self._restarts):
                    raise NoWorkers(f"no {self.role} serves: {worker.name} {reason}: {error}") from error
                await asyncio.sleep(back_off)
                back_off = min(2 * back_off, _BACK_OFF_SECONDS)
                continue
            except BaseException:  # whatever it is: nobody else ends this actor and gives back its room
                worker.kill()
                raise
            break
        self._serving = sorted([*self._serving, worker], key=lambda each: each.index)
        seconds = round(time.monotonic() - began, 3)
        self._observer.event("worker_started", role=self.role, worker=worker.name, seconds=seconds)
        self._has_served = True
        self._show()

    async def _come_up(self, worker: Worker) -> None:
        async with asyncio.timeout(self.deadlines.start_seconds):
            await worker.handle.__ray_ready__.remote()
        held = None
        while held is not self._loaded:  # there may be newer weights when these are loaded
            held = self._loaded
            await worker.load_weights(held, self.deadlines)

    async def _load_or_lose(self, worker: Worker) -> None:
        try:
            await worker.load_weights(self._loaded, self.deadlines)
        except ObjectLostError as error:
            raise LearnerLost("the weights were lost with their node") from error
        except (*GONE, TimeoutError, RayTaskError) as error:
            self._observer.add({"load_failures_total": {self.role: 1.0}})
            self._lose(worker, f"{why(error, self.deadlines.load_seconds)} during load")

    async def _retire(self, worker: Worker) -> None:
        async with worker.turn:
            worker.kill()

    def _tell_lost(self, worker: str, reason: str) -> None:
        self._observer.add({"workers_lost_total": {self.role: 1.0}})
        self._observer.event("worker_lost", role=self.role, worker=worker, reason=reason)

    def _show(self) -> None:
        numbers = {"workers": {self.role: float(self.serving)}, "workers_desired": {self.role: float(self.count)}}
        self._observer.set(numbers)
        self._count()
