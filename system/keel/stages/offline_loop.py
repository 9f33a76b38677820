"""One offline course of training, from the start model to a model folder; resuming is the same path.

version -> step(rows of the step) -> version + 1     metrics.jsonl, Prometheus
             |  when due: held-out loss -> evaluations.jsonl; the best model so far is kept aside
             |  when due: checkpoint (learner, state.json, COMMIT)
until the last step, or until `patience` evaluations brought no lower held-out loss
             -> RUN_DIR/model (Hugging Face folder), RUN_DIR/stage.json: what was done
"""

import asyncio
import math
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import pyarrow as pa

from keel import checkpoint, files
from keel.cluster import actors
from keel.cluster.learner_group import RankGroup
from keel.config import loader
from keel.config.run import Settings
from keel.config.stages import StageSettings
from keel.errors import ConfigError
from keel.observability import endpoint
from keel.observability.metrics import RunMetrics
from keel.observability.tracking import Tracking
from keel.online.controller import Stalled
from keel.online.recorder import Display

_LABELS = ("reward", "reward_std", "finished_ratio")  # of stored rows: no news


class Trainee(Protocol):
    """Ranks that move together: `step`, `assess`, `save`, `load`, `export` on all of them."""

    async def call(self, method: str, *arguments: Any) -> Any: ...


@dataclass
class State:
    """What a resumed course needs beside the weights."""

    version: int = 0
    best_loss: float | None = None
    best_version: int = 0
    waited: int = 0
    """Evaluations since the best."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    digest: str = ""
    """Of the rows it began with."""


@dataclass(frozen=True)
class Course:
    """What is trained on, how long, and where it is kept."""

    settings: StageSettings
    directory: Path
    steps: int
    rows: int
    """Training rows of one epoch."""
    batch: Callable[[int], pa.RecordBatch]
    held_out: pa.RecordBatch
    dropped: Mapping[str, int]
    digest: str = ""
    """Of the rows."""
    member: int | None = None
    """Which one of an ensemble it trains."""

    @property
    def model(self) -> Path:
        return self.directory / "model"


class Recorder:
    """Puts numbers into metrics, files and the display."""

    def __init__(self, course: Course, metrics: RunMetrics, display: Display) -> None:
        self.course, self.metrics, self.display = course, metrics, display
        self.tracking = Tracking(course.settings, course.directory, metrics, display.note, course.member)

    def step(self, report: Any) -> None:
        numbers = {name: value for name, value in report.metrics.items() if name not in _LABELS}
        tokens = numbers.pop("trained_tokens", 0.0)
        epochs = report.version * self.course.settings.training.rows_per_step / self.course.rows
        memory = float(psutil.virtual_memory().available)
        self.metrics.set({**numbers, "epochs": epochs, "version": float(report.version), "free_memory_bytes": memory})
        counts = {"steps_total": 1.0, "trained_tokens_total": tokens, "learner_seconds_total": numbers["step_seconds"]}
        self.metrics.add({**counts, **report.counts})
        self.tracking.report()
        line = self.metrics.record(report.version, time.time())
        self.display.step(line)
        self.tracking.step(line)

    def evaluated(self, version: int, found: Mapping[str, float]) -> None:
        files.append_json(self.course.directory / "evaluations.jsonl", {"step": version, **found})
        self.tracking.evaluated(version, found)
        gauges = {"held_out_loss": found["loss"]}
        if "preference_accuracy_ratio" in found:
            gauges["held_out_accuracy_ratio"] = found["preference_accuracy_ratio"]
        self.metrics.set(gauges)
        self.metrics.add({"evaluations_total": 1.0})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items() if name in _SHOWN)
        self.display.note(f"held out at step {version}: {shown}")


_SHOWN = ("loss", "preference_accuracy_ratio", "implicit_margin", "chosen_log_ratio_nats", "rejected_log_ratio_nats")


Train = Callable[[RunMetrics, Display, float], Coroutine[Any, Any, dict[str, Any]]]
"""Metrics, display, when the stage started -> what stage.json says."""


def conduct(
    settings: StageSettings, directory: Path, digest: str, online: Settings, train: Train, display: Display
) -> dict[str, Any]:
    """Run a stage on a cluster sized for `online`, unless it is finished; what stage.json says."""
    started = time.monotonic()
    if done := finished(directory):
        check_rows(directory, done["digest"], digest)
        display.note(f"{directory} holds this stage, finished")
        return done
    files.make_folder(directory)
    with files.lock(directory):
        return _conduct(settings, directory, online, train, display, started)


def _conduct(
    settings: StageSettings, directory: Path, online: Settings, train: Train, display: Display, started: float
) -> dict[str, Any]:
    files.write(directory / "config.yaml", loader.dump(settings).encode())
    metrics = RunMetrics(settings.run.name, directory / "metrics.jsonl")
    with endpoint.serving(settings.metrics, settings.run.name, directory, metrics.page) as url:
        display.note(f"metrics: {url}")
        display.doing("starting Ray, learner")
        with actors.joined(online, {"learner": online.learners.count}) as ray:
            display.note(ray)
            return asyncio.run(train(metrics, display, started))


async def ready(settings: StageSettings, learner: RankGroup) -> None:
    """All ranks are up within their deadline. Raises Stalled."""
    seconds = settings.deadlines.start_seconds
    try:
        async with asyncio.timeout(seconds):
            await learner.ready()
    except TimeoutError:
        placement = learner.placement
        why = "" if placement.placed() else f": no resources for {placement.asked()}; {placement.free()}"
        raise Stalled(f"the learner did not start within {seconds:.0f} s (deadlines.start_seconds){why}") from None


async def run(course: Course, trainee: Trainee, recorder: Recorder, state: State, target: Path) -> State:
    """Train to the last step or the end of patience; the model lies at `target` then."""
    recorder.tracking.begin(state.version)
    with recorder.tracking:
        return await _to_the_end(course, trainee, recorder, state, target)


async def _to_the_end(course: Course, trainee: Trainee, recorder: Recorder, state: State, target: Path) -> State:
    training = course.settings.training
    if not state.evaluations:
        await _evaluate(course, trainee, recorder, state, target)
    while state.version < course.steps and not _out_of_patience(course, state):
        recorder.step(await call(course, trainee, "step", course.batch(state.version)))
        state.version += 1
        last = state.version == course.steps
        if last or (training.evaluate_every_steps and state.version % training.evaluate_every_steps == 0):
            await _evaluate(course, trainee, recorder, state, target)
        every = course.settings.checkpoint.every_steps
        if every and state.version % every == 0 and not last:
            await save(course, trainee, recorder, state)
    if not training.patience:
        await _export(course, trainee, target)
    return state


async def call(course: Course, trainee: Trainee, method: str, *arguments: Any) -> Any:
    """A method of the learner within its deadline. Raises Stalled."""
    seconds = course.settings.deadlines.step_seconds
    try:
        async with asyncio.timeout(seconds):
            return await trainee.call(method, *arguments)
    except TimeoutError:
        raise Stalled(f"the learner did not answer {method} within {seconds:.0f} s (deadlines.step_seconds)") from None


def _out_of_patience(course: Course, state: State) -> bool:
    return 0 < course.settings.training.patience <= state.waited


async def _evaluate(course: Course, trainee: Trainee, recorder: Recorder, state: State, target: Path) -> None:
    found = await call(course, trainee, "assess", course.held_out)
    state.evaluations.append({"step": float(state.version), **found})
    recorder.evaluated(state.version, found)
    if state.best_loss is None and not math.isfinite(found["loss"]):
        raise FloatingPointError(f"step {state.version}: the held-out loss is {found['loss']}")
    if state.best_loss is not None and not found["loss"] < state.best_loss:  # also where it is no number
        state.waited += 1
        return
    state.best_loss, state.best_version, state.waited = found["loss"], state.version, 0
    if course.settings.training.patience:
        await _export(course, trainee, target)


async def _export(course: Course, trainee: Trainee, target: Path) -> None:
    """The model of now at `target`, whole or as it was."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    files.make_folder(aside.parent)
    await call(course, trainee, "export", str(aside))
    files.replace_folder(aside, target)


async def save(course: Course, trainee: Trainee, recorder: Recorder, state: State) -> None:
    aside = checkpoint.begin(course.directory, state.version)
    await call(course, trainee, "save", str(aside))
    recorder.metrics.add({"checkpoints_total": 1.0})
    objective = await call(course, trainee, "state")
    checkpoint.commit(aside, {**asdict(state), "totals": recorder.metrics.totals, "objective": objective})
    files.append_json(
        course.directory / "events.jsonl", {"event": "checkpoint", "time": time.time(), "step": state.version}
    )
    checkpoint.prune(course.directory, course.settings.checkpoint.keep)


async def restore(course: Course, trainee: Trainee, recorder: Recorder) -> State:
    """The state of the newest checkpoint, learner and counters with it; a fresh one without.

    Raises ConfigError where a commit that the stage made is gone, or its rows are other ones.
    """
    saved, state, damaged = checkpoint.newest_intact(course.directory)
    stored = state or {"version": -1}
    for name in damaged:
        recorder.display.note(f"{name} is damaged and was put aside; {saved} is used")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        files.keep_steps(course.directory / name, stored["version"])
    files.bring_back(course.model)
    if saved is None:
        return State(digest=course.digest)
    check_rows(course.directory, stored["digest"], course.digest)
    await call(course, trainee, "load", str(saved))
    # rows left out are counted at every start
    metrics = recorder.metrics
    metrics.restore({**stored["totals"], "rows_dropped_total": metrics.totals["rows_dropped_total"]})
    return State(**{name: stored[name] for name in State.__dataclass_fields__})


def kept(course: Course, state: State) -> int:
    """The step whose model the course leaves."""
    return state.best_version if course.settings.training.patience else state.version


def check_rows(directory: Path, stored: str, digest: str) -> None:
    """What lies there was made from these rows. Raises ConfigError."""
    if stored != digest:
        raise ConfigError(
            f"run.directory={directory}: holds this stage on other rows of its source; expected another run.name"
        )


def finished(directory: Path) -> dict[str, Any] | None:
    """What a stage that reached its end says of itself; None: it has not. Raises ConfigError, as `checkpoint.stage`."""
    return checkpoint.stage(directory)


def mark(directory: Path, names: Sequence[str], summary: Mapping[str, Any]) -> None:
    """Write stage.json, the mark of a finished stage, once what it vouches for is on the disk and has its digests."""
    checkpoint.seal(directory, names)
    files.write_json(directory / "stage.json", summary)


def finish(course: Course, stage: str, started: float, **said: Any) -> dict[str, Any]:
    """Mark the stage as finished; checkpoints are needed no more."""
    summary = {"stage": stage, "steps": course.steps, "rows": course.rows, "dropped": dict(course.dropped)}
    summary |= {"digest": course.digest, **said}
    summary["seconds"] = round(time.monotonic() - started, 1)
    mark(course.directory, [course.model.name], summary)
    shutil.rmtree(course.directory / "checkpoints", ignore_errors=True)
    return summary
