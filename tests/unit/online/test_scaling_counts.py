"""When ranks change, when batches are sized again, and which counts a resumed run starts with."""

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import settings_for
from keel.cluster import actors
from keel.online import scaling
from keel.online.scaling import Scaling
from keel.protocols import Observer


class Spare:
    """A placement for further ranks that is granted from the `granted_at`-th question on."""

    def __init__(self, ranks: int, granted_at: int) -> None:
        self.ranks, self.left, self.released = ranks, granted_at, 0

    async def granted(self, seconds: float) -> bool:
        await asyncio.sleep(0)
        assert 0 < seconds < 1  # it is asked for once a second
        self.left -= 1
        return self.left <= 0

    def release(self) -> None:
        self.released += 1


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **desired: int) -> None:
        self.desired = {"generator": 2, "scorer": 1, "learner": 2} | desired
        self.link: Any = SimpleNamespace(desired=self.desired, stopping=False, told=[], exchange=self.exchange)
        self.exchanges = 0
        self.at: dict[int, Any] = {}
        """What happens at an exchange, by its number from 1."""
        self.placements: list[Spare] = []
        self.granted_at = 1
        self.requests: list[dict[str, int]] = []
        self.left = 0
        monkeypatch.setattr(scaling, "_POLL_SECONDS", 0.001)
        monkeypatch.setattr(scaling, "placement_for", self.placement_for)
        monkeypatch.setattr(actors, "request", lambda settings, counts: self.requests.append(dict(counts)))
        self.pools: Any = {role: self.pool(role) for role in ("generator", "scorer")}
        self.asked_to_stop = threading.Event()
        self.settings = settings_for(buffer={"groups_per_step": 6, "groups_per_batch": None})
        self.scaling = Scaling(self.settings, tmp_path, self.pools, self.link, Observer(), self.asked_to_stop)
        self.resized: list[int] = []
        self.buffer: Any = SimpleNamespace(groups_per_batch=self.scaling.groups_per_batch, resize=self.resize)
        self.group: Any = SimpleNamespace(placement=SimpleNamespace(ranks=2))

    def pool(self, role: str) -> Any:
        made = SimpleNamespace(count=self.desired[role], serving=self.desired[role], resizes=[])

        def resize(count: int) -> None:
            made.resizes.append(count)
            made.count = made.serving = count

        made.resize = resize
        return made

    def placement_for(self, learners: Any, ranks: int) -> Spare:
        self.placements.append(Spare(ranks, self.granted_at))
        return self.placements[-1]

    async def resize(self, groups: int) -> None:
        await asyncio.sleep(0)
        self.resized.append(groups)
        self.buffer.groups_per_batch = groups

    async def exchange(self, actual: dict[str, int]) -> None:
        await asyncio.sleep(0)
        self.exchanges += 1
        self.link.told.append(dict(actual))
        if change := self.at.get(self.exchanges):
            change()

    def leave(self) -> None:
        self.left += 1

    async def follow(self, exchanges: int) -> None:
        """Follow the wanted counts for a number of exchanges."""
        following = asyncio.create_task(self.scaling.follow(self.group, self.buffer, SimpleNamespace(leave=self.leave)))  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            while self.exchanges < exchanges and not following.done():
                await asyncio.sleep(0.001)
        following.cancel()
        await asyncio.wait([following])
        assert following.cancelled() or following.exception() is None


def test_nothing_changes_where_nothing_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path)
    asyncio.run(world.follow(4))
    assert [pool.resizes for pool in world.pools.values()] == [[], []]
    assert (world.left, world.placements, world.resized, world.requests) == (0, [], [], [])
    assert world.link.told[0] == {"generator": 2, "scorer": 1, "learner": 2}


def test_pools_get_their_counts_and_batches_the_size_of_the_generators(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Six groups a step: three a batch for two generators, two for three of them; a scorer more changes none."""
    world = World(monkeypatch, tmp_path)
    world.at = {2: lambda: world.desired.update(generator=3), 4: lambda: world.desired.update(scorer=2)}
    assert world.scaling.groups_per_batch == 3
    asyncio.run(world.follow(7))
    assert world.pools["generator"].resizes == [3] and world.pools["scorer"].resizes == [2]
    assert world.resized == [2] and world.left == 0
    stored = json.loads((tmp_path / "scale.json").read_text())
    assert stored == {"desired": world.desired, "actual": {"generator": 3, "scorer": 2, "learner": 2}}


def test_fewer_ranks_leave_at_once_without_asking_for_resources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = World(monkeypatch, tmp_path)
    world.at = {3: lambda: world.desired.update(learner=1)}
    asyncio.run(world.follow(3))
    assert world.left >= 1 and world.placements == []


@pytest.mark.parametrize("granted_at", [1, 3])
def test_more_ranks_leave_once_there_is_resources_for_those_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, granted_at: int
) -> None:
    world = World(monkeypatch, tmp_path, learner=5)
    world.granted_at = granted_at
    if granted_at > 1:
        asyncio.run(world.follow(granted_at - 1))
        assert world.left == 0
    asyncio.run(world.follow(granted_at + 1))
    assert world.left >= 1 and [placement.ranks for placement in world.placements] == [3]
    world.scaling.release()
    world.scaling.release()
    assert [placement.released for placement in world.placements] == [1]


def test_resources_of_another_size_is_given_back_before_the_next_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = World(monkeypatch, tmp_path, learner=5)
    world.granted_at = 1000
    world.at = {3: lambda: world.desired.update(learner=3), 6: lambda: world.desired.update(learner=2)}
    asyncio.run(world.follow(9))
    assert [(placement.ranks, placement.released) for placement in world.placements] == [
        (3, 1),
        (1, 1),
    ] and world.left == 0


@pytest.mark.parametrize("how", ["link", "signal"])
def test_a_stop_leaves_with_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    world = World(monkeypatch, tmp_path)

    def stop() -> None:
        if how == "link":
            world.link.stopping = True
        else:
            world.asked_to_stop.set()

    world.at = {2: stop}
    assert not world.scaling.stopping
    asyncio.run(world.follow(2))
    assert world.scaling.stopping and world.left >= 1


def test_a_resumed_run_starts_with_the_counts_that_were_wanted_last(tmp_path: Path) -> None:
    settings = settings_for(generators={"count": 3}, learners={"count": 2})
    assert not scaling.has_counts(tmp_path)
    assert scaling.configured(settings, tmp_path) == {"generator": 3, "scorer": 1, "reference": 1, "learner": 2}
    (tmp_path / "scale.json").write_text(json.dumps({"desired": {"generator": 7}, "actual": {"generator": 1}}))
    assert scaling.has_counts(tmp_path)
    assert scaling.configured(settings, tmp_path) == {"generator": 7}
