"""Replays one learner step from the files of a run: the same rows on the same weights give the same numbers.

newest checkpoint before the step (or the start model) -> the steps between, from rollouts/ -> the step
    rows: quarantine/step-N.arrow if the learner refused them, else rollouts/step-N.arrow
    multipliers of the guard: quarantine/step-N.json, else metrics.jsonl
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from keel import checkpoint, files, reads, references, schema
from keel.cluster import actors, learner_group
from keel.config import loader
from keel.errors import ConfigError, NotFinite
from keel.observability.console import Display
from keel.online import preflight
from keel.online.preflight import Prepared


@dataclass(frozen=True)
class Replayed:
    """The result of a replayed step."""

    step: int
    start: int
    """Version of the weights the replay began with."""
    refused: str | None
    """Why the learner refuses the rows; None: it steps."""
    numbers: Mapping[str, tuple[float | None, float]]
    """Metric -> value in metrics.jsonl (None: it has no such step), and value of the replay."""


def run(run_directory: Path, step: int, display: Display) -> Replayed:
    """Make a step again on the run's own learner settings; nothing in the run directory changes.

    Raises ConfigError for a step whose rows, or the rows between it and a checkpoint, are not there.
    """
    stored = loader.stored_config(run_directory, f"RUN_DIR={run_directory}", kind="an online run")
    settings = loader.load(stored, [f"run.directory={run_directory}", "metrics.port=0"])
    start = max((version for version in checkpoint.steps(run_directory) if version < step), default=0)
    inputs = [_inputs(run_directory, number, ("rollouts",)) for number in range(start + 1, step)]
    inputs.append(_inputs(run_directory, step, ("quarantine", "rollouts")))
    prepared = preflight.prepare(settings)
    for line in prepared.notes:
        display.note(line)
    display.doing("starting Ray, learner")
    with actors.joined(settings, {"learner": settings.learners.count}):
        report, refused = asyncio.run(_replay(prepared, start, inputs, display))
    return Replayed(step, start, refused, _beside(run_directory, step, report))


def _inputs(run_directory: Path, step: int, folders: tuple[str, ...]) -> tuple[pa.RecordBatch, tuple[float, float]]:
    """The rows of a step, and what the guard multiplied KL coefficient and learning rate by in it."""
    for folder in folders:
        path = run_directory / folder / f"step-{step:06d}.arrow"
        if path.is_file():
            why = path.with_suffix(".json")  # of a refused step, which has no line in metrics.jsonl
            numbers = reads.read_json(why) if reads.is_there(why) else _line(run_directory, step)
            factors = (numbers.get(f"guard_{name}_multiplier", 1.0) for name in ("kl", "learning_rate"))
            return schema.from_bytes(reads.read(path)), (next(factors), next(factors))
    raise ConfigError(f"--step {step}: {run_directory} has no rows of step {step}; expected a step of its rollouts/")


async def _replay(
    prepared: Prepared, start: int, inputs: list[tuple[pa.RecordBatch, tuple[float, float]]], display: Display
) -> tuple[Mapping[str, Any], str | None]:
    settings, directory = prepared.settings, prepared.directory
    learner = learner_group.LearnerGroup(settings, prepared.models.policy, prepared.models.frozen)
    async with asyncio.timeout(settings.deadlines.start_seconds + settings.deadlines.step_seconds):
        await learner.ready()
        if start:
            await learner.restore_checkpoint(str(checkpoint.folder_of(directory, start)))
    metrics: Mapping[str, Any] = {}
    for version, (batch, multipliers) in enumerate(inputs, start):
        display.note(f"step {version + 1} from version {version}")
        reference = references.of_version(directory, settings.reference_iteration_steps, version)
        try:
            async with asyncio.timeout(settings.deadlines.step_seconds):
                if reference:
                    checkpoint.check(reference)
                    await learner.renew_reference(str(reference))
                await learner.set_multipliers(*multipliers)
                metrics = (await learner.step(batch)).metrics
        except NotFinite as error:
            return {}, str(error)
    return metrics, None


def _line(run_directory: Path, step: int) -> Mapping[str, Any]:
    lines = files.read_json_lines(run_directory / "metrics.jsonl")
    return next((line for line in lines if line["step"] == step), {})


def _beside(run_directory: Path, step: int, report: Mapping[str, Any]) -> dict[str, tuple[float | None, float]]:
    """Numbers of the report beside those the run wrote; times are left out."""
    then = _line(run_directory, step)
    numbers = {name: value for name, value in report.items() if isinstance(value, float) and "seconds" not in name}
    return {name: (then.get(name), value) for name, value in sorted(numbers.items())}
