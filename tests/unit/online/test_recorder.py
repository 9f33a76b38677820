"""What the recorder writes of what is reported to it."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from fakes import settings_for
from keel import files
from keel.cluster import actors
from keel.errors import BuildFailed
from keel.observability.metrics import RunMetrics
from keel.online.preflight import Prepared
from keel.online.recorder import Recorder
from keel.online.train import OnlineRun, Saved
from quiet_display import Quiet


def test_a_step_says_how_far_the_run_goes_and_where_its_seconds_went(tmp_path: Path) -> None:
    prepared = SimpleNamespace(settings=settings_for(steps=7, staleness=2), directory=tmp_path)
    display = Quiet()
    recorder = Recorder(cast(Prepared, prepared), RunMetrics("test", tmp_path / "metrics.jsonl"), display)
    recorder.doing("weight sync")
    recorder.occupied("scorer", running=1, waiting=3, serving=2)
    recorder.step(1)
    (line,) = display.lines
    assert (line["max_staleness_versions"], line["steps_wanted"]) == (2.0, 7.0)
    assert line["batches_waiting"] == {"scorer": 3.0}
    assert set(line["phase_seconds_total"]) == {"start", "weight_sync"}
    busy, queue = line["busy_seconds_total"]["scorer"], line["queue_seconds_total"]["scorer"]
    assert busy > 0 and abs(queue - 3 * busy) < 1e-9
    assert line["idle_seconds_total"] == {"scorer/weight_sync": busy}


def test_a_learner_that_is_built_again_is_at_its_checkpoint(tmp_path: Path) -> None:
    """Else generators would seem to be behind the version that was lost, until the next step."""
    prepared = SimpleNamespace(settings=settings_for(steps=7), directory=tmp_path)
    metrics = RunMetrics("test", tmp_path / "metrics.jsonl")
    recorder = Recorder(cast(Prepared, prepared), metrics, Quiet())
    recorder.set({"learner_version": 6.0})
    recorder.begin(2, 4)
    recorder.set({"version": 4.0})
    values = [
        metrics.registry.get_sample_value(f"keel_{name}", {"run": "test"}) for name in ("learner_version", "version")
    ]
    assert values == [4.0, 4.0]


def test_of_many_that_wait_for_resources_one_speaks_for_all(tmp_path: Path) -> None:
    prepared = SimpleNamespace(settings=settings_for(), directory=tmp_path)
    display = Quiet()
    recorder = Recorder(cast(Prepared, prepared), RunMetrics("test", tmp_path / "metrics.jsonl"), display)
    free = "free are 1, 0 CPUs on 2 nodes"
    for _ in range(2):  # as after 5 and after 65 seconds
        recorder.waiting_for_resources("generator-1", "2 CPUs", free)
        recorder.waiting_for_resources("generator-2", "2 CPUs", free)
    first = f"waiting for resources for generator-1 (2 CPUs): {free}"
    many = f"waiting for resources for generator-1 (2 CPUs) and 1 more: {free}"
    assert display.notes == [first, many.replace("generator-1", "generator-2"), many]
    assert display.now == "waiting for resources for generator-1"
    recorder.doing("learner step")
    assert display.now == "learner step"
    recorder.waited_for_resources("generator-1", 66.3, granted=True)
    recorder.waiting_for_resources("generator-2", "2 CPUs", free)
    recorder.waited_for_resources("generator-2", 70.0, granted=False)
    assert display.notes[3:] == ["resources for generator-1 after 66 s", first.replace("generator-1", "generator-2")]
    assert display.now == "learner step"  # others work
    events = [
        (read_json_line["event"], read_json_line["who"])
        for read_json_line in files.read_json_lines(tmp_path / "events.jsonl")
    ]
    assert events == [
        ("waiting_for_resources", "generator-1"),
        ("waiting_for_resources", "generator-2"),
        ("resources_found", "generator-1"),
    ]


def test_memory_is_measured_between_steps_and_is_in_the_line_of_a_step(tmp_path: Path) -> None:
    prepared = SimpleNamespace(settings=settings_for(), directory=tmp_path)
    metrics, display = RunMetrics("test", tmp_path / "metrics.jsonl"), Quiet()
    recorder = Recorder(cast(Prepared, prepared), metrics, display)
    recorder.tick()
    assert (metrics.registry.get_sample_value("keel_free_memory_bytes", {"run": "test"}) or 0) > 0
    recorder.step(1)
    assert files.read_json_lines(tmp_path / "metrics.jsonl") == display.lines
    assert display.lines[0]["free_memory_bytes"] > 0


async def test_what_a_lost_learner_did_is_not_counted_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for resources and the new learner group are start-up: neither the step nor the checkpoint is counted meanwhile."""
    prepared = SimpleNamespace(settings=settings_for(), directory=tmp_path)
    recorder = Recorder(cast(Prepared, prepared), RunMetrics("test", tmp_path / "metrics.jsonl"), Quiet())
    recorder.utilization.ranks(1)
    recorder.doing("learner step")
    asked: list[bool] = []

    async def placement_for(ranks: int) -> None:
        asked.append(recorder.utilization.starting)
        raise BuildFailed("the end of this test")

    monkeypatch.setattr(actors, "holds", lambda *_, **__: True)
    pool = SimpleNamespace(forget_load=lambda: None)
    subject = SimpleNamespace(
        settings=prepared.settings,
        recorder=recorder,
        generators=pool,
        scaling=SimpleNamespace(desired={"learner": 1}),
        has_run=True,
        _placement_for=placement_for,
    )
    with pytest.raises(BuildFailed, match="the end of this test"):
        await OnlineRun._start(cast(OnlineRun, subject), Saved(None, {}), contextlib.ExitStack())
    assert asked == [True]
