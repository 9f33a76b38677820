"""A pool of interchangeable Ray actors: routes calls, keeps deadlines, replaces lost workers, grows and shrinks.

    call -> a serving worker's turn -> answer | WorkerLost (and in the background: kill, spawn, load, serve again)

A worker that dies, misses a deadline, breaks the column contract or fails a load is lost. Only a worker that has
started and holds the newest weights serves. Calls are answered as long as one worker serves, and wait while none
does. A worker that waits for resources is not a failing worker. `_lose` says why a worker
is replaced; the reason goes to events.jsonl.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec

import pyarrow as pa
from ray.exceptions import ObjectLostError, RayTaskError

from keel.cluster.ray_errors import GONE, answer, own_fault, why
from keel.cluster.worker import NoWorkers, Spawn, Worker, remote_method
from keel.config.workers import DeadlineSettings
from keel.errors import LearnerLost, WorkerLost
from keel.protocols import Batch, LoadReceipt, Observer, StageReceipt
from keel.schema import ContractError

Arguments = ParamSpec("Arguments")
Stage = Callable[Concatenate[Any, Arguments], tuple[pa.RecordBatch, StageReceipt]]
"""A method of the actor class that answers with a batch and its receipt."""
_BACK_OFF_SECONDS = 30.0


class Pool:
    """`count` wanted actors of one role; fewer may serve for a while.

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
        """`restarts`: attempts to start a worker again before the pool gives up, if no other worker serves."""
        self.role, self.count = role, count
        self.deadlines = deadlines
        self._spawn, self._restarts = spawn, restarts
        self._patience_seconds, self._by_ticket = patience_seconds, by_ticket
        self._observer = observer or Observer()
        self._serving: list[Worker] = []  # in the order of their indices
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._retiring: dict[asyncio.Task[None], Worker] = {}
        self._calls = itertools.count()
        self._running = self._in_line = 0
        self._loaded: Any = None
        self._has_served = False

    @property
    def serving(self) -> int:
        return len(self._serving)

    async def first(self) -> None:
        """Wait until one worker serves; start no other one meanwhile. Raises NoWorkers."""
        if not self._serving and not self._coming:
            self._bring_up(0)
        await self._until_one_serves()

    def give_way(self) -> None:
        """End workers that are not up yet, so that they claim no free resources; `ready` starts them again."""
        for index in list(self._coming):
            self._coming.pop(index).cancel()

    async def ready(self) -> None:
        """Wait until all workers serve, or one does and `patience_seconds` more have passed. Raises NoWorkers."""
        first_time = not self._has_served
        self.resize(self.count)
        await self._until_one_serves()
        if self._coming and first_time:
            await asyncio.wait(self._coming.values(), timeout=self._patience_seconds)
        if self.serving < self.count:
            self._observer.event("degraded", role=self.role, desired=self.count, actual=self.serving)

    def resize(self, count: int) -> None:
        """Set the wanted count: missing workers start in the background, surplus ones end after their call."""
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
        """End all workers to free their memory."""
        for task in [*self._coming.values(), *self._retiring]:
            task.cancel()
        for worker in [*self._serving, *self._retiring.values()]:
            worker.kill()
        self._serving.clear()  # their open calls are lost, and no replacement is started

    async def call(
        self, deadline: float, method: Stage[Arguments], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> tuple[Batch, StageReceipt]:
        """Run a method of the actor class on one worker: (handle to the batch, receipt). Raises WorkerLost."""
        self._count(in_line=1)
        try:
            worker = await self._slot()
        finally:
            self._count(in_line=-1)
        asking = asyncio.create_task(self._ask(worker, deadline, method, *arguments, **options))
        self._count(running=1)
        asking.add_done_callback(functools.partial(self._asked, worker))
        # the caller may be cancelled, the actor works on: it keeps its turn until it has answered
        return await asyncio.shield(asking)

    async def _slot(self) -> Worker:
        """Wait for the turn of a serving worker and return the worker."""
        while True:
            await self._until_one_serves()
            worker = self._pick()
            worker.waiting += 1
            try:
                await worker.slot.acquire()
            except asyncio.CancelledError:
                worker.waiting -= 1
                raise
            if worker in self._serving:
                return worker
            worker.release_slot()  # lost or retired while this call waited for its turn

    def _asked(self, worker: Worker, asking: asyncio.Task[Any]) -> None:
        worker.release_slot()
        self._count(running=-1)
        if not asking.cancelled():
            asking.exception()  # read, also when the caller is gone

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
        """Load weights in every serving worker and replace those that fail; the receipts of all that serve then.

        Raises LearnerLost when the weights themselves are lost.
        """
        self._loaded = weights
        await asyncio.gather(*(self._load_or_lose(worker) for worker in list(self._serving)))
        await self._until_one_serves()
        return [worker.receipt for worker in self._serving if worker.receipt is not None]

    async def _ask(
        self,
        worker: Worker,
        deadline: float,
        method: Stage[Arguments],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> tuple[Batch, StageReceipt]:
        during = f"during {method.__name__}"

        def died(reason: str) -> WorkerLost:
            return self._lose(worker, f"died {during}")

        # lost with the node of the worker that made it; not this worker's fault
        input_lost = WorkerLost(f"the input of {worker.name} for {method.__name__} was lost")
        try:
            async with asyncio.timeout(deadline):
                remote = remote_method(worker.handle, method).options(num_returns=2)
                handle, receipt = remote.remote(*arguments, **options)
                return handle, await answer(receipt, worker.name, died, input_lost)
        except ContractError as error:
            raise self._lose(worker, f"gave garbage {during}: {error}") from error
        except TimeoutError as error:
            raise self._lose(worker, f"{why(error, deadline)} {during}") from error

    def _pick(self) -> Worker:
        """Choose by round robin where the choice must not depend on timing, else the worker with the shortest line."""
        if self._by_ticket:
            return self._serving[next(self._calls) % len(self._serving)]
        return min(self._serving, key=lambda worker: worker.waiting)

    async def _until_one_serves(self) -> None:
        """Wait until a worker serves. Raises what kept the last ones from starting."""
        while not self._serving:
            assert self._coming, f"pool of {self.role} was not started"
            coming = [task for task in self._coming.values() if not task.done()]
            if not coming:
                for task in self._coming.values():
                    task.result()
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)

    def _lose(self, worker: Worker, reason: str) -> WorkerLost:
        """Kill a worker and start its replacement, once for each loss."""
        lost = WorkerLost(f"{worker.name} {reason}")
        if worker in self._serving:
            self._serving.remove(worker)
            worker.kill()
            self._report_lost(worker.name, reason)
            if worker.index < self.count:
                self._bring_up(worker.index)
            self._show()
        return lost

    def _bring_up(self, index: int) -> None:
        task = asyncio.create_task(self._start(index))
        self._coming[index] = task

        def started(done: asyncio.Task[None]) -> None:
            if done.cancelled() or done.exception() is not None:
                return  # a failed one stays, so that a waiting call reads why
            if self._coming.get(index) is done:
                del self._coming[index]
            ended = [(other, start) for other, start in self._coming.items() if start.done() and not start.cancelled()]
            for other in [other for other, start in ended if start.exception()]:  # not one that came up just now, too
                self._bring_up(other)  # it gave up while no worker served

        task.add_done_callback(started)

    async def _start(self, index: int) -> None:
        """Start a worker and load its weights. Retries for ever while others serve, else `restarts` times."""
        began = time.monotonic()
        back_off, alone = 1.0, 0
        while True:
            worker = Worker(index, f"{self.role}-{index}", self._spawn)
            try:
                await worker.start(lambda: self.serving, self.deadlines.placement_seconds, self._observer)
                await self._come_up(worker)
            except (*GONE, ObjectLostError, TimeoutError, RayTaskError) as error:
                worker.kill()
                reason = f"{why(error, self.deadlines.start_seconds)} while starting"
                self._report_lost(worker.name, reason)
                if not isinstance(error, ObjectLostError):  # of weights: there will be others
                    alone = 0 if self._serving else alone + 1
                hopeless = not self._has_served and own_fault(error)
                if not self._serving and (hopeless or alone > self._restarts):
                    raise NoWorkers(f"no {self.role} serves: {worker.name} {reason}: {error}") from error
                await asyncio.sleep(back_off)
                back_off = min(2 * back_off, _BACK_OFF_SECONDS)
                continue
            except BaseException:  # nothing else ends this actor and releases its placement group
                worker.kill()
                raise
            break
        self._serving = sorted([*self._serving, worker], key=lambda serving: serving.index)
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
        async with worker.slot:
            worker.kill()

    def _report_lost(self, worker: str, reason: str) -> None:
        self._observer.add({"workers_lost_total": {self.role: 1.0}})
        self._observer.event("worker_lost", role=self.role, worker=worker, reason=reason)

    def _show(self) -> None:
        numbers = {"workers": {self.role: float(self.serving)}, "workers_desired": {self.role: float(self.count)}}
        self._observer.set(numbers)
        self._count()
