"""The two loops of a run. Only protocols are known here, so both run in a unit test on in-process fakes.

    loop       consumes            waits for                       is unblocked by        produces
    learn      groups of a step    buffer.take                     buffer.add             a version, loaded everywhere
    rollouts   admitted tickets    buffer.admit (staleness bound)  buffer.advance, drops  one task per generator batch
    one batch  tickets             a generator, then each scorer   -                      accepted rows, or a drop

    step of the learn loop   take -> learner.step -> publish and load weights -> evaluate -> ask the guard
                             -> renew the reference -> advance the buffer -> record -> checkpoint

`learn` is the finite loop. Any error cancels the other loop and surfaces with its cause; every await has a deadline.
Futures are composed here; tokens are never looked at.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import pyarrow as pa

from keel.config.run import Settings
from keel.errors import BufferLost, KeelError, LearnerLost, NotFinite, WorkerLost
from keel.observability import metrics
from keel.online import parity
from keel.online.guard import Guard
from keel.online.retries import FailureWatch, retrying
from keel.online.roll_back import RollBack
from keel.protocols import AddReceipt, Batch, Components, GenerateRequest, Observer, Sampling, StageReceipt, StepReport

Result = TypeVar("Result")


class Stalled(KeelError, RuntimeError):
    """An await passed its deadline; the message names what was awaited, and for how long."""


class Controller:
    """Runs the loops from `version` to `settings.run.steps`."""

    def __init__(
        self,
        settings: Settings,
        components: Components,
        sampling: Sampling,
        observer: Observer,
        version: int = 0,
        guard: Guard | None = None,
    ) -> None:
        self.settings, self.components, self.sampling, self.observer = settings, components, sampling, observer
        self.guard = guard or Guard(settings)
        self._new_best = False
        self.version = version
        self._failures = FailureWatch(settings)
        self._generated = [0.0, 0.0]  # tokens and busy seconds since the last step
        self._leaving = False

    async def run(self) -> None:
        """Run all steps. Raises the first error of either loop with its cause, the other loop cancelled."""
        async with one_cause() as tasks:
            rollouts = tasks.create_task(self._rollouts())
            await self._learn()
            rollouts.cancel()

    def leave(self) -> None:
        """End `run` after the step under way, with a checkpoint."""
        self._leaving = True

    # ---- the learn loop

    async def _learn(self) -> None:
        settings, buffer = self.settings, self.components.buffer
        evaluate_every, checkpoint_every = settings.evaluation.every_steps, settings.checkpoint.every_steps
        if self.version == 0:
            await self.evaluate(0)
        while self.version < settings.run.steps:
            finished = await self._step()
            last = finished or self.version == settings.run.steps
            evaluated = last or (evaluate_every > 0 and self.version % evaluate_every == 0)
            if evaluated:
                await self.evaluate(self.version)
            if await self._ask_guard():
                finished = last = True
                if not evaluated:
                    await self.evaluate(self.version)
            if not last:
                await self._renew_reference()
                advancing = buffer.advance(self.version)
                await self._within(settings.deadlines.score_seconds, advancing, "the buffer to advance", BufferLost)
            self.observer.step(self.version)
            due = checkpoint_every > 0 and self.version % checkpoint_every == 0
            if last or self._leaving or due or self._new_best:
                await self._checkpoint(finished)
            self._new_best = False
            if last or self._leaving:
                return

    async def _step(self) -> bool:
        """Make one version and load it everywhere; return whether the objective wants no further one."""
        self.observer.doing("rollouts")
        began = time.monotonic()
        batch, buffered = await self._take()
        tokens, busy = self._generated
        self._generated = [0.0, 0.0]
        self.observer.doing("learner step")
        wait_seconds = time.monotonic() - began
        report = await self._train(batch)
        self.version = report.version
        self.observer.set({"learner_version": float(report.version)})
        self._progress("step")
        num_bytes = await self.sync()
        self.observer.add(
            {name: metrics.unlabeled(values) for name, values in buffered["counts"].items()}
            | {
                "steps_total": 1.0,
                "weight_syncs_total": 1.0,
                "weight_sync_bytes_total": float(num_bytes),
                "trained_tokens_total": report.metrics["trained_tokens"],
                "learner_seconds_total": report.metrics["step_seconds"],
                "rollout_bytes_total": buffered["rollout_bytes"],
            }
        )
        self.observer.set(metrics.gauges_of_step(report.metrics, buffered))
        self.observer.set({"wait_seconds": wait_seconds, "generate_tokens_per_second": tokens / busy if busy else 0.0})
        self.observer.add(dict(report.counts))
        if self.guard.moves:
            self.observer.set({f"guard_{name}_multiplier": value for name, value in self.guard.multipliers.items()})
        self.guard.stepped(report.metrics)
        if report.finished:
            self.observer.event("objective_finished", step=self.version)
        return report.finished

    async def _take(self) -> tuple[Batch, Mapping[str, Any]]:
        """Take the rows of the next step from the buffer. Raises Stalled, which names the missing tickets."""
        deadlines, buffer = self.settings.deadlines, self.components.buffer
        attempt = deadlines.generate_seconds + deadlines.score_seconds * (len(self.components.scorers) + 1)
        patience = attempt * (self.settings.failures.retries + 1) + self._replacement_seconds
        taking = buffer.take(self.settings.buffer.groups_per_step)
        try:
            batch, buffered = await self._within(patience, taking, "rollouts of a step")
        except Stalled as stalled:
            missing = await self._within(deadlines.score_seconds, buffer.waiting(), "the buffer to answer", BufferLost)
            raise Stalled(f"{stalled}; {missing}") from None
        self._progress("take")
        return batch, buffered

    async def _train(self, batch: Batch) -> StepReport:
        """Run one learner step; keep rows that it refuses, or that fail the parity bound, in quarantine."""
        stepping = self.components.learner.step(batch)
        try:
            report = await self._within(
                self.settings.deadlines.step_seconds, stepping, "the learner to step", LearnerLost
            )
        except NotFinite as error:
            await self._quarantine(self.version + 1, batch, str(error))
            raise
        if problem := parity.judge_step(report.version, report.metrics, self.settings, self.observer):
            await self._quarantine(report.version, batch, problem)
            raise parity.ParityError(problem)
        assert report.version == self.version + 1, (report.version, self.version)
        return report

    async def _quarantine(self, step: int, batch: Batch, reason: str) -> None:
        keeping = self.observer.quarantine(step, batch, reason, self.guard.multipliers)
        await self._within(self._replacement_seconds, keeping, "quarantine")

    async def sync(self) -> int:
        """Move the learner's weights to every generator, each of which proves them; the bytes loaded in all.

        Both ends begin together; the deadline of the generators starts when the learner has published.
        """
        started = time.monotonic()
        self.observer.doing("weight sync")
        deadline = self.settings.deadlines.load_seconds
        patience = deadline + self._replacement_seconds + self.settings.deadlines.generate_seconds
        publish, load = self.components.transport.begin(self.components.learner, self.components.generators)
        async with one_cause() as tasks:
            publishing, loading = tasks.create_task(publish), tasks.create_task(load)
            published = await self._within(deadline, publishing, "the learner to publish", LearnerLost)
            self._progress("publish")
            receipts = await self._within(patience, loading, "generators to load weights")
        self._progress("load")
        wrong = [r for r in receipts if (r.version, r.digest) != (published.version, published.digest)]
        assert receipts and not wrong, (published, wrong)
        self.observer.set({"weight_sync_seconds": time.monotonic() - started, "version": float(published.version)})
        return sum(receipt.num_bytes for receipt in receipts)

    async def evaluate(self, step: int) -> None:
        """Send the held-out prompts through generators and scorers; the observer stores the rows."""
        self.observer.doing("evaluation")

        async def once() -> pa.RecordBatch:
            scored, _ = await self._generate_and_score(self.components.held_out)
            fetching = self.components.fetch(scored)
            return await self._within(self._replacement_seconds, fetching, "evaluated rows to arrive")

        rows = await retrying(once, self.settings.failures.retries, self.observer)
        await self.observer.evaluated(step, rows)
        self.observer.add({"evaluations_total": 1.0})
        self._new_best = self.guard.evaluated(step, rows)
        if self._new_best and (best := self.guard.best):
            self.observer.event("best", **best)
            self.observer.note(
                f"best so far by {best['reward']}: {best['mean']:+.3f} +- {best['standard_error']:.3f} (standard error)"
                f" at step {step}; its checkpoint is kept"
            )

    async def _ask_guard(self) -> bool:
        """Report what the guard fires and carry out its actions; whether the run is to stop. Raises RollBack."""
        before = self.guard.multipliers
        reaction = self.guard.check(self.version)
        for firing in reaction.firings:
            self.observer.event("guard", **firing.fields)
            self.observer.add({"guard_fired_total": {firing.detector: 1.0}})
            self.observer.note(firing.sentence)
        if reaction.roll_back_to is not None:
            raise RollBack(reaction.roll_back_to, self.guard.carried)
        if (multipliers := self.guard.multipliers) != before:
            self.observer.event("guard_multipliers", step=self.version, **multipliers)
            setting = self.components.learner.set_multipliers(**multipliers)
            seconds = self.settings.deadlines.step_seconds
            await self._within(seconds, setting, "the learner to take multipliers", LearnerLost)
        if reaction.stop:
            self.observer.event("guard_stop", step=self.version)
            self.observer.note(f"stopped by the guard after step {self.version}")
        return reaction.stop

    async def _renew_reference(self) -> None:
        """Renew the reference when an iteration ends: before the tickets of the next step open."""
        every = self.settings.reference_iteration_steps
        if every and self.version % every == 0:
            self.observer.doing("new reference")
            patience = self.settings.deadlines.load_seconds + self._replacement_seconds
            renewing = self.components.checkpoints.renew_reference(self.version)
            await self._within(patience, renewing, "the reference to be renewed", LearnerLost)

    async def _checkpoint(self, finished: bool) -> None:
        self.observer.doing("checkpoint")
        saving = self.components.checkpoints.save(self.version, finished=finished)
        await self._within(self.settings.deadlines.step_seconds, saving, "the learner to save", LearnerLost)
        self._progress("checkpoint")

    # ---- the rollouts loop

    async def _rollouts(self) -> None:
        async with asyncio.TaskGroup() as tasks:  # its own: the batches under way at the end are cancelled with it
            while True:
                # no deadline: it waits for the learn loop, in which every await has one
                tickets = await self.components.buffer.admit()
                tasks.create_task(self._one_batch(tickets))

    async def _one_batch(self, tickets: list[int]) -> None:
        """Carry the tickets of one generator batch to the buffer, or drop them when every retry lost its worker."""
        deadline, buffer = self.settings.deadlines.score_seconds, self.components.buffer

        async def once() -> tuple[list[StageReceipt], AddReceipt]:
            batch, receipts = await self._generate_and_score(self.components.prompts(tickets))
            adding = buffer.add(tickets, batch)
            return receipts, await self._within(deadline, adding, "the buffer to accept rows", BufferLost)

        try:
            receipts, added = await retrying(once, self.settings.failures.retries, self.observer)
        except WorkerLost:
            dropping = buffer.drop(tickets, "worker_lost")
            await self._within(deadline, dropping, "the buffer to drop tickets", BufferLost)
            self._failures.saw({"worker_lost": len(tickets) * self.settings.sampling.samples_per_prompt}, accepted=0)
            return
        self._progress("accept")
        self._generated[0] += receipts[0].tokens
        self._generated[1] += receipts[0].seconds
        self.observer.add(
            {
                "generate_seconds_total": receipts[0].seconds,
                "score_seconds_total": sum(receipt.seconds for receipt in receipts[1:]),
            }
        )
        self._failures.saw(added.failed, added.accepted_samples)

    async def _generate_and_score(self, prompts: pa.RecordBatch) -> tuple[Batch, list[StageReceipt]]:
        generating = self.components.generators.generate(GenerateRequest(prompts, (self.sampling,)))
        batch, receipt = await self._within(self._generate_seconds, generating, "a generator")
        self._progress("generate")
        receipts = [receipt]
        patience = self.settings.deadlines.score_seconds + self._replacement_seconds
        for scorer in self.components.scorers:
            batch, receipt = await self._within(patience, scorer.score(batch), "a scorer")
            receipts.append(receipt)
        self._progress("score")
        return batch, receipts

    # ---- for the start-up parity test

    async def generate(self, prompts: pa.RecordBatch) -> pa.RecordBatch:
        """Generate completions of some prompt rows, unscored."""

        async def once() -> pa.RecordBatch:
            generating = self.components.generators.generate(GenerateRequest(prompts, (self.sampling,)))
            batch, _ = await self._within(self._generate_seconds, generating, "a generator")
            fetching = self.components.fetch(batch)
            return await self._within(self._replacement_seconds, fetching, "generated rows to arrive")

        return await retrying(once, self.settings.failures.retries, self.observer)

    async def compare(self, batch: pa.RecordBatch) -> Mapping[str, float]:
        """Gap between the learner's and the sampler's log-probs of these rows."""
        comparing = self.components.learner.compare(batch)
        seconds = self.settings.deadlines.step_seconds
        return await self._within(seconds, comparing, "the learner to compare", LearnerLost)

    # ---- deadlines

    @property
    def _replacement_seconds(self) -> float:
        """Seconds in which a lost worker is replaced and loaded; added to every deadline that may include that."""
        deadlines, retries = self.settings.deadlines, self.settings.failures.retries
        return (deadlines.start_seconds + deadlines.load_seconds) * (retries + 1)

    @property
    def _generate_seconds(self) -> float:
        """Seconds until a generator batch is complete, also as the last one in line behind a single generator."""
        in_line = self.settings.buffer.groups_per_step * (1 + self.settings.buffer.max_staleness)
        return self.settings.deadlines.generate_seconds * in_line + self._replacement_seconds

    def _progress(self, stage: str) -> None:
        self.observer.set({"progress_timestamp_seconds": {stage: time.time()}})

    async def _within(
        self, seconds: float, awaitable: Awaitable[Result], awaited: str, error: type[Exception] = Stalled
    ) -> Result:
        """Await with a deadline; on timeout the error names what was awaited."""

        def late() -> Exception:
            return error(f"step {self.version + 1}: waited {seconds:.0f} s for {awaited}")

        return await within(seconds, awaitable, late)


async def within(seconds: float, awaitable: Awaitable[Result], late: Callable[[], Exception]) -> Result:
    """Await with a deadline. Raises what `late` makes when it passes; a TimeoutError of the awaited stays one."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():
            raise
        raise late() from None


@contextlib.asynccontextmanager
async def one_cause() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error surfaces unwrapped, the other tasks cancelled."""
    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except* Exception as group:
        error = _first_cause(group)
    if error is not None:
        raise error


def _first_cause(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first plain exception of a group: the cause, without the wrapping."""
    first = group.exceptions[0]
    return _first_cause(first) if isinstance(first, BaseExceptionGroup) else first
