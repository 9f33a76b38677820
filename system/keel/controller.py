"""The two loops of a run. Futures are composed here; tokens are never looked at.

    loop       consumes            waits for                       is unblocked by        produces
    rollouts   admitted tickets    buffer.admit (staleness bound)  buffer.advance, drops  one task per generator batch
    one        tickets             a generator, then each scorer   -                      accepted rows, or a drop
    learn      groups of a step    buffer.take                     buffer.add             a version, loaded everywhere

`learn` is the finite clock. Any crash cancels the rest and surfaces with its cause; nothing waits without a deadline.
Only protocols are known here, not Ray, torch or vLLM, so all of it runs in a unit test on in-process fakes.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from keel.protocols import Batch, Buffer, Generator, Learner, Sampling, Scorer, StageReceipt, WorkerLost
from keel.settings import Settings

Result = TypeVar("Result")


class Stalled(RuntimeError):
    """An await passed its deadline: who waited for whom, and how long."""


class TooManyFailures(RuntimeError):
    """More samples failed than `failures.max_failed_ratio` allows."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of. One or many of a kind: the controller cannot tell."""

    generators: Generator
    scorers: Sequence[Scorer]
    buffer: Buffer
    learner: Learner
    prompts: Callable[[list[int]], pa.RecordBatch]
    """Prompt rows of tickets."""
    held_out: pa.RecordBatch
    fetch: Callable[[Batch], Awaitable[pa.RecordBatch]]
    """Bring a batch here: only for evaluations and the start-up test, which are small."""


class Observer:
    """What the controller tells the outside. The default hears nothing."""

    def set(self, values: dict[str, Any]) -> None: ...

    def add(self, values: dict[str, Any]) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, step: int) -> None: ...

    async def evaluated(self, step: int, batch: pa.RecordBatch) -> None: ...

    async def checkpoint(self, step: int) -> None: ...

    async def iteration(self, step: int) -> None:
        """The policy of now becomes the reference."""


class Controller:
    """Runs the loops from `version` to `settings.run.steps`."""

    def __init__(
        self, settings: Settings, parts: Parts, sampling: Sampling, observer: Observer, version: int = 0
    ) -> None:
        self.settings, self.parts, self.sampling, self.observer = settings, parts, sampling, observer
        self.version = version
        rows_per_step = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt
        self._outcomes: deque[bool] = deque(maxlen=rows_per_step)  # of the last samples: failed?
        self._reasons: Counter[str] = Counter()
        self._generated = [0.0, 0.0]  # tokens and busy seconds since the last step

    async def run(self) -> None:
        """All steps. Raises the first error of either loop with its own cause, the other one cancelled."""
        error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                rollouts = tasks.create_task(self._rollouts())
                await self._learn()
                rollouts.cancel()
        except* Exception as group:
            error = _first(group)
        if error is not None:
            raise error

    async def sync(self) -> int:
        """Publish the learner's weights and have every generator prove that it holds them; bytes loaded in all."""
        started = time.monotonic()
        self.observer.doing("weight sync")
        deadline = self.settings.deadlines.load_seconds
        handle, published = await self._within(deadline, self.parts.learner.publish(), "the learner to publish")
        receipts = await self._within(deadline, self.parts.generators.load(handle), "generators to load weights")
        wrong = [r for r in receipts if (r.version, r.digest) != (published.version, published.digest)]
        assert not wrong, (published, wrong)
        for _ in filter(lambda receipt: receipt.replaced, receipts):
            self._lost("generator", "died or failed to load weights")
        self.observer.set({"weight_sync_seconds": time.monotonic() - started, "version": float(published.version)})
        return sum(receipt.num_bytes for receipt in receipts)

    async def evaluate(self, step: int) -> None:
        """Held-out prompts through generators and scorers; the observer stores what comes back."""
        self.observer.doing("evaluation")
        scored, _ = await self._retrying(self.parts.held_out)
        await self.observer.evaluated(step, await self.parts.fetch(scored))
        self.observer.add({"evaluations_total": 1.0})

    async def generate(self, prompts: pa.RecordBatch) -> pa.RecordBatch:
        """Completions of some prompt rows, unscored: for the start-up parity test."""
        deadline = self.settings.deadlines.generate_seconds
        batch, _ = await self._within(deadline, self.parts.generators.generate(prompts, self.sampling), "a generator")
        return await self.parts.fetch(batch)

    async def _rollouts(self) -> None:
        async with asyncio.TaskGroup() as tasks:  # its own: what is under way at the end is cancelled with it
            while True:
                tickets = await self.parts.buffer.admit()
                tasks.create_task(self._one(tickets))

    async def _one(self, tickets: list[int]) -> None:
        """Carry the tickets of one generator batch to the buffer, or drop them when every retry lost its worker."""
        try:
            batch, receipts = await self._retrying(self.parts.prompts(tickets))
        except WorkerLost:
            await self.parts.buffer.drop(tickets, "worker_lost")
            self.observer.add({"groups_dropped_total": {"worker_lost": float(len(tickets))}})
            failed = len(tickets) * self.settings.sampling.samples_per_prompt
            self._reasons["worker_lost"] += failed
            self._watch_failures(failed, accepted=0)
            return
        self._generated[0] += receipts[0].tokens
        self._generated[1] += receipts[0].seconds
        self.observer.add(
            {
                "generate_seconds_total": receipts[0].seconds,
                "score_seconds_total": sum(receipt.seconds for receipt in receipts[1:]),
            }
        )
        deadline = self.settings.deadlines.score_seconds
        added = await self._within(deadline, self.parts.buffer.add(tickets, batch), "the buffer to accept rows")
        self._reasons.update(added.failed)
        self._watch_failures(failed=sum(added.failed.values()), accepted=added.accepted_samples)

    async def _retrying(self, prompts: pa.RecordBatch) -> tuple[Batch, list[StageReceipt]]:
        """Generate and score; again with the same rows and seeds when a worker was lost on the way."""
        for attempt in range(self.settings.failures.retries + 1):
            try:
                return await self._generate_and_score(prompts)
            except WorkerLost as lost:
                self._lost(lost.role, str(lost))
                if attempt == self.settings.failures.retries:
                    raise
                self.observer.add({"retries_total": 1.0})
        raise AssertionError("unreachable")

    async def _generate_and_score(self, prompts: pa.RecordBatch) -> tuple[Batch, list[StageReceipt]]:
        deadlines = self.settings.deadlines
        grace = deadlines.start_seconds + deadlines.load_seconds  # a lost worker is replaced within the same await
        patience = deadlines.generate_seconds + grace
        generated = self.parts.generators.generate(prompts, self.sampling)
        batch, receipt = await self._within(patience, generated, "a generator")
        receipts = [receipt]
        for scorer in self.parts.scorers:
            batch, receipt = await self._within(deadlines.score_seconds + grace, scorer.score(batch), "a scorer")
            receipts.append(receipt)
        return batch, receipts

    async def _learn(self) -> None:
        settings = self.settings
        evaluate_every, checkpoint_every = settings.evaluation.every_steps, settings.checkpoint.every_steps
        if self.version == 0:
            await self.evaluate(0)
        while self.version < settings.run.steps:
            finished = await self._step()
            last = finished or self.version == settings.run.steps
            if last or (evaluate_every and self.version % evaluate_every == 0):
                await self.evaluate(self.version)
            if not last:
                await self._iterate()
                await self.parts.buffer.advance(self.version)
            self.observer.step(self.version)
            if last or (checkpoint_every and self.version % checkpoint_every == 0):
                self.observer.doing("checkpoint")
                deadline = settings.deadlines.step_seconds
                await self._within(deadline, self.observer.checkpoint(self.version), "the learner to save")
            if last:
                return

    async def _iterate(self) -> None:
        """Renew the reference when an iteration ends: before the tickets of the next step open."""
        every = self.settings.reference.iteration_steps if self.settings.reference else None
        if every and self.version % every == 0:
            self.observer.doing("new reference")
            deadline = self.settings.deadlines.load_seconds
            await self._within(deadline, self.observer.iteration(self.version), "the reference to be renewed")

    async def _step(self) -> bool:
        """One version; whether the objective wants no further one."""
        deadlines = self.settings.deadlines
        self.observer.doing("rollouts")
        waited = time.monotonic()
        attempt = deadlines.generate_seconds + deadlines.score_seconds + deadlines.start_seconds
        patience = attempt * (self.settings.failures.retries + 1)
        groups = self.settings.buffer.groups_per_step
        batch, buffered = await self._within(patience, self.parts.buffer.take(groups), "rollouts of a step")
        tokens, busy = self._generated
        self._generated = [0.0, 0.0]
        self.observer.doing("learner step")
        wait_seconds = time.monotonic() - waited
        report = await self._within(deadlines.step_seconds, self.parts.learner.step(batch), "the learner to step")
        assert report.version == self.version + 1, (report.version, self.version)
        self.version = report.version
        num_bytes = await self.sync()
        self.observer.add({name: _unlabelled(values) for name, values in buffered["counts"].items()})
        self.observer.add(
            {
                "steps_total": 1.0,
                "weight_syncs_total": 1.0,
                "weight_sync_bytes_total": float(num_bytes),
                "trained_tokens_total": report.metrics["trained_tokens"],
                "learner_seconds_total": report.metrics["step_seconds"],
                "rollout_bytes_total": buffered["rollout_bytes"],
            }
        )
        self.observer.set(_gauges(report.metrics, buffered))
        self.observer.set({"wait_seconds": wait_seconds, "generate_tokens_per_second": tokens / busy if busy else 0.0})
        self.observer.add(dict(report.counts))
        if report.finished:
            self.observer.event("objective_finished", step=self.version)
        return report.finished

    def _lost(self, role: str, reason: str) -> None:
        self.observer.add({"workers_lost_total": {role: 1.0}})
        self.observer.event("worker_lost", role=role, reason=reason)

    def _watch_failures(self, failed: int, accepted: int) -> None:
        self._outcomes.extend([True] * failed + [False] * accepted)
        ratio = sum(self._outcomes) / max(1, len(self._outcomes))
        if len(self._outcomes) == self._outcomes.maxlen and ratio > self.settings.failures.max_failed_ratio:
            raise TooManyFailures(
                f"{ratio:.0%} of the last {len(self._outcomes)} samples failed, more than"
                f" failures.max_failed_ratio={self.settings.failures.max_failed_ratio}; reasons: {dict(self._reasons)}"
            )

    async def _within(self, seconds: float, awaitable: Awaitable[Result], whom: str) -> Result:
        """Await with a deadline whose passing says who waited for whom."""
        try:
            async with asyncio.timeout(seconds) as limit:
                return await awaitable
        except TimeoutError:
            if not limit.expired():
                raise
            raise Stalled(f"step {self.version + 1}: waited {seconds:.0f} s for {whom}") from None


def _gauges(report: Any, buffered: Any) -> dict[str, Any]:
    """Numbers of the learner and the buffer under their metric names; reward_<name> become one labelled metric."""
    numbers = {**report, **buffered}
    for name in ("trained_tokens", "rollout_bytes", "counts"):
        del numbers[name]
    own = {"reward_std", "reward_kl_term", "reward_entropy_term"}
    components = {name: numbers.pop(name) for name in list(numbers) if name.startswith("reward_") and name not in own}
    return numbers | {"reward_component": {name.removeprefix("reward_"): value for name, value in components.items()}}


def _unlabelled(values: Mapping[str, float]) -> float | Mapping[str, float]:
    """A counter without label travels under the empty one."""
    return values.get("", values)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first plain exception of a group: the cause, without the wrapping."""
    return _first(group.exceptions[0]) if isinstance(group.exceptions[0], BaseExceptionGroup) else group.exceptions[0]
