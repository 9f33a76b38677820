"""A run's Ray cluster and its actors, behind the protocols of `protocols.py`.

    driver --prompts--> Pool(generators) --ref--> Pool(reference) --ref--> Pool(scorers) --ref--> buffer actor
      ^ receipts, reports (small)                                                                    | ref
      +------------------------------- RankGroup(learner ranks) <------------------------------+

Every stage method returns (batch, receipt): the driver awaits the small receipt and passes the reference on, so bytes
go actor -> object store -> actor.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.autoscaler.sdk import request_resources
from ray.exceptions import AuthenticationError, ObjectLostError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from keel.cluster import capacity, placement
from keel.cluster.control import reach
from keel.cluster.pool import Pool
from keel.cluster.ray_errors import answer
from keel.cluster.worker import Spawn, remote_method
from keel.config.commands import AnySettings
from keel.config.rewards import needs_relevance
from keel.config.run import Settings
from keel.config.stages import SamplingSpec, ScoringSpec
from keel.config.workers import ClusterSettings
from keel.errors import BufferLost, ConfigError, WorkerLost
from keel.protocols import AddReceipt, Batch, GenerateRequest, Observer, StageReceipt
from keel.rollout.buffer import RolloutBuffer
from keel.rollout.generator import VllmGenerator
from keel.rollout.reference import ReferenceScorer, contrast_prompts
from keel.rollout.scorers import RewardScorer
from keel.text import one_line

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Given = Callable[[pa.RecordBatch], list[list[int]] | None]
_STARTS = 5
_LATE = "node timed out during startup"


def connect(settings: AnySettings) -> str:
    """Join the Ray cluster that cluster.address or RAY_ADDRESS names, or start an embedded one sized for the actors.

    Returns a line for the user that says which. Raises ConfigError for a cluster that cannot be joined.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets anything else on the machine starve the run
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": settings.run.name}
    common |= {} if _was_uploaded() else {"job_config": _search_path()}
    cluster: ClusterSettings = settings.cluster
    if address := cluster.address_to_join:
        named = "cluster.address" if cluster.address else "RAY_ADDRESS"
        try:
            if address != "auto":
                reach(address)
            ray.init(address=address, **common)
        except (OSError, RuntimeError, ValueError, AuthenticationError) as error:  # Ray has no class for it
            reason = f"cannot be joined ({one_line(error)})"
            raise ConfigError(f"{named}={address}: {reason}; expected HOST:PORT of a Ray that runs, or local") from None
        return f"Ray: joined the cluster at {ray.get_runtime_context().gcs_address} ({named}={address})"
    # Actors of a synchronous run take turns, so an embedded Ray promises them more threads than there are cores.
    asked = sum(workers.count * workers.threads for workers in capacity.workers(settings).values())
    cpus = cluster.cpus or max(os.cpu_count() or 1, 2 * asked)
    tries = embedded(num_cpus=cpus, object_store_memory=cluster.object_store_bytes, **common)
    late = f" (it came up at try {tries}: this machine is busy)" if tries > 1 else ""
    return f"Ray: an embedded one on this machine, which promises {cpus} CPUs{late}"


class _Behind(list[str]):
    """Directories that a worker inserts at the front of its path, one by one: the last one ends up first.

    Ray extends this list by the current directory, which would come first of all, in front of installed code.
    """

    def extend(self, paths: Iterable[str]) -> None:
        self[:0] = paths


def _search_path() -> JobConfig:
    """Let workers search for modules where this process does, its current directory last."""
    here = os.path.abspath(os.curdir)
    places = [place for place in sys.path if os.path.isabs(place) and place != here]
    return JobConfig(_py_driver_sys_path=_Behind(reversed(places)))


def _was_uploaded() -> bool:
    """Whether this is a Ray job with an uploaded folder (`keel submit`), which its workers have on their path anyway.

    No module in it has an installed namesake.
    """
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return bool((job.get("runtime_env") or {}).get("working_dir"))


def embedded(**options: Any) -> int:
    """Start an embedded Ray without a dashboard; the number of tries it took."""
    return tried(lambda: ray.init(address="local", include_dashboard=False, **options))


def tried(start: Callable[[], Any]) -> int:
    """Start a node of Ray, and retry where its agent came up too late; the number of tries it took.

    A raylet gives its agent, a Python program, 15 s to come up, and dies when that is late
    (ray-project/ray#65983), as on a machine that loads several models. Nothing has begun then, so it is tried again;
    what the late try started besides idles until this process ends.
    """
    for number in range(1, _STARTS + 1):
        try:
            start()
            return number
        except Exception as error:  # Ray has no class for it
            if number == _STARTS or _LATE not in str(error):
                raise
    raise AssertionError("unreachable")


def disconnect() -> None:
    ray.shutdown()


@contextlib.contextmanager
def joined(settings: AnySettings, counts: Mapping[str, int], *, degraded: bool = False) -> Iterator[str]:
    """Join or start a cluster for these counts of workers, and leave it at the end; yields the line of `connect`.

    Raises ConfigError where the workers, or if `degraded` one of each role, can never fit. Resources that others
    occupy may become free, and are waited for.
    """
    how = connect(settings)
    try:
        asked = capacity.asks(settings, counts)
        least = capacity.one_of_each(asked) if degraded else asked
        if not settings.cluster.wait_for_nodes and (
            problems := capacity.problems(least, placement.nodes(), placement.limits())
        ):
            raise ConfigError("; ".join(problems))
        yield how
    finally:
        disconnect()


def request(settings: Settings, counts: Mapping[str, int]) -> None:
    """Ask Ray's autoscaler, if there is one, for nodes that hold these counts of workers."""
    request_resources(bundles=[ask.amounts for ask in capacity.asks(settings, counts) for _ in range(ask.count)])


def holds(settings: Settings, counts: Mapping[str, int], *, at_once: bool) -> bool:
    """Whether these counts of workers fit: on what is free now (`at_once`), or on the nodes if they were empty."""
    return capacity.packs(capacity.asks(settings, counts), placement.free_nodes() if at_once else placement.nodes())


async def fetch(batch: Batch) -> pa.RecordBatch:
    """Bring a batch into this process. Raises WorkerLost when it was lost with its node."""
    try:
        return await batch
    except ObjectLostError as error:
        raise WorkerLost("a batch was lost with its node") from error


class GeneratorPool(Pool):
    """A Generator over many workers. `given` returns the stored completions of prompts that have some."""

    given: Given | None = None

    async def generate(self, request: GenerateRequest) -> tuple[Batch, StageReceipt]:
        if self.given:
            request = dataclasses.replace(request, given=self.given(request.prompts))
        return await self.call(self.deadlines.generate_seconds, VllmGenerator.generate, request)


class ReferencePool(Pool):
    """A Scorer over many workers: log-probs under the frozen policy."""

    async def score(self, batch: Batch) -> tuple[Batch, StageReceipt]:
        return await self.call(self.deadlines.score_seconds, ReferenceScorer.score, batch)


class ScorerPool(Pool):
    """A Scorer over many workers: rewards and monitors."""

    async def score(self, batch: Batch) -> tuple[Batch, StageReceipt]:
        return await self.call(self.deadlines.score_seconds, RewardScorer.score, batch)


class RemoteBuffer:
    """The Buffer of a run as one actor, which owns every accepted row. Every method raises BufferLost.

    On the driver's machine: both write into the run directory.
    """

    def __init__(self, settings: Settings, directory: str, groups_per_batch: int, state: Mapping[str, int]) -> None:
        self.groups_per_batch = groups_per_batch
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor = ray.remote(num_cpus=0, scheduling_strategy=here)(RolloutBuffer).remote(
            directory,
            groups_per_step=settings.buffer.groups_per_step,
            groups_per_batch=groups_per_batch,
            max_staleness=settings.buffer.max_staleness,
            min_samples=settings.objective.min_samples,
            refills=settings.buffer.dynamic_sampling_refills,
            **state,
        )

    async def admit(self) -> list[int]:
        return await self._call(RolloutBuffer.admit)

    async def add(self, tickets: list[int], batch: Batch) -> AddReceipt:
        return await self._answer(
            remote_method(self.actor, RolloutBuffer.add).remote(tickets, batch), f"the rows of tickets {tickets}"
        )

    async def drop(self, tickets: list[int], reason: str) -> None:
        await self._call(RolloutBuffer.drop, tickets, reason)

    async def take(self, groups: int) -> tuple[Batch, Mapping[str, Any]]:
        take = remote_method(self.actor, RolloutBuffer.take).options(num_returns=2)
        handle, numbers = take.remote(groups)
        return handle, await self._answer(numbers)

    async def advance(self, version: int) -> None:
        await self._call(RolloutBuffer.advance, version)

    async def resize(self, groups_per_batch: int) -> None:
        await self._call(RolloutBuffer.resize, groups_per_batch)
        self.groups_per_batch = groups_per_batch

    async def waiting(self) -> str:
        return await self._call(RolloutBuffer.waiting)

    async def restored(self) -> dict[str, Any]:
        return await self._call(RolloutBuffer.restored)

    async def state(self) -> dict[str, int]:
        return await self._call(RolloutBuffer.state)

    async def forget(self, before_ticket: int) -> None:
        await self._call(RolloutBuffer.forget, before_ticket)

    def stop(self) -> None:
        ray.kill(self.actor, no_restart=True)

    async def _call(
        self,
        method: Callable[Concatenate[RolloutBuffer, Arguments], Awaitable[Result]],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        return await self._answer(remote_method(self.actor, method).remote(*arguments, **options))

    async def _answer(self, reference: Awaitable[Result], rows: str = "the rows") -> Result:
        input_lost = WorkerLost(f"{rows} were lost with their node")

        def lost(reason: str) -> BufferLost:
            return BufferLost(f"the buffer actor died ({reason})")

        return await answer(reference, "the buffer", lost, input_lost)


def generators(
    settings: Settings | SamplingSpec, folder: str, given: Given | None = None, observer: Observer | None = None
) -> GeneratorPool:
    tokens = settings.max_model_tokens + (given is not None)  # reading a completion asks for one token more
    workers, options = settings.generators, settings.policy.chat_template_options
    spawn = Spawn(VllmGenerator, workers, lambda index: (folder, workers, tokens, f"generator-{index}", options))
    pool = GeneratorPool("generator", spawn, workers.count, **_options(settings, observer))
    pool.given = given
    return pool


def reference(
    settings: Settings | ScoringSpec,
    folder: str,
    observer: Observer | None = None,
    others: Sequence[list[int]] = (),
) -> ReferencePool:
    """The pool of the frozen reference policy; `others` are the prompts that relevance is measured against."""
    workers, temperature = settings.reference, settings.sampling.temperature
    assert workers is not None
    spawn = Spawn(ReferenceScorer, workers, lambda index: (folder, workers, temperature, f"reference-{index}", others))
    return ReferencePool("reference", spawn, workers.count, **_options(settings, observer))


def scorers(
    settings: Settings | ScoringSpec,
    reference_folder: str | None,
    prompts: pa.RecordBatch,
    observer: Observer | None = None,
) -> list[ReferencePool | ScorerPool]:
    """The pools that score, in order. The reference policy comes first: rewards may read its log-probs.

    `prompts`: rows of which relevance takes the prompts that it compares with.
    """
    pools: list[ReferencePool | ScorerPool] = []
    if settings.reference and reference_folder:
        others = contrast_prompts(prompts) if needs_relevance(settings.rewards) else []
        pools.append(reference(settings, reference_folder, observer, others))
    workers, seconds = settings.scorers, settings.deadlines.score_seconds
    rewards = (settings.rewards, settings.ensemble, workers)
    spawn = Spawn(RewardScorer, workers, lambda index: (*rewards, f"scorer-{index}", seconds))
    return [*pools, ScorerPool("scorer", spawn, workers.count, **_options(settings, observer))]


def _options(settings: Settings | ScoringSpec, observer: Observer | None) -> dict[str, Any]:
    """The arguments that all pools of a run share."""
    failures = settings.failures
    return {
        "deadlines": settings.deadlines,
        "restarts": failures.retries,
        "patience_seconds": failures.degrade_after_seconds,
        "by_ticket": settings.in_ticket_order,
        "observer": observer,
    }
