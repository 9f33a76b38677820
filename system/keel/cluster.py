"""Ray, with gang.py the only file that knows it: actors behind the protocols of `protocols.py`.

    driver --prompts--> Pool(generators) --ref--> Pool(reference) --ref--> Pool(scorers) --ref--> buffer actor
      ^ receipts, reports (small)                                                                    | ref
      +------------------------------- Gang(learner ranks), gang.py <-------------------------------+

Every stage method returns (batch, receipt): the driver awaits the small receipt and passes the reference on, so bytes
go actor -> object store -> actor.
"""

import asyncio
import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from keel.actor_settings import ClusterSettings, WorkerSettings
from keel.buffer import RolloutBuffer
from keel.generate import VllmGenerator
from keel.protocols import AddReceipt, Batch, LoadReceipt, Sampling, StageReceipt, WorkerLost
from keel.score import ReferenceScorer, RewardScorer
from keel.settings import Settings

Spawn = Callable[[int], ActorHandle]
Given = Callable[[pa.RecordBatch], list[list[int]] | None]


def connect(settings: Settings) -> None:
    """Join the Ray cluster at cluster.address, or start an embedded one sized for the configured actors."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": settings.run.name}
    cluster: ClusterSettings = settings.cluster
    if cluster.address:
        ray.init(address=cluster.address, **common)
        return
    # Actors of a synchronous run take turns, so an embedded Ray promises them more threads than there are cores.
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, sum(w.count * w.threads for w in _workers(settings)) + 1),
        include_dashboard=False,
        object_store_memory=cluster.object_store_bytes,
        **common,
    )


def disconnect() -> None:
    ray.shutdown()


async def fetch(batch: Batch) -> pa.RecordBatch:
    """Bring it here."""
    return await batch


def _workers(settings: Settings) -> list[WorkerSettings]:
    own = [settings.generators, settings.scorers, settings.learners]
    return own + ([settings.reference] if settings.reference else [])


def _spawner(actor_class: type, workers: WorkerSettings, arguments: Callable[[int], tuple[Any, ...]]) -> Spawn:
    """Ray sets OMP_NUM_THREADS to an actor's CPU request, so threads and CPUs are one number."""
    remote = ray.remote(num_cpus=workers.threads, num_gpus=workers.gpus)(actor_class)
    return lambda index: remote.remote(*arguments(index))


class Pool:
    """Interchangeable actors behind one: routes, deadlines, replacement of lost workers.

    One that dies, misses a deadline or fails a load is killed and replaced, the newest load is repeated on its
    replacement, and the caller sees WorkerLost. An exception raised by the actor's own code surfaces as it is.
    """

    def __init__(self, role: str, spawn: Spawn, count: int, start_seconds: float, by_ticket: bool) -> None:
        self.role = role
        self._spawn = spawn
        self._start_seconds = start_seconds
        self._by_ticket = by_ticket
        self._workers = [spawn(index) for index in range(count)]
        self._busy = [0] * count
        self._turn = itertools.count()
        self._loaded: Any = None

    async def ready(self) -> None:
        """All constructors are done. Raises their error, or WorkerLost."""
        await asyncio.gather(*(self._started(worker) for worker in self._workers))

    @property
    def count(self) -> int:
        return len(self._workers)

    def stop(self) -> None:
        """End all workers: what comes next needs their memory."""
        for worker in self._workers:
            ray.kill(worker, no_restart=True)

    async def _started(self, worker: ActorHandle) -> None:
        try:
            async with asyncio.timeout(self._start_seconds):
                await worker.__ray_ready__.remote()
        except TimeoutError:
            raise WorkerLost(self.role, f"{self.role} did not start within {self._start_seconds:.0f} s") from None

    async def call(self, method: str, *arguments: Any, deadline: float) -> tuple[Any, Any]:
        """(handle to the batch, receipt) of one worker's method."""
        index = self._pick()
        worker = self._workers[index]
        self._busy[index] += 1
        try:
            handle, receipt = getattr(worker, method).options(num_returns=2).remote(*arguments)
            async with asyncio.timeout(deadline):
                return handle, await receipt
        except (RayActorError, TimeoutError) as error:
            reason = "died" if isinstance(error, RayActorError) else f"did not answer within {deadline:.0f} s"
            await self._replace(index, worker)
            raise WorkerLost(self.role, f"{self.role}-{index} {reason} during {method}") from error
        finally:
            self._busy[index] -= 1

    def _pick(self) -> int:
        """Round robin in the order of tickets when that must not depend on timing, else the least loaded."""
        if self._by_ticket:
            return next(self._turn) % len(self._workers)
        return min(range(len(self._workers)), key=self._busy.__getitem__)

    async def load(self, weights: Any) -> list[LoadReceipt]:
        """All workers take over the weights; one that fails is replaced and must succeed then."""
        self._loaded = weights
        return list(await asyncio.gather(*(self._load(index) for index in range(len(self._workers)))))

    async def _load(self, index: int) -> LoadReceipt:
        worker = self._workers[index]
        try:
            return await worker.load.remote(self._loaded)
        except (RayActorError, RayTaskError):
            await self._replace(index, worker)
            return dataclasses.replace(await self._workers[index].load.remote(self._loaded), replaced=True)

    async def _replace(self, index: int, lost: ActorHandle) -> None:
        """Kill a worker and put a new one in its place, holding the newest weights; once for every loss."""
        if self._workers[index] is not lost:
            return
        ray.kill(lost, no_restart=True)
        self._workers[index] = self._spawn(index)
        await self._started(self._workers[index])
        if self._loaded is not None:
            await self._workers[index].load.remote(self._loaded)


class GeneratorPool:
    """A Generator made of many. `given` knows the completions of prompts that come with theirs."""

    def __init__(self, pool: Pool, deadline: float, given: Given | None) -> None:
        self.pool, self.deadline, self.given = pool, deadline, given

    async def generate(self, prompts: Batch, sampling: Sampling) -> tuple[Batch, StageReceipt]:
        given = self.given(prompts) if self.given else None
        return await self.pool.call("generate", prompts, sampling, given, deadline=self.deadline)

    async def load(self, weights: Any) -> Sequence[LoadReceipt]:
        return await self.pool.load(weights)


class ScorerPool:
    """A Scorer made of many."""

    def __init__(self, pool: Pool, deadline: float) -> None:
        self.pool, self.deadline = pool, deadline

    async def score(self, batch: Batch) -> tuple[Batch, StageReceipt]:
        return await self.pool.call("score", batch, deadline=self.deadline)


class RemoteBuffer:
    """The Buffer of a run as one actor, which owns every accepted row."""

    def __init__(self, settings: Settings, directory: str, state: Mapping[str, int]) -> None:
        self.actor = ray.remote(num_cpus=0)(RolloutBuffer).remote(
            directory,
            groups_per_step=settings.buffer.groups_per_step,
            groups_per_batch=settings.groups_per_batch,
            max_staleness=settings.buffer.max_staleness,
            min_samples=settings.objective.min_samples,
            refills=settings.buffer.dynamic_sampling_refills,
            **state,
        )

    async def admit(self) -> list[int]:
        return await self.actor.admit.remote()

    async def add(self, tickets: list[int], batch: Batch) -> AddReceipt:
        return await self.actor.add.remote(tickets, batch)

    async def drop(self, tickets: list[int], reason: str) -> None:
        await self.actor.drop.remote(tickets, reason)

    async def take(self, groups: int) -> tuple[Batch, Mapping[str, Any]]:
        handle, numbers = self.actor.take.options(num_returns=2).remote(groups)
        return handle, await numbers

    async def advance(self, version: int) -> None:
        await self.actor.advance.remote(version)

    async def state(self) -> dict[str, int]:
        return await self.actor.state.remote()

    async def forget(self, before_ticket: int) -> None:
        await self.actor.forget.remote(before_ticket)


def generators(settings: Settings, folder: str, given: Given | None = None) -> GeneratorPool:
    tokens = settings.max_model_tokens + (given is not None)  # reading a completion asks for one token more
    spawn = _spawner(
        VllmGenerator,
        settings.generators,
        lambda index: (folder, settings.generators, tokens, f"generator-{index}"),
    )
    return GeneratorPool(
        _pool("generator", spawn, settings.generators.count, settings), settings.deadlines.generate_seconds, given
    )


def reference(settings: Settings, folder: str) -> ScorerPool:
    """The frozen reference policy."""
    by, temperature = settings.reference, settings.sampling.temperature
    assert by is not None
    spawn = _spawner(ReferenceScorer, by, lambda index: (folder, by, temperature, f"reference-{index}"))
    return ScorerPool(_pool("reference", spawn, by.count, settings), settings.deadlines.score_seconds)


def scorers(settings: Settings, reference_folder: str | None) -> list[ScorerPool]:
    """The reference policy first: rewards may read its log-probs."""
    pools = [reference(settings, reference_folder)] if settings.reference and reference_folder else []
    by = settings.scorers
    spawn = _spawner(
        RewardScorer,
        by,
        lambda index: (
            settings.rewards,
            settings.ensemble,
            settings.scorers.threads,
            f"scorer-{index}",
            settings.scorers.gpus,
        ),
    )
    scorer = _pool("scorer", spawn, settings.scorers.count, settings)
    return [*pools, ScorerPool(scorer, settings.deadlines.score_seconds)]


def _pool(role: str, spawn: Spawn, count: int, settings: Settings) -> Pool:
    return Pool(role, spawn, count, settings.deadlines.start_seconds, by_ticket=settings.buffer.max_staleness == 0)
