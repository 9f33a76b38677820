"""Placement groups: the CPUs, GPUs and custom resources of one worker or one learner group, all of them or none.

asked --> granted, on one node or on several --> actors in its bundles --> released
  |
  +--> a wait is reported after a few seconds and then once a minute: what waits, for what, and what is free
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import ray
from ray._private import state
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from keel.cluster.capacity import Amounts, free_words, words
from keel.protocols import Observer

FIRST_REPORT_SECONDS = 5.0
REPORT_EVERY_SECONDS = 60.0


class Placement:
    """A Ray placement group of bundles, each on one node; with STRICT_PACK all on the same. Its maker releases it."""

    def __init__(self, bundles: Sequence[Amounts], strategy: Literal["PACK", "STRICT_PACK"]) -> None:
        self.bundles, self._strategy = [dict(bundle) for bundle in bundles], strategy
        self.group = placement_group(self.bundles, strategy=strategy)
        self._ready: asyncio.Future[Any] | None = None

    @property
    def ranks(self) -> int:
        """The number of bundles: one for each rank of a learner group."""
        return len(self.bundles)

    async def granted(self, seconds: float | None = None) -> bool:
        """Whether Ray grants it within `seconds`; None: wait for ever. Ask once more after a node was lost."""
        if self._ready is None or self._ready.done():
            self._ready = asyncio.ensure_future(_ready(self.group))
        for answer in (await asyncio.wait([self._ready], timeout=seconds))[0]:
            answer.result()
            return True
        return False

    def place(self, actor_class: type, bundle: int, *, with_children: bool = False) -> Any:
        """The class as a Ray actor that fills a bundle; `with_children`: actors that it starts go into the others."""
        asked = dict(self.bundles[bundle])
        where = PlacementGroupSchedulingStrategy(self.group, bundle, with_children)
        cpus, gpus = asked.pop("CPU", 0.0), asked.pop("GPU", 0.0)
        return ray.remote(num_cpus=cpus, num_gpus=gpus, resources=asked, scheduling_strategy=where)(actor_class)

    def beside(self, actor_class: type) -> Any:
        """The class as a Ray actor on the node of the first bundle, which takes nothing of it."""
        where = PlacementGroupSchedulingStrategy(self.group, 0)
        return ray.remote(num_cpus=0, scheduling_strategy=where)(actor_class)

    def asked(self) -> str:
        """`2 CPUs and 1 GPU`; of ranks, which need not be together, `3 x 2 CPUs`."""
        if self._strategy == "PACK":
            return (f"{self.ranks} x " if self.ranks > 1 else "") + words(self.bundles[0])
        return words({name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in self._names()})

    def placed(self) -> bool:
        """Whether Ray has created it, though no actor may have started in it yet."""
        return placement_group_table(self.group)["state"] == "CREATED"

    def free(self) -> str:
        """List what is free of the resources it asks for, by node."""
        return free_words(free_nodes(), self._names())

    def release(self) -> None:
        """Release it and end all actors that are still in it."""
        if self._ready is not None:
            self._ready.cancel()
        if ray.is_initialized():
            remove_placement_group(self.group)

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for bundle in self.bundles for name in bundle))


class PlacementWait:
    """A wait for a placement group, reported to an observer while it lasts and when it ends."""

    def __init__(self, placement: Placement, name: str, observer: Observer) -> None:
        self.placement, self.name, self._observer = placement, name, observer
        self._began = time.monotonic()
        self._next_report = self._began + FIRST_REPORT_SECONDS
        self._reported = self._granted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._reported:
            self._observer.waited_for_resources(self.name, self.seconds, granted=self._granted)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    async def granted(self, seconds: float) -> bool:
        """Whether Ray grants it within `seconds`."""
        until = time.monotonic() + seconds
        while not self._granted and (now := time.monotonic()) < until:
            self._granted = await self.placement.granted(min(until, self._next_report) - now)
            if not self._granted and time.monotonic() >= self._next_report:
                self._next_report = time.monotonic() + REPORT_EVERY_SECONDS
                if self.placement.placed():  # the first process there is slow to start
                    continue
                self._reported = True
                self._observer.waiting_for_resources(self.name, self.placement.asked(), self.placement.free())
        return self._granted


def nodes() -> list[Mapping[str, float]]:
    """List the resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[Mapping[str, float]]:
    """The free resources of each node that is alive."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [amounts for name, amounts in state.available_resources_per_node().items() if name in alive]


def limits() -> Mapping[str, float] | None:
    """The most of each resource that an autoscaler may add; None without an autoscaler that has limits."""
    return state.state.get_max_resources_from_cluster_config()


async def _ready(group: Any) -> Any:
    return await group.ready()
