"""The loop of one offline run, from the start model to a model folder; resuming takes the same path.

version -> step(rows of the step) -> version + 1     metrics.jsonl, Prometheus
             |  when due: held-out loss -> evaluations.jsonl; the best model so far is kept aside
             |  when due: checkpoint (learner, state.json, COMMIT)
until the last step, or until `patience` evaluations brought no lower held-out loss
             -> RUN_DIR/model (Hugging Face folder), RUN_DIR/stage.json (the summary)
"""

import asyncio
import contextlib
import math
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import psutil
import pyarrow as pa

from keel import checkpoint, files
from keel.cluster import actors
from keel.cluster.learner_group import RankGroup
from keel.config import loader
from keel.config.stages import StageSettings
from keel.errors import ConfigError
from keel.observability import endpoint
from keel.observability.console import Display
from keel.observability.metrics import RunMetrics
from keel.observability.tracking import Tracking
from keel.online.controller import Stalled
from keel.protocols import StepReport

_LABELS = ("reward", "reward_std", "finished_ratio")  # constant over stored rows


class OfflineLearner(Protocol):
    """The methods that an offline run calls on every rank of its learner group."""

    def step(self, batch: pa.RecordBatch) -> StepReport: ...

    def assess(self, batch: pa.RecordBatch) -> dict[str, float]: ...

    def save(self, directory: str) -> None: ...

    def restore_checkpoint(self, directory: str) -> int: ...

    def export(self, folder: str) -> None: ...

    def state(self) -> dict[str, Any]: ...


Learner = TypeVar("Learner")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
OfflineGroup = RankGroup[OfflineLearner]


@dataclass
class State:
    """The state of an offline run beside the weights, as a checkpoint stores it."""

    version: int = 0
    best_loss: float | None = None
    best_version: int = 0
    waited: int = 0
    """Evaluations since the best one."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    digest: str = ""
    """Digest of the rows that the run began with."""


@dataclass(frozen=True)
class OfflineRun:
    """One training run on stored rows: its batches, its length and its directory."""

    settings: StageSettings
    directory: Path
    steps: int
    rows: int
    """Training rows of one epoch."""
    batch: Callable[[int], pa.RecordBatch]
    held_out: pa.RecordBatch
    dropped: Mapping[str, int]
    digest: str = ""
    """Digest of the rows."""
    member: int | None = None
    """Number of the ensemble member that is trained."""

    @property
    def model(self) -> Path:
        return self.directory / "model"


class OfflineRecorder:
    """Record steps and evaluations: metrics, files, trackers and the display."""

    def __init__(self, offline_run: OfflineRun, metrics: RunMetrics, display: Display) -> None:
        self.offline_run, self.metrics, self.display = offline_run, metrics, display
        self.tracking = Tracking(offline_run.settings, offline_run.directory, metrics, display.note, offline_run.member)

    def step(self, report: StepReport) -> None:
        numbers = {name: value for name, value in report.metrics.items() if name not in _LABELS}
        tokens = numbers.pop("trained_tokens", 0.0)
        epochs = report.version * self.offline_run.settings.training.rows_per_step / self.offline_run.rows
        memory = float(psutil.virtual_memory().available)
        self.metrics.set({**numbers, "epochs": epochs, "version": float(report.version), "free_memory_bytes": memory})
        counts = {"steps_total": 1.0, "trained_tokens_total": tokens, "learner_seconds_total": numbers["step_seconds"]}
        self.metrics.add({**counts, **report.counts})
        self.tracking.report()
        line = self.metrics.record(report.version, time.time())
        self.display.step(line)
        self.tracking.step(line)

    def evaluated(self, version: int, evaluation: Mapping[str, float]) -> None:
        files.append_json(self.offline_run.directory / "evaluations.jsonl", {"step": version, **evaluation})
        self.tracking.evaluated(version, evaluation)
        gauges = {"held_out_loss": evaluation["loss"]}
        if "preference_accuracy_ratio" in evaluation:
            gauges["held_out_accuracy_ratio"] = evaluation["preference_accuracy_ratio"]
        self.metrics.set(gauges)
        self.metrics.add({"evaluations_total": 1.0})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in evaluation.items() if name in _SHOWN)
        self.display.note(f"held out at step {version}: {shown}")


_SHOWN = ("loss", "preference_accuracy_ratio", "implicit_margin", "chosen_log_ratio_nats", "rejected_log_ratio_nats")


Train = Callable[[RunMetrics, Display, float], Coroutine[Any, Any, dict[str, Any]]]
"""(metrics, display, start time) -> the summary for stage.json."""


def conduct(settings: StageSettings, directory: Path, digest: str, train: Train, display: Display) -> dict[str, Any]:
    """Run a stage unless it is finished; returns the summary in stage.json."""
    started = time.monotonic()
    if done := finished(directory):
        check_rows(directory, done["digest"], digest)
        display.note(f"{directory} holds this stage, finished")
        return done
    files.make_folder(directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.lock(directory))
        files.write(directory / "config.yaml", loader.dump(settings).encode())
        metrics = RunMetrics(settings.run.name, directory / "metrics.jsonl")
        page = endpoint.serving(settings.metrics, settings.run.name, directory, metrics.page)
        display.note(f"metrics: {stack.enter_context(page)}")
        display.doing("starting Ray, learner")
        display.note(stack.enter_context(actors.joined(settings, {"learner": settings.learners.count})))
        return asyncio.run(train(metrics, display, started))


async def ready(settings: StageSettings, learner: RankGroup[Any]) -> None:
    """Wait until all ranks have started. Raises Stalled after deadlines.start_seconds."""
    seconds = settings.deadlines.start_seconds
    try:
        async with asyncio.timeout(seconds):
            await learner.ready()
    except TimeoutError:
        placement = learner.placement
        why = "" if placement.placed() else f": no resources for {placement.asked()}; {placement.free()}"
        raise Stalled(f"the learner did not start within {seconds:.0f} s (deadlines.start_seconds){why}") from None


async def run(offline_run: OfflineRun, learner: OfflineGroup, recorder: OfflineRecorder, state: State) -> State:
    """Train to the last step or the end of patience and leave the model in the run's directory."""
    recorder.tracking.begin(state.version)
    with recorder.tracking:
        return await _loop(offline_run, learner, recorder, state)


async def _loop(offline_run: OfflineRun, learner: OfflineGroup, recorder: OfflineRecorder, state: State) -> State:
    training = offline_run.settings.training
    if not state.evaluations:
        await _evaluate(offline_run, learner, recorder, state)
    while state.version < offline_run.steps and not _out_of_patience(offline_run, state):
        recorder.step(await call(offline_run, learner, OfflineLearner.step, offline_run.batch(state.version)))
        state.version += 1
        last = state.version == offline_run.steps
        if last or (training.evaluate_every_steps and state.version % training.evaluate_every_steps == 0):
            await _evaluate(offline_run, learner, recorder, state)
        every = offline_run.settings.checkpoint.every_steps
        if every and state.version % every == 0 and not last:
            await save(offline_run, learner, recorder, state)
    if not training.patience:
        await _export(offline_run, learner)
    return state


async def call(
    offline_run: OfflineRun,
    learner: RankGroup[Learner],
    method: Callable[Concatenate[Learner, Arguments], Result],
    *arguments: Arguments.args,
    **options: Arguments.kwargs,
) -> Result:
    """Call a method of the learner on all ranks. Raises Stalled after deadlines.step_seconds."""
    seconds = offline_run.settings.deadlines.step_seconds
    try:
        async with asyncio.timeout(seconds):
            return await learner.call(method, *arguments, **options)
    except TimeoutError:
        asked = f"the learner did not answer {method.__name__}"
        raise Stalled(f"{asked} within {seconds:.0f} s (deadlines.step_seconds)") from None


def _out_of_patience(offline_run: OfflineRun, state: State) -> bool:
    return 0 < offline_run.settings.training.patience <= state.waited


async def _evaluate(offline_run: OfflineRun, learner: OfflineGroup, recorder: OfflineRecorder, state: State) -> None:
    evaluation = await call(offline_run, learner, OfflineLearner.assess, offline_run.held_out)
    state.evaluations.append({"step": float(state.version), **evaluation})
    recorder.evaluated(state.version, evaluation)
    if state.best_loss is None and not math.isfinite(evaluation["loss"]):
        raise FloatingPointError(f"step {state.version}: the held-out loss is {evaluation['loss']}")
    if state.best_loss is not None and not evaluation["loss"] < state.best_loss:  # also if it is NaN
        state.waited += 1
        return
    state.best_loss, state.best_version, state.waited = evaluation["loss"], state.version, 0
    if offline_run.settings.training.patience:
        await _export(offline_run, learner)


async def _export(offline_run: OfflineRun, learner: OfflineGroup) -> None:
    """Replace the model of the run by the current one, atomically."""
    target = offline_run.model
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    files.make_folder(aside.parent)
    await call(offline_run, learner, OfflineLearner.export, str(aside))
    files.replace_folder(aside, target)


async def save(offline_run: OfflineRun, learner: OfflineGroup, recorder: OfflineRecorder, state: State) -> None:
    aside = checkpoint.begin(offline_run.directory, state.version)
    await call(offline_run, learner, OfflineLearner.save, str(aside))
    recorder.metrics.add({"checkpoints_total": 1.0})
    objective = await call(offline_run, learner, OfflineLearner.state)
    checkpoint.commit(aside, {**asdict(state), "totals": recorder.metrics.totals, "objective": objective})
    files.append_json(
        offline_run.directory / "events.jsonl", {"event": "checkpoint", "time": time.time(), "step": state.version}
    )
    checkpoint.prune(offline_run.directory, offline_run.settings.checkpoint.keep)


async def restore(offline_run: OfflineRun, learner: OfflineGroup, recorder: OfflineRecorder) -> State:
    """Load the newest intact checkpoint into learner and counters and return its state; a new state without one.

    Raises ConfigError if a committed checkpoint is missing, or if the rows differ from those the run began with.
    """
    saved, state, damaged = checkpoint.newest_intact(offline_run.directory)
    stored = state or {"version": -1}
    for name in damaged:
        recorder.display.note(f"{name} is damaged and was put aside; {saved} is used")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        files.keep_steps(offline_run.directory / name, stored["version"])
    files.bring_back(offline_run.model)
    if saved is None:
        return State(digest=offline_run.digest)
    check_rows(offline_run.directory, stored["digest"], offline_run.digest)
    await call(offline_run, learner, OfflineLearner.restore_checkpoint, str(saved))
    metrics = recorder.metrics  # which have counted the dropped rows again
    metrics.restore({**stored["totals"], "rows_dropped_total": metrics.totals["rows_dropped_total"]})
    return State(**{name: stored[name] for name in State.__dataclass_fields__})


def kept(offline_run: OfflineRun, state: State) -> int:
    """The step whose model the run leaves."""
    return state.best_version if offline_run.settings.training.patience else state.version


def check_rows(directory: Path, stored: str, digest: str) -> None:
    """Refuse a directory whose stage was trained on other rows. Raises ConfigError."""
    if stored != digest:
        raise ConfigError(
            f"run.directory={directory}: holds this stage on other rows of its source; expected another run.name"
        )


def finished(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished stage; None for an unfinished one. Raises ConfigError, as `checkpoint.stage`."""
    return checkpoint.stage(directory)


def mark(directory: Path, names: Sequence[str], summary: Mapping[str, Any]) -> None:
    """Seal the named outputs by their digests, then write stage.json, the mark of a finished stage."""
    checkpoint.seal(directory, names)
    files.write_json(directory / "stage.json", summary)


def finish(offline_run: OfflineRun, stage: str, started: float, **results: Any) -> dict[str, Any]:
    """Mark the stage as finished and delete its checkpoints."""
    summary = {"stage": stage, "steps": offline_run.steps, "rows": offline_run.rows}
    summary |= {"dropped": dict(offline_run.dropped), "digest": offline_run.digest, **results}
    summary["seconds"] = round(time.monotonic() - started, 1)
    mark(offline_run.directory, [offline_run.model.name], summary)
    shutil.rmtree(offline_run.directory / "checkpoints", ignore_errors=True)
    return summary
