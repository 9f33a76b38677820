"""What trackers are told, and that nothing they do reaches the run. The libraries: test_tracking_libraries.py."""

import dataclasses
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fakes import settings_for
from keel import files
from keel.config.monitoring import TrackingSettings
from keel.errors import ConfigError
from keel.observability import tracking
from keel.observability.metrics import RunMetrics
from keel.observability.trackers import TRACKERS, Outcome, TrackedRun, Tracker
from keel.observability.tracking import Tracking
from keel.online.preflight import Prepared
from keel.online.recorder import Recorder
from offline_runs import FakeOfflineLearner, Killed, Listener, offline_run_of
from offline_runs import Run as OfflineRun
from reward_stages import LOSSES, FakeRankGroup, Stage
from rollouts import generated, prompts, referenced, scored

SECRET = "sk-live-4f9a"


class FakeTracker(Tracker):
    """Keeps what it is told. `hook(step)` may raise or wait."""

    def __init__(self, run: TrackedRun, hook: Callable[[int], Any] = lambda step: None) -> None:
        self.run, self.hook = run, hook
        self.told: list[Any] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.hook(step)
        self.told.append((step, dict(values)))

    def rewind(self, version: int) -> None:
        self.told.append(("rewind", version))

    def finish(self, outcome: Outcome) -> None:
        self.told.append(outcome)


class Made:
    """Fakes in place of the libraries, in the order they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.trackers: list[FakeTracker] = []

    def replace(self, name: Any, hook: Callable[[int], Any] = lambda step: None) -> None:
        def make(run: TrackedRun) -> FakeTracker:
            self.trackers.append(FakeTracker(run, hook))
            return self.trackers[-1]

        self.monkeypatch.setitem(TRACKERS, name, make)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    tracked = Made(monkeypatch)
    tracked.replace("wandb")
    tracked.replace("mlflow")
    return tracked


class Told:
    """Tracking of a run in a folder, its counters and its notes."""

    def __init__(self, folder: Path, *trackers: str, **settings: Any) -> None:
        self.folder, self.notes = folder, list[str]()
        self.metrics = RunMetrics("test", folder / "metrics.jsonl")
        tracked = settings_for(tracking={"trackers": list(trackers), **settings})
        self.tracking = Tracking(tracked, folder, self.metrics, self.notes.append)

    @property
    def failures(self) -> dict[str, float]:
        self.tracking.report()
        return self.metrics.totals["tracker_failures_total"]

    def events(self) -> list[dict[str, Any]]:
        return files.read_json_lines(self.folder / "events.jsonl")


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "time": 12.5, **values}


def until(true: Callable[[], Any]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("never came true")


# ---- names


def test_every_number_has_one_name_that_all_libraries_take() -> None:
    values = {
        "reward": 1,
        "reward_component": {"gold": 0.5, "my reward/\u00e9": 2.0},
        "idle_seconds_total": {"learner/generator": 3.0},
        "nan": float("nan"),
        "infinite": float("-inf"),
        "text": "x",
        "nothing": None,
        "objective_term": {"x" * 300: 1.0},
    }
    result = tracking.flat(values)
    long = f"objective_term.{'x' * 300}"[:250]
    assert result == {
        "reward": 1.0,
        "reward_component.gold": 0.5,
        "reward_component.my_reward._": 2.0,
        "idle_seconds_total.learner.generator": 3.0,
        long: 1.0,
    }
    assert all(type(value) is float for value in result.values())


# ---- order


def test_a_tracker_hears_everything_in_order(tmp_path: Path, made: Made) -> None:
    tracked = Told(tmp_path, "wandb", "mlflow", "wandb", project="p", tags=["a", "b"])
    tracked.tracking.begin(0)
    with tracked.tracking:
        tracked.tracking.evaluated(0, {"step": 0.0, "proxy": 1.5, "gold": float("nan")})
        tracked.tracking.step(line(1, reward=0.5))
        tracked.tracking.step(line(2, reward=0.75, reward_component={"gold": 1.0}))
        tracked.tracking.begin(1)  # built again
        tracked.tracking.step(line(2, reward=0.8))
    assert len(made.trackers) == 2  # named twice, made once
    for tracker in made.trackers:
        assert tracker.told == [
            (0, {"evaluation/proxy": 1.5}),
            (1, {"reward/reward": 0.5}),
            (2, {"reward/reward": 0.75, "reward/reward_component.gold": 1.0}),
            ("rewind", 1),
            (2, {"reward/reward": 0.8}),
            "finished",
        ]
        run = tracker.run
        assert (run.name, run.project, run.tags, run.version) == ("test", "p", ("a", "b"), 0)
        assert run.directory == tmp_path and run.tensorboard_directory == tmp_path / "tensorboard"
        assert run.configuration["sampling.samples_per_prompt"] == 2
    assert tracked.failures == {} and tracked.notes == [] and tracked.events() == []


@pytest.mark.parametrize(
    ("error", "outcome"), [(ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted"), (None, "finished")]
)
def test_how_a_run_ended_is_told(tmp_path: Path, made: Made, error: BaseException | None, outcome: str) -> None:
    tracked = Told(tmp_path, "wandb")
    try:
        with tracked.tracking:
            tracked.tracking.begin(0)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert raised is error
    assert made.trackers[0].told == [outcome]


def test_a_run_without_trackers_has_no_thread_and_no_file(tmp_path: Path) -> None:
    before = threading.active_count()
    tracked = Told(tmp_path)
    with tracked.tracking:
        tracked.tracking.begin(0)
        tracked.tracking.step(line(1, reward=0.5))
        assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_event_files_has_the_name_of_the_run(tmp_path: Path, made: Made) -> None:
    settings = settings_for(tracking={"trackers": ["wandb"], "tensorboard_directory": "all/{name}"})
    for member in (None, 3):
        tracked = Tracking(settings, tmp_path, RunMetrics("t", tmp_path / "m"), print, member)
        tracked.begin(0)
        tracked.finish("finished")
    assert [(t.run.name, str(t.run.tensorboard_directory)) for t in made.trackers] == [
        ("test", "all/test"),
        ("test-3", "all/test-3"),
    ]


# ---- resuming


def test_a_resumed_run_is_the_same_run_and_another_directory_is_another(tmp_path: Path, made: Made) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for folder, version in (("one", 0), ("one", 7), ("two", 0)):
        tracked = Told(tmp_path / folder, "wandb")
        tracked.tracking.begin(version)
        tracked.tracking.finish("finished")
    first, again, other = (tracker.run for tracker in made.trackers)
    assert first.identity == again.identity != other.identity
    assert (first.version, again.version) == (0, 7)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_a_damaged_identity_begins_another_run(tmp_path: Path, made: Made, content: str) -> None:
    (tmp_path / "tracking.json").write_text(content)
    tracked = Told(tmp_path, "wandb")
    tracked.tracking.begin(0)
    tracked.tracking.finish("finished")
    assert json.loads((tmp_path / "tracking.json").read_text())["identity"] == made.trackers[0].run.identity


# ---- harm


def test_a_failure_is_counted_told_once_and_the_run_goes_on(tmp_path: Path, made: Made) -> None:
    def refuse(step: int) -> None:
        if step in (2, 3):
            raise OSError(f"https://me:{SECRET}@host:\nno route\x1b[1m")

    made.replace("wandb", refuse)
    tracked = Told(tmp_path, "wandb", "mlflow")
    tracked.tracking.begin(0)
    for step in (1, 2, 3, 4):
        tracked.tracking.step(line(step, reward=0.5))
        if step == 2:
            until(lambda: tracked.failures == {"wandb": 1.0})
    tracked.tracking.finish("finished")
    broken, sound = sorted(made.trackers, key=lambda tracker: len(tracker.told))
    assert [told[0] for told in broken.told[:-1]] == [1, 4] and broken.told[-1] == "finished"
    assert [told[0] for told in sound.told[:-1]] == [1, 2, 3, 4]
    assert tracked.failures == {"wandb": 2.0}
    (event,) = tracked.events()
    assert (event["event"], event["tracker"]) == ("tracker_failed", "wandb")
    assert event["reason"] == r"raised: OSError: https://...@host:\nno route\x1b[1m"
    assert tracked.notes == [f"tracker wandb: {event['reason']}; the run continues, metrics.jsonl has every number"]


def test_a_library_that_exits_is_counted_like_one_that_raises(tmp_path: Path, made: Made) -> None:
    made.replace("wandb", lambda step: sys.exit("no key") if step == 1 else None)
    tracked = Told(tmp_path, "wandb")
    tracked.tracking.begin(0)
    tracked.tracking.step(line(1, reward=0.5))
    tracked.tracking.step(line(2, reward=0.5))
    tracked.tracking.finish("finished")
    assert tracked.failures == {"wandb": 1.0} and [event["reason"] for event in tracked.events()] == [
        "raised: SystemExit: no key"
    ]
    assert made.trackers[0].told == [(2, {"reward/reward": 0.5}), "finished"]


def test_a_tracker_that_does_not_start_counts_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(run: TrackedRun) -> Tracker:
        raise ImportError("libx.so")

    monkeypatch.setitem(TRACKERS, "trackio", make)
    tracked = Told(tmp_path, "trackio")
    tracked.tracking.begin(0)
    tracked.tracking.step(line(1, reward=0.5))
    tracked.tracking.finish("finished")
    assert tracked.failures == {"trackio": 2.0}  # the start and the step
    assert [event["reason"] for event in tracked.events()] == ["did not start: ImportError: libx.so"]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    tracked = threading.Event()
    yield tracked
    tracked.set()


def test_a_blocked_tracker_holds_neither_the_run_nor_another_one(
    tmp_path: Path, made: Made, gate: threading.Event
) -> None:
    made.replace("wandb", lambda step: gate.wait(60))
    tracked = Told(tmp_path, "wandb", "mlflow", finish_seconds=5.0)
    steps = tracking.QUEUE_JOBS + 10
    tracked.tracking.begin(0)
    until(lambda: len(made.trackers) == 2)
    tracked.tracking.step(line(0, reward=0.5))
    until(lambda: any(tracker.told for tracker in made.trackers))  # the other one waits inside its first step
    started = time.monotonic()
    for step in range(1, steps + 1):
        tracked.tracking.step(line(step, reward=0.5))
        if step % 50 == 0:
            time.sleep(0.02)  # the free one keeps up; a learner step is longer
    took = time.monotonic() - started
    began = time.monotonic()
    tracked.tracking.finish("finished")
    assert time.monotonic() - began < 30 and took < 30
    assert sorted(len(tracker.told) for tracker in made.trackers) == [0, 1 + steps + 1]
    # step 0 is in the tracker, the queue is full of others but one that gave way to the end, which never came
    assert tracked.failures == {"wandb": steps - tracking.QUEUE_JOBS + 2.0}
    assert tracked.events()[0]["reason"] == f"{tracking.QUEUE_JOBS} steps wait for it already"


def test_an_interrupted_run_does_not_wait_long(
    tmp_path: Path, made: Made, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_INTERRUPTED_SECONDS", 0.2)
    made.replace("wandb", lambda step: gate.wait(60))
    tracked = Told(tmp_path, "wandb", finish_seconds=50)
    tracked.tracking.begin(0)
    tracked.tracking.step(line(1, reward=0.5))
    began = time.monotonic()
    tracked.tracking.finish("interrupted")
    assert time.monotonic() - began < 30
    assert tracked.notes[0].startswith("tracker wandb: did not finish in time; ")


# ---- secrets


def test_no_secret_leaves_the_machine() -> None:
    settings = settings_for(
        prompts={
            "source": "python:mine:rows",
            "options": {
                "api_key": SECRET,
                "nested": [{"hf_token": {"value": SECRET}}],
                "Password": SECRET,
                "address": f"postgres://me:{SECRET}@host/rows",
                "max_tokens": 7,
                "tokenizer": "seen",
            },
        },
        rewards=[{"name": "r", "kind": "http", "source": "http://h/x", "headers": {"X-Key": "Bearer ${NAME}"}}],
    )
    result = tracking.configuration(settings)
    assert SECRET not in json.dumps(result) and "NAME" not in json.dumps(result)
    assert result["rewards.0.headers.X-Key"] == result["prompts.options.api_key"] == "(not shown)"
    assert result["prompts.options.address"] == "postgres://...@host/rows"
    assert (result["prompts.options.max_tokens"], result["prompts.options.tokenizer"]) == (7, "seen")
    hidden = {name for name, value in result.items() if value == "(not shown)"}
    assert len(hidden) == 4, hidden  # no setting of ours is hidden by its name
    assert all(len(name) <= 250 for name in result)


# ---- what is installed


def test_a_package_that_is_missing_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    settings = TrackingSettings(trackers=["wandb"])
    expected = 'tracking.trackers=wandb: the package wandb is not installed; expected pip install "keel-rlhf[wandb]"'
    for folder_of_that_name in (False, True):  # where runs of the library left their files
        if folder_of_that_name:
            (tmp_path / "wandb").mkdir()
        with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
            tracking.check(settings)
        assert str(caught.value) == expected
    (tmp_path / "wandb" / "__init__.py").write_text("raise ImportError")
    tracking.check(settings)
    assert "wandb" not in sys.modules


WITHOUT = """
import sys
from pathlib import Path
from types import SimpleNamespace
import keel.cli.main, keel.online.train, keel.stages.policy, keel.stages.reward
from keel.observability.metrics import RunMetrics
from keel.online.recorder import Recorder
from fakes import settings_for
from quiet_display import Quiet
folder = Path(sys.argv[1])
prepared = SimpleNamespace(settings=settings_for(), directory=folder)
recorder = Recorder(prepared, RunMetrics("test", folder / "metrics.jsonl"), Quiet())
with recorder.tracking:
    recorder.begin(1, 0)
    recorder.step(1)
for name in ("tensorboard", "wandb", "mlflow", "trackio"):
    assert name not in sys.modules, name
import wandb  # it would have been found
"""


def test_a_run_without_trackers_imports_none_of_the_libraries(tmp_path: Path) -> None:
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").touch()
    places = [tmp_path / "site", Path(__file__).parents[2] / "support", Path(__file__).parents[3] / "system"]
    program = f"import sys; sys.path[:0] = {[str(place) for place in places]!r}\n{WITHOUT}"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the recorder


async def test_the_recorder_tells_what_it_writes(tmp_path: Path, made: Made) -> None:
    prepared = SimpleNamespace(settings=settings_for(tracking={"trackers": ["wandb"]}), directory=tmp_path)
    recorder = Recorder(cast(Prepared, prepared), RunMetrics("test", tmp_path / "metrics.jsonl"), Listener())
    batch = scored(referenced(generated(prompts([0, 1]))))
    with recorder.tracking:
        recorder.begin(1, 0)
        await recorder.evaluated(0, batch)
        recorder.set({"loss": 0.25, "reward_component": {"gold": 2.0}})
        recorder.step(1)
        recorder.begin(1, 1)
    (first, second, *rest) = made.trackers[0].told
    assert rest == [("rewind", 1), "finished"]
    assert first[0] == 0 and {"evaluation/proxy", "evaluation/kl_nats", "evaluation/n"} <= set(first[1])
    (written,) = files.read_json_lines(tmp_path / "metrics.jsonl")
    assert second[0] == 1 and second[1]["train/loss"] == 0.25 and second[1]["reward/reward_component.gold"] == 2.0
    assert (
        second[1]["perf/steps_wanted"] == written["steps_wanted"]
        and "time" not in second[1]
        and "step" not in second[1]
    )
    numbers = [value for value in written.values() if not isinstance(value, dict)]
    numbers += [number for value in written.values() if isinstance(value, dict) for number in value.values()]
    assert len(second[1]) == len(numbers) - 2


# ---- stages


async def test_a_stage_tells_its_trackers_also_when_it_is_resumed(tmp_path: Path, made: Made) -> None:
    plan = offline_run_of(tmp_path, steps=4, checkpoints=2)
    tracked = plan.settings.model_copy(update={"tracking": TrackingSettings(trackers=["wandb"])})
    plan = dataclasses.replace(plan, settings=tracked)
    with pytest.raises(Killed, match="at step 4"):
        await OfflineRun(plan, FakeOfflineLearner([5.0, 4.0, 3.0, 2.0, 1.0], killed_at=4)).finish()
    await OfflineRun(plan, FakeOfflineLearner([5.0, 4.0, 3.0, 2.0, 1.0])).finish()
    broken, whole = made.trackers
    held_out = {"evaluation/loss": 5.0, "evaluation/preference_accuracy_ratio": 0.25}
    assert broken.told[0] == (0, held_out) and [told[0] for told in broken.told[1:-1]] == [1, 2, 3]
    assert broken.told[-1] == "failed"
    assert whole.run.version == 2 and whole.run.identity == broken.run.identity
    assert [told[0] for told in whole.told[:-1]] == [3, 4, 4] and whole.told[-1] == "finished"
    assert whole.told[0][1]["train/loss"] == 1 / 3 and whole.told[-2] == (4, held_out | {"evaluation/loss": 1.0})


async def test_every_member_of_an_ensemble_is_a_run(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, tracking={"trackers": ["wandb"]})
    await stage.train(FakeRankGroup(LOSSES))
    first, second = made.trackers
    name = stage.settings.run.name
    assert (first.run.name, second.run.name) == (f"{name}-0", f"{name}-1")
    assert first.run.identity != second.run.identity and first.run.directory == stage.member(0)
    assert first.told[-1] == second.told[-1] == "finished"
