"""How a run follows what is wanted of it: the autoscaler, a stop while it starts, a buffer that does not answer."""

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import settings_for
from keel.cluster import actors
from keel.errors import BufferLost, LearnerLost
from keel.online import scaling as scaling_module
from keel.online.scaling import Scaling
from keel.protocols import Observer


def test_the_autoscaler_holds_what_is_wanted_now_and_nothing_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, int]] = []
    monkeypatch.setattr(actors, "request", lambda settings, counts: asked.append(dict(counts)))
    pool = SimpleNamespace(serving=1)
    link: Any = SimpleNamespace(desired={"generator": 1, "learner": 1}, stopping=False)
    pools: Any = {"generator": pool}
    scaling = Scaling(settings_for(), tmp_path, pools, link, Observer(), threading.Event())
    scaling._record(ranks=1)
    scaling.end()
    assert asked == [], "the nodes there are hold it"
    link.desired = {"generator": 4, "learner": 1}
    scaling._record(ranks=1)
    scaling._record(ranks=1)
    pool.serving = 2
    scaling._record(ranks=1)
    assert asked == [{"generator": 4, "learner": 1}], "once, however long it lasts"
    link.desired, pool.serving = {"generator": 1, "learner": 1}, 1  # the spare ones do not serve from then on
    scaling._record(ranks=1)
    assert asked[1:] == [{"generator": 1, "learner": 1}], "fewer now: the nodes of the others may go"
    scaling.end()
    assert asked[2:] == [{}]


class Link:
    """A control actor that hears a stop after a number of exchanges."""

    def __init__(self, exchanges: int | None) -> None:
        self.desired, self.stopping, self.left = {"generator": 1, "learner": 2}, False, exchanges
        self.told: list[Mapping[str, int]] = []

    async def exchange(self, actual: Mapping[str, int]) -> None:
        self.told.append(dict(actual))
        if self.left is not None:
            self.left -= 1
            self.stopping = self.left <= 0


class Seen(Observer):
    """Keeps the last gauges, the events, and how often it ticked."""

    def __init__(self) -> None:
        self.gauges: dict[str, Any] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ticks = 0

    def tick(self) -> None:
        self.ticks += 1

    def set(self, values: Mapping[str, Any]) -> None:
        self.gauges |= values

    def event(self, name: str, **values: Any) -> None:
        self.events.append((name, values))


def scaling_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    link: Any,
    observer: Observer | None = None,
    asked: threading.Event | None = None,
    **blocks: Any,
) -> Scaling:
    monkeypatch.setattr(scaling_module, "_POLL_SECONDS", 0.01)
    pools: Any = {"generator": SimpleNamespace(serving=1, count=1)}
    return Scaling(settings_for(**blocks), tmp_path, pools, link, observer or Observer(), asked or threading.Event())


def test_a_stop_breaks_off_a_start_and_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, ended = Link(exchanges=2), []

    async def start() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.02)
            ended.append(True)
        return "never"

    seen = Seen()
    assert asyncio.run(scaling_of(tmp_path, monkeypatch, link, seen).unless_stopped(start())) is None
    assert ended == [True]
    assert seen.ticks == 2 and seen.gauges == {"workers": {"learner": 0.0}, "workers_desired": {"learner": 2.0}}
    assert link.told == [{"generator": 1, "learner": 0}] * 2


def test_a_start_that_nobody_stops_comes_to_its_own_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(error: Exception | None) -> str:
        await asyncio.sleep(0.03)
        if error:
            raise error
        return "up"

    scaling = scaling_of(tmp_path, monkeypatch, Link(exchanges=None))
    assert asyncio.run(scaling.unless_stopped(start(None))) == "up"
    with pytest.raises(LearnerLost, match="no room"):
        asyncio.run(scaling.unless_stopped(start(LearnerLost("no room"))))


def test_a_buffer_that_does_not_size_its_batches_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffer:
        groups_per_batch = 0

        async def resize(self, groups_per_batch: int) -> None:
            assert groups_per_batch == settings_for().groups_per_batch_of(1)
            await asyncio.sleep(60)

    scaling = scaling_of(tmp_path, monkeypatch, Link(exchanges=None), deadlines={"score_seconds": 0.05})
    group: Any = SimpleNamespace(placement=SimpleNamespace(ranks=2))
    buffer: Any = Buffer()
    with pytest.raises(BufferLost, match="waited 0 s for the buffer to resize its batches"):
        asyncio.run(asyncio.wait_for(scaling.follow(group, buffer, SimpleNamespace()), 5))  # type: ignore[arg-type]


def test_a_signal_stops_a_start_and_an_error_of_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, asked = Seen(), threading.Event()
    asked.set()

    async def start() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise LearnerLost("no room")

    scaling = scaling_of(tmp_path, monkeypatch, Link(exchanges=None), seen, asked)
    assert asyncio.run(scaling.unless_stopped(start())) is None
    assert scaling.stopping and seen.events == [("start_failed", {"reason": "no room"})]


def test_counts_that_are_wanted_during_a_start_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[str, int]] = []
    monkeypatch.setattr(actors, "request", lambda settings, counts: asked.append(dict(counts)))
    link, seen = Link(exchanges=None), Seen()
    scaling = scaling_of(tmp_path, monkeypatch, link, seen)

    async def start() -> str:
        await asyncio.sleep(0.03)
        assert not (tmp_path / "scale.json").exists(), "nothing changed yet"
        link.desired = {"generator": 1, "learner": 1}
        async with asyncio.timeout(30):
            while not (tmp_path / "scale.json").exists():
                await asyncio.sleep(0.01)
        return "up"

    assert asyncio.run(scaling.unless_stopped(start())) == "up"
    kept = json.loads((tmp_path / "scale.json").read_text())
    assert kept == {"desired": link.desired, "actual": {"generator": 1, "learner": 0}}
    assert [name for name, _ in seen.events] == ["scale"] and asked == [link.desired]
