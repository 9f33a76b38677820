"""How often a run builds learner and buffer again: losses in a row count, and a step between them starts over."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import settings_for
from keel.errors import BufferLost, BuildFailed, LearnerLost
from keel.online import train
from keel.online.train import OnlineRun, Saved

Script = list[Exception | int | str]
"""What each attempt does: loses something, advances by a number of steps, or is asked to stop."""


def run_of(tmp_path: Path, script: Script, rebuilds: int, monkeypatch: pytest.MonkeyPatch, has_run: bool = True) -> Any:
    """The loop around the attempts, everything they do replaced by the script; `saved` follows what was done."""
    subject: Any = object.__new__(OnlineRun)
    subject.settings = settings_for(steps=10, failures={"max_rebuilds": rebuilds})
    subject.prepared, subject.has_run = SimpleNamespace(directory=tmp_path), has_run
    subject.events, subject.attempts = [], 0
    subject.recorder = SimpleNamespace(
        furthest=0,
        event=lambda name, **fields: subject.events.append((name, fields)),
        add=lambda values: subject.events.append(("add", values)),
        display=SimpleNamespace(note=lambda text: None),
    )
    subject.scaling = SimpleNamespace(stopping=False, end=lambda: subject.events.append(("end", {})))

    async def attempt(saved: Saved) -> None:
        await asyncio.sleep(0)
        assert saved.version == subject.recorder.furthest
        what = script[subject.attempts]
        subject.attempts += 1
        if isinstance(what, Exception):
            raise what
        if isinstance(what, str):
            subject.scaling.stopping = True
        else:
            subject.recorder.furthest += what
            if subject.recorder.furthest < 10:
                raise LearnerLost("later")

    subject._attempt = attempt
    monkeypatch.setattr(train, "_end_on_signals", lambda: None)
    monkeypatch.setattr(train, "_newest", lambda recorder: Saved(None, {"version": recorder.furthest}))
    return subject


LOST = [LearnerLost("the learner group"), BufferLost("the buffer"), BuildFailed("a rank")]


@pytest.mark.parametrize("rebuilds", [0, 1, 2, 3])
@pytest.mark.parametrize("lost", LOST, ids=[type(error).__name__ for error in LOST])
def test_max_rebuilds_losses_in_a_row_are_built_again_and_one_more_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rebuilds: int, lost: Exception
) -> None:
    enough = run_of(tmp_path, [lost] * rebuilds + [10], rebuilds, monkeypatch)
    assert asyncio.run(enough.to_the_end(Saved(None, {}))).version == 10
    assert [fields for name, fields in enough.events if name == "rebuild"] == [{"reason": str(lost)}] * rebuilds
    assert [fields for name, fields in enough.events if name == "add"] == [{"rebuilds_total": 1.0}] * rebuilds
    too_many = run_of(tmp_path, [lost] * 9, rebuilds, monkeypatch)
    with pytest.raises(type(lost), match=str(lost)):
        asyncio.run(too_many.to_the_end(Saved(None, {})))
    assert too_many.attempts == rebuilds + 1
    assert too_many.events[-1] == ("end", {})  # the autoscaler is told, however it ends


def test_a_step_between_losses_starts_the_count_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt advances one step and is lost then: with two in a row allowed the run never gives up."""
    lost = LearnerLost("the learner group")
    run = run_of(tmp_path, [1, lost, 1, lost, 1, lost, 3, lost, 4], 2, monkeypatch)
    assert asyncio.run(run.to_the_end(Saved(None, {}))).version == 10
    run = run_of(tmp_path, [1, lost, 1, lost, lost], 2, monkeypatch)
    with pytest.raises(LearnerLost, match="the learner group"):
        asyncio.run(run.to_the_end(Saved(None, {})))
    assert run.attempts == 5


def test_what_cannot_be_built_the_first_time_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, [BuildFailed("no such model")], 3, monkeypatch, has_run=False)
    with pytest.raises(BuildFailed, match="no such model"):
        asyncio.run(run.to_the_end(Saved(None, {})))
    assert run.attempts == 1
    other = run_of(tmp_path, [LearnerLost("no room"), 10], 3, monkeypatch, has_run=False)
    assert asyncio.run(other.to_the_end(Saved(None, {}))).version == 10  # what was lost is


@pytest.mark.parametrize(
    ("version", "finished", "over"), [(9, False, False), (10, False, True), (11, False, True), (3, True, True)]
)
def test_a_run_is_over_at_its_last_step_or_where_its_objective_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, finished: bool, over: bool
) -> None:
    run = run_of(tmp_path, [], 3, monkeypatch)
    saved = Saved(None, {"version": version, "finished": finished})
    assert saved.over(run.settings) == over and Saved(None, {}).version == 0
    if over:
        assert asyncio.run(run.to_the_end(saved)) is saved and run.attempts == 0


def test_a_run_that_is_asked_to_stop_ends_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, ["stop", 10], 3, monkeypatch)
    run.recorder.furthest = 4
    assert asyncio.run(run.to_the_end(Saved(None, {"version": 4}))).version == 4
    assert run.attempts == 1 and ("stopped", {"step": 4}) in run.events
