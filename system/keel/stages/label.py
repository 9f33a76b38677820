"""`keel label`: completions of a policy, or the rollouts of runs, and a judge -> preference pairs in Parquet.

    prompts -> generators  \\
                             judge -> preference_labels.py -> RUN_DIR/pairs.parquet, completions.arrow, stage.json
    RUN/rollouts/*.arrow   /
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keel import files, reads, schema
from keel.cluster import actors
from keel.config import loader
from keel.config.label import LabelSettings
from keel.config.stages import SamplingSpec, ScoringSpec
from keel.errors import ConfigError, KeelError
from keel.observability.console import Display
from keel.online import preflight
from keel.online.models import Models, resolve, resolve_reference, with_reference
from keel.rollout import preference_labels
from keel.stages import offline_loop, sampling

_ROLLOUT = ("seed", "prompt_id", "prompt", "prompt_messages", "completion", "completion_tokens", "finish_reason")
_SCORED = ("reward", "reference_", "relevance_", "score", "failure")


@dataclass(frozen=True)
class Labeling:
    """A checked stage: completions to sample or those of runs, and what judges them."""

    settings: LabelSettings
    spec: ScoringSpec
    directory: Path
    models: Models | None
    """The policy that samples; None where `rollouts` are judged."""
    reference: str | None
    prompts: pa.RecordBatch | None
    rollouts: pa.RecordBatch | None
    notes: tuple[str, ...] = ()
    """Lines that the stage prints at its start."""

    @property
    def completions(self) -> int:
        rows = self.prompts if self.prompts is not None else self.rollouts
        assert rows is not None
        return rows.num_rows


def prepare(settings: LabelSettings) -> Labeling:
    """Check model, prompts or rollouts, judge, memory and run directory. Raises ConfigError, one line."""
    directory = preflight.check_place(settings)
    spec = settings.scoring_spec()
    preflight.check_reward_source(settings.judge, "judge.source")
    for monitor in settings.monitors:
        preflight.check_reward_source(monitor, f"monitors.{monitor.name}.source")
    if isinstance(spec, SamplingSpec):
        models = with_reference(resolve(spec), spec)
        source = preflight.check_prompts(spec, models)
        count = min(settings.max_prompts or source.counts["train"], source.counts["train"])
        prompts = source.batch(range(count))
        return Labeling(settings, spec, directory, models, models.reference, prompts, None, models.notes)
    rollouts = _rollouts(settings.runs)
    preflight.check_rewards(spec, rollouts)
    if settings.reference is None:
        return Labeling(settings, spec, directory, None, None, None, rollouts)
    lengths = schema.lengths(rollouts, "prompt_tokens") + schema.lengths(rollouts, "completion_tokens")
    reference, notes = resolve_reference(settings.reference.model or "", int(lengths.max()))
    return Labeling(settings, spec, directory, None, reference, None, rollouts, tuple(notes))


def _rollouts(runs: Sequence[str]) -> pa.RecordBatch:
    """Read every rollout of the runs, with tickets that differ from step to step. Raises ConfigError."""
    parts: list[pa.RecordBatch] = []
    for run in runs:
        paths = sorted((Path(run) / "rollouts").glob("step-*.arrow"))
        if not paths:
            raise ConfigError(f"runs={run}: no rollouts/step-*.arrow in it; expected the directory of a run")
        for file in paths:
            batch = schema.from_bytes(reads.read(file))
            if missing := [name for name in _ROLLOUT if name not in batch.schema.names]:
                raise ConfigError(
                    f"runs={run}: {file.name} has no column {missing[0]}; expected rollouts of this version"
                )
            kept = [name for name in batch.schema.names if not name.startswith(_SCORED)]
            groups = pa.array(batch.column("ticket").to_numpy() + len(parts) * 2**40, pa.int64())
            parts.append(batch.select(kept).set_column(kept.index("ticket"), batch.schema.field("ticket"), groups))
    shared = [name for name in parts[0].schema.names if all(name in part.schema.names for part in parts)]
    return schema.concat([part.select(shared).replace_schema_metadata(None) for part in parts])


def run(prepared: Labeling, display: Display) -> dict[str, Any]:
    """Sample (unless there are rollouts), judge, pair and write, unless the stage is finished; returns its summary.

    Raises ConfigError for a directory that another process uses, NoPairs, JudgeFailed, or what an actor raised.
    """
    started = time.monotonic()
    directory = prepared.directory
    if done := offline_loop.finished(directory):
        display.note(f"{directory} holds this stage, finished")
        return done
    files.make_folder(directory)
    with files.lock(directory):
        return _label(prepared, display, started)


def _label(prepared: Labeling, display: Display, started: float) -> dict[str, Any]:
    directory, settings = prepared.directory, prepared.settings
    files.write(directory / "config.yaml", loader.dump(settings).encode())
    for line in prepared.notes:
        display.note(line)
    display.note(actors.connect(prepared.settings))
    try:
        batch = asyncio.run(_scored(prepared, display))
    finally:
        actors.disconnect()
    files.write(directory / "completions.arrow", schema.to_bytes(batch))
    labeled = preference_labels.label(batch, settings)
    _check_share(batch, settings)
    if labeled.table.num_rows == 0:
        raise NoPairs(f"none of {batch.num_rows} completions made a pair: {labeled.dropped}")
    aside = directory / ".pairs.parquet.tmp"
    pq.write_table(labeled.table, aside)
    files.sync(aside)
    aside.rename(directory / "pairs.parquet")
    files.sync(directory)
    chosen, rejected = (labeled.table.column(f"score_{side}").to_numpy() for side in ("chosen", "rejected"))
    summary = {
        "stage": "label",
        "completions": batch.num_rows,
        "pairs": labeled.table.num_rows,
        "dropped": labeled.dropped,
        "flipped_ratio": labeled.flipped_ratio,
        "margin_mean": float(np.abs(chosen - rejected).mean()),
        "truncated_ratio": float(1 - np.mean([r == "stop" for r in batch.column("finish_reason").to_pylist()])),
        "seconds": round(time.monotonic() - started, 1),
    }
    offline_loop.mark(directory, ["completions.arrow", "pairs.parquet"], summary)
    (directory / "sampled.arrow").unlink(missing_ok=True)
    return summary


def _check_share(batch: pa.RecordBatch, settings: LabelSettings) -> None:
    """Raise JudgeFailed if the judge failed on more than `failures.max_failed_ratio` of the completions."""
    failed, allowed = batch.column("failure").drop_null(), settings.failures.max_failed_ratio
    if len(failed) > allowed * batch.num_rows:
        reasons = {entry["values"]: entry["counts"] for entry in failed.value_counts().to_pylist()}
        raise JudgeFailed(
            f"judge {settings.judge.name}: failed on {len(failed)} of {batch.num_rows} completions ({reasons});"
            f" failures.max_failed_ratio={allowed}"
        )


class NoPairs(KeelError, RuntimeError):
    """No pair is left: every completion was dropped or tied with all others."""


class JudgeFailed(KeelError, RuntimeError):
    """The judge failed on more completions than the configuration allows."""


async def _sampled(prepared: Labeling, models: Models, prompts: pa.RecordBatch, display: Display) -> pa.RecordBatch:
    """Sample completions and keep them until they are judged: a failed judge costs no second sampling."""
    path = prepared.directory / "sampled.arrow"
    if path.is_file():
        display.note(f"sampled before: {path}")
        return schema.from_bytes(reads.read(path))
    assert isinstance(prepared.spec, SamplingSpec)
    samplers = sampling.Samplers(prepared.spec, models.policy, prepared.settings.generators.max_sequences)
    batch = await samplers.answer(prompts, models.sampling(prepared.spec.sampling), display, "sampled")
    samplers.stop()
    files.write(path, schema.to_bytes(batch))
    return batch


async def _scored(prepared: Labeling, display: Display) -> pa.RecordBatch:
    batch = prepared.rollouts
    if batch is None:
        assert prepared.models is not None and prepared.prompts is not None
        batch = await _sampled(prepared, prepared.models, prepared.prompts, display)
    return await sampling.score(prepared.spec, prepared.reference, batch, display)
