"""Keeps a run at the wanted counts: workers at once, learner ranks through a checkpoint.

wanted counts (control actor) --> generator, reference, scorer pools: resized at once
                              --> learner: with a placement group for them, through a checkpoint and a new learner group
a stop (control actor)        --> the controller leaves with a checkpoint, or a start is cancelled; the run ends
RUN_DIR/scale.json            desired and actual; a resumed run starts with the desired ones
"""

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from keel import files
from keel.cluster import actors, capacity
from keel.cluster.control import ControlLink
from keel.cluster.learner_group import RankGroup, placement_for
from keel.cluster.placement import Placement
from keel.cluster.pool import Pool
from keel.config.run import Settings
from keel.errors import BufferLost
from keel.online.controller import Controller, within
from keel.protocols import Observer

_POLL_SECONDS = 1.0
Result = TypeVar("Result")


def configured(settings: Settings, directory: Path) -> dict[str, int]:
    """Wanted counts by role: the last ones of an earlier process of this run, else the configuration's."""
    path = directory / "scale.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf8"))["desired"]
    return capacity.configured(settings)


def has_counts(directory: Path) -> bool:
    """Whether an earlier process of the run was up, or was scaled while it started."""
    return (directory / "scale.json").is_file()


class Scaling:
    """The counts of one run, over all learner groups it has."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        pools: Mapping[str, Pool],
        link: ControlLink,
        observer: Observer,
        asked_to_stop: threading.Event,
    ) -> None:
        self.settings, self.pools, self.observer = settings, pools, observer
        self._path, self._link, self._asked_to_stop = directory / "scale.json", link, asked_to_stop
        self._written = {"desired": dict(link.desired)}
        self._spare: Placement | None = None
        self._requested = False

    @property
    def desired(self) -> dict[str, int]:
        return self._link.desired

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop."""
        return self._link.stopping or self._asked_to_stop.is_set()

    @property
    def groups_per_batch(self) -> int:
        """Groups of a generator batch, by the wanted generators: a loss must not change which groups share one."""
        return self.settings.groups_per_batch_of(self.desired["generator"])

    def release(self) -> None:
        """Release the placement group that was requested for more ranks, for the next learner group."""
        if self._spare is not None:
            self._spare.release()
            self._spare = None

    async def unless_stopped(self, start: Coroutine[Any, Any, Result]) -> Result | None:
        """Return the result of a start; cancel it and return None if the run is asked to stop before."""
        starting = asyncio.ensure_future(start)
        try:
            while not (await asyncio.wait([starting], timeout=_POLL_SECONDS))[0]:
                self.observer.tick()
                self._show(ranks=0)
                await self._link.exchange(self._serving(ranks=0))
                if self.desired != self._written["desired"]:
                    self._record(ranks=0)
                if self.stopping:
                    return None
            return await starting
        finally:
            starting.cancel()
            await asyncio.wait([starting])
            if not starting.cancelled() and self.stopping and (error := starting.exception()):
                self.observer.event("start_failed", reason=str(error))

    async def follow(self, learner: RankGroup, buffer: actors.RemoteBuffer, controller: Controller) -> None:
        """Apply the wanted counts once a second, until it is cancelled."""
        self._record(learner.placement.ranks)
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            self.observer.tick()
            await self._link.exchange(self._serving(learner.placement.ranks))
            for role, pool in self.pools.items():
                if pool.count != self.desired[role]:
                    pool.resize(self.desired[role])
            if buffer.groups_per_batch != self.groups_per_batch:
                await self._resize(buffer)
            if self.stopping or await self._ranks_can_change(learner.placement.ranks):
                controller.leave()
            self._record(learner.placement.ranks)

    async def _resize(self, buffer: actors.RemoteBuffer) -> None:
        deadline = self.settings.deadlines.score_seconds
        late = f"waited {deadline:.0f} s for the buffer to resize its batches"
        await within(deadline, buffer.resize(self.groups_per_batch), lambda: BufferLost(late))

    async def _ranks_can_change(self, present: int) -> bool:
        """Whether a new learner group can have the wanted ranks: fewer at once, more when Ray grants them."""
        more = self.desired["learner"] - present
        if self._spare is not None and self._spare.ranks != more:
            self.release()
        if more <= 0:
            return more < 0
        self._spare = self._spare or placement_for(self.settings.learners, more)
        return await self._spare.granted(0.1)

    def end(self) -> None:
        """Withdraw the request to the autoscaler, which would keep the nodes."""
        if self._requested:
            actors.request(self.settings, {})

    def _serving(self, ranks: int) -> dict[str, int]:
        return {role: pool.serving for role, pool in self.pools.items()} | {"learner": ranks}

    def _record(self, ranks: int) -> None:
        """Write wanted and present counts when they changed; ask the autoscaler for what is missing."""
        counts = {"desired": dict(self.desired), "actual": self._serving(ranks)}
        if counts == self._written:
            return
        if other := counts["desired"] != self._written["desired"]:
            self.observer.event("scale", **counts)
        if other if self._requested else counts["desired"] != counts["actual"]:
            self._requested = True  # it keeps the last request, also where fewer are wanted now
            actors.request(self.settings, self.desired)
        self._written = counts
        files.write_json(self._path, counts)
        self._show(ranks)

    def _show(self, ranks: int) -> None:
        desired = float(self.desired["learner"])
        self.observer.set({"workers": {"learner": float(ranks)}, "workers_desired": {"learner": desired}})
