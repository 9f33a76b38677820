"""Learner ranks as Ray actors that move together: every call goes to all, rank 0 answers; one lost, all lost.

placement group -> port on rank 0's node -> ranks -> call ... call -> LearnerLost: stop, then a new learner group
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from keel.cluster.capacity import bundles
from keel.cluster.placement import Placement, PlacementWait
from keel.cluster.ray_errors import GONE, cause_of, init_failed
from keel.cluster.rendezvous import Rendezvous
from keel.config.run import LearnerSpec
from keel.config.workers import LearnerSettings
from keel.errors import BuildFailed, LearnerLost
from keel.learner.policy_learner import DeepSpeedLearner
from keel.protocols import Batch, LoadReceipt, Observer, StepReport
from keel.text import last_line

_GRACE_SECONDS = 15
"""Between the first error of a rank and the others': a dead rank makes the rest fail, and is noticed last."""


def placement_for(learners: LearnerSettings, ranks: int) -> Placement:
    """Room for a learner group: its ranks need not be on one node."""
    return Placement(bundles(learners) * ranks, "PACK")


async def largest_placement(
    learners: LearnerSettings, ranks: int, seconds: float, last_seconds: float, observer: Observer | None = None
) -> Placement:
    """Room for `ranks`; after so many seconds without it, for as many as there is room.

    For one rank it waits `last_seconds`: a cluster may be growing. Raises LearnerLost then.
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


class RankGroup:
    """Ranks of one class. `arguments` come before rank, ranks, address and port in its constructor."""

    def __init__(
        self, actor_class: type, learners: LearnerSettings, *arguments: Any, placement: Placement | None = None
    ) -> None:
        self.placement = placement or placement_for(learners, learners.count)
        self._owns_placement = placement is None
        self._actor_class, self._arguments = actor_class, arguments
        self.ranks: list[Any] = []

    async def ready(self) -> None:
        """The room is granted and all ranks have met there."""
        await self.placement.granted()
        rendezvous = self.placement.beside(Rendezvous).remote()
        try:
            address, port = await _met(rendezvous)
            for rank in range(self.placement.ranks):
                actor = self.placement.place(self._actor_class, rank)
                self.ranks.append(actor.remote(*self._arguments, rank, self.placement.ranks, address, port))
            await self._all("start", [rank.__ray_ready__.remote() for rank in self.ranks])
        finally:
            ray.kill(rendezvous, no_restart=True)  # rank 0 listens there now, or nobody will

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method on every rank; rank 0's answer. Raises LearnerLost, or what the ranks raised."""
        return (await self._all(method, [getattr(rank, method).remote(*arguments) for rank in self.ranks]))[0]

    def stop(self) -> None:
        """End all ranks to free their memory. A placement group that the caller passed in stays the caller's."""
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        if self._owns_placement:
            self.placement.release()

    async def _all(self, method: str, references: list[Any]) -> list[Any]:
        """Answers of all ranks; the first error ends the wait."""
        answers = [asyncio.ensure_future(_answer(reference)) for reference in references]
        try:
            done, pending = await asyncio.wait(answers, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                done |= (await asyncio.wait(pending, timeout=_GRACE_SECONDS))[0]
        finally:
            for answer in answers:
                answer.cancel()
        errors = {
            rank: error for rank, answer in enumerate(answers) if answer in done and (error := answer.exception())
        }
        for rank, error in errors.items():
            if init_failed(error):
                raise BuildFailed(
                    f"learner rank {rank} of {len(answers)} did not start: {last_line(str(error))}"
                ) from error
            if isinstance(error, (*GONE, ObjectLostError)):
                what = "died" if isinstance(error, GONE) else "lost its input"
                raise LearnerLost(f"learner rank {rank} of {len(answers)} {what} during {method}") from error
        for error in errors.values():
            if error is not None:
                raise error
        return [answer.result() for answer in answers]


async def _met(rendezvous: Any) -> tuple[str, int]:
    """Address and port for the ranks of a learner group. Raises LearnerLost, or BuildFailed where no port is free."""
    try:
        return await rendezvous.where.remote()
    except GONE as error:
        if init_failed(error):
            raise BuildFailed(f"the ranks have no place to meet: {last_line(str(error))}") from error
        raise LearnerLost("the node of the first learner rank is gone") from error


async def _answer(reference: Any) -> Any:
    try:
        return await reference
    except RayTaskError as error:
        raise cause_of(error) from error


class LearnerGroup(RankGroup):
    """A Learner made of ranks."""

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
        return await self.call("step", batch)

    async def publish(self) -> tuple[Any, LoadReceipt]:
        answers = [rank.publish.options(num_returns=2).remote() for rank in self.ranks]
        receipts = await self._all("publish", [receipt for _, receipt in answers])
        return answers[0][0], receipts[0]

    async def compare(self, batch: Batch) -> Mapping[str, float]:
        return await self.call("compare", batch)

    async def save(self, directory: str) -> None:
        await self.call("save", directory)

    async def restore_checkpoint(self, directory: str) -> int:
        return await self.call("restore_checkpoint", directory)

    async def export(self, folder: str) -> None:
        await self.call("export", folder)

    async def state(self) -> Mapping[str, Any]:
        return await self.call("state")

    async def renew_reference(self, folder: str) -> None:
        await self.call("renew_reference", folder)
