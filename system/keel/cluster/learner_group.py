"""Learner ranks as Ray actors: every call goes to all ranks, rank 0 answers; the loss of one loses the group.

placement group -> port on rank 0's node -> ranks -> call ... call -> LearnerLost: stop, then a new learner group
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray

from keel.cluster.capacity import bundles
from keel.cluster.placement import Placement, PlacementWait
from keel.cluster.ray_errors import answer
from keel.cluster.rendezvous import Rendezvous
from keel.cluster.worker import remote_method
from keel.config.run import LearnerSpec
from keel.config.workers import LearnerSettings
from keel.errors import BuildFailed, LearnerLost
from keel.learner.policy_learner import DeepSpeedLearner
from keel.protocols import Batch, LoadReceipt, Observer, StepReport

Rank = TypeVar("Rank", covariant=True)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_GRACE_SECONDS = 15
"""Wait for the other ranks' errors after the first: a dead rank makes others fail, often before Ray reports it."""


def placement_for(learners: LearnerSettings, ranks: int) -> Placement:
    """Request a placement group for a learner group; its ranks need not be on one node."""
    return Placement(bundles(learners) * ranks, "PACK")


async def largest_placement(
    learners: LearnerSettings, ranks: int, seconds: float, last_seconds: float, observer: Observer | None = None
) -> Placement:
    """Wait `seconds` for a placement group of `ranks`, then request smaller ones until one is granted.

    For a single rank it waits `last_seconds`: a cluster may be growing. Raises LearnerLost then.
    """
    for count in range(ranks, 0, -1):
        placement = placement_for(learners, count)
        patience = last_seconds if count == 1 else seconds if count == ranks else 5.0
        try:
            with PlacementWait(placement, "the learner", observer or Observer()) as wait:
                if await wait.granted(patience):
                    return placement
        except asyncio.CancelledError:
            placement.release()
            raise
        asked, free = placement.asked(), placement.free()
        placement.release()
    raise LearnerLost(f"no node has room for one learner rank ({asked}); waited {last_seconds:.0f} s; {free}")


class RankGroup(Generic[Rank]):
    """Ranks of one class. `arguments` come before rank, ranks, address and port in its constructor."""

    def __init__(
        self, actor_class: type[Rank], learners: LearnerSettings, *arguments: Any, placement: Placement | None = None
    ) -> None:
        self.placement = placement or placement_for(learners, learners.count)
        self._owns_placement = placement is None
        self._actor_class, self._arguments = actor_class, arguments
        self.ranks: list[Any] = []

    async def ready(self) -> None:
        """Wait for the placement group, start all ranks in it and wait until they have met."""
        await self.placement.granted()
        rendezvous = self.placement.beside(Rendezvous).remote()
        try:
            address, port = await _answer(
                remote_method(rendezvous, Rendezvous.where).remote(), "the rendezvous of the ranks", "start"
            )
            for rank in range(self.placement.ranks):
                actor = self.placement.place(self._actor_class, rank)
                self.ranks.append(actor.remote(*self._arguments, rank, self.placement.ranks, address, port))
            await self._all("start", [rank.__ray_ready__.remote() for rank in self.ranks])
        finally:
            ray.kill(rendezvous, no_restart=True)  # by now rank 0 listens there

    async def call(
        self,
        method: Callable[Concatenate[Rank, Arguments], Result],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """Call a method of the ranks' class on every rank; the answer is rank 0's.

        Raises LearnerLost, or what a rank raised.
        """
        references = [remote_method(rank, method).remote(*arguments, **options) for rank in self.ranks]
        return (await self._all(method.__name__, references))[0]

    def stop(self) -> None:
        """End all ranks to free their memory. A placement group that the caller passed in stays the caller's."""
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        if self._owns_placement:
            self.placement.release()

    async def _all(self, method: str, references: list[Any]) -> list[Any]:
        """Answers of all ranks; the first error ends the wait."""
        answers = [
            asyncio.ensure_future(_answer(reference, f"learner rank {rank} of {len(references)}", method))
            for rank, reference in enumerate(references)
        ]
        try:
            done, pending = await asyncio.wait(answers, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                done |= (await asyncio.wait(pending, timeout=_GRACE_SECONDS))[0]
        finally:
            for task in answers:
                task.cancel()
        errors = [error for task in answers if task in done and (error := task.exception())]
        lost = [error for error in errors if isinstance(error, (BuildFailed, LearnerLost))]
        for error in [*lost, *errors]:  # a lost rank makes the others fail
            raise error
        return [task.result() for task in answers]


async def _answer(reference: Any, rank: str, method: str) -> Any:
    def lost(reason: str) -> LearnerLost:
        return LearnerLost(f"{rank} died during {method}")

    return await answer(reference, rank, lost, LearnerLost(f"{rank} lost its input during {method}"))


class LearnerGroup(RankGroup[DeepSpeedLearner]):
    """A Learner over the ranks of one group."""

    def __init__(
        self,
        settings: LearnerSpec,
        folder: str,
        others: Mapping[str, str] | None = None,
        placement: Placement | None = None,
    ) -> None:
        """`others`: folders of models beside the policy in the learner: reference, teacher, critic."""
        super().__init__(DeepSpeedLearner, settings.learners, settings, folder, dict(others or {}), placement=placement)

    async def step(self, batch: Batch) -> StepReport:
        return await self.call(DeepSpeedLearner.step, batch)

    async def publish(self) -> tuple[Any, LoadReceipt]:
        publish = DeepSpeedLearner.publish
        answers = [remote_method(rank, publish).options(num_returns=2).remote() for rank in self.ranks]
        receipts = await self._all(publish.__name__, [receipt for _, receipt in answers])
        return answers[0][0], receipts[0]

    async def compare(self, batch: Batch) -> Mapping[str, float]:
        return await self.call(DeepSpeedLearner.compare, batch)

    async def save(self, directory: str) -> None:
        await self.call(DeepSpeedLearner.save, directory)

    async def restore_checkpoint(self, directory: str) -> int:
        return await self.call(DeepSpeedLearner.restore_checkpoint, directory)

    async def export(self, folder: str) -> None:
        await self.call(DeepSpeedLearner.export, folder)

    async def state(self) -> Mapping[str, Any]:
        return await self.call(DeepSpeedLearner.state)

    async def set_multipliers(self, kl: float, learning_rate: float) -> None:
        await self.call(DeepSpeedLearner.set_multipliers, kl, learning_rate)

    async def renew_reference(self, folder: str) -> None:
        await self.call(DeepSpeedLearner.renew_reference, folder)
