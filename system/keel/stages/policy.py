"""Stages that train a policy on stored completions: `keel sft` (demonstrations) and `keel prefer` (pairs, rankings).

Both run the objectives of online training on the same learner; the rows are stored, so no generator runs. `keel
prefer` first reads every row's log-probs under the reference once and keeps them as Arrow: training holds one model.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from keel import files, reads, schema
from keel.algorithms import registry
from keel.cluster import actors, learner_group
from keel.config.run import LearnerSpec
from keel.config.stages import PreferSettings, ScoringSpec, SupervisedSettings
from keel.learner import loading, model_files
from keel.observability.console import PREFERENCE_COLUMNS, SUPERVISED_COLUMNS, Columns, Display
from keel.observability.metrics import RunMetrics
from keel.online import preflight, text_checks
from keel.online.models import Models, resolve, with_learner_models
from keel.online.retries import retrying
from keel.rollout.offline_rows import OfflineRows
from keel.stages import offline_loop, sampling
from keel.stages.offline_loop import OfflineRecorder, OfflineRun

PolicyStage = SupervisedSettings | PreferSettings
_ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class PolicyTraining:
    """A checked stage that trains a policy."""

    settings: PolicyStage
    spec: LearnerSpec
    directory: Path
    models: Models
    rows: OfflineRows

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines that the stage prints at its start."""
        return self.models.notes

    @property
    def name(self) -> str:
        return "sft" if isinstance(self.settings, SupervisedSettings) else "prefer"

    @property
    def columns(self) -> Columns:
        return SUPERVISED_COLUMNS if self.name == "sft" else PREFERENCE_COLUMNS


def prepare(settings: PolicyStage) -> PolicyTraining:
    """Check models, rows, port, memory and run directory. Raises ConfigError, one line."""
    directory = preflight.check_place(settings)
    spec = settings.learner_spec(steps=1)
    registry.build(spec)
    models = resolve(spec)
    rows = OfflineRows(spec, settings.completions, models.tokenizer, models.end_tokens.stop)
    text_checks.check_token_ids(Path(models.policy), max(rows.largest_token, rows.prompts.largest_token), settings)
    spec = settings.learner_spec(settings.training.steps(rows.num_training))
    return PolicyTraining(settings, spec, directory, with_learner_models(models, spec), rows)


def run(prepared: PolicyTraining, display: Display) -> dict[str, Any]:
    """Train to the end, unless the stage is finished; returns the summary in stage.json."""
    for line in prepared.notes:
        display.note(line)
    place = (prepared.settings, prepared.directory, prepared.rows.digest)
    return offline_loop.conduct(*place, functools.partial(_train, prepared), display)


async def _train(prepared: PolicyTraining, metrics: RunMetrics, display: Display, started: float) -> dict[str, Any]:
    settings, spec, models, rows = prepared.settings, prepared.spec, prepared.models, prepared.rows
    completed: Callable[[pa.RecordBatch], pa.RecordBatch] = lambda batch: batch  # noqa: E731
    if models.reference and isinstance(settings, PreferSettings):
        logprobs = await ReferenceLogprobs.read(settings.reference_spec(), models.reference, rows, display)
        completed = logprobs.append
    plan = OfflineRun(
        settings=settings,
        directory=prepared.directory,
        steps=spec.run.steps,
        rows=rows.num_training,
        batch=lambda version: completed(rows.step(version)),
        held_out=completed(rows.held_out()),
        dropped=rows.dropped,
        digest=rows.digest,
    )
    learner = learner_group.LearnerGroup(spec, models.policy, models.frozen)
    await offline_loop.ready(settings, learner)
    recorder = OfflineRecorder(plan, metrics, display)
    state = await offline_loop.restore(plan, learner, recorder)
    metrics.add({"rows_dropped_total": {reason: float(count) for reason, count in rows.dropped.items()}})
    state = await offline_loop.run(plan, learner, recorder, state)
    done = {
        "trained_steps": state.version,
        "model_step": offline_loop.kept(plan, state),
        "evaluations": state.evaluations,
    }
    return offline_loop.finish(plan, prepared.name, started, **done)


class ReferenceLogprobs:
    """Log-probs of stored completions under the reference, read once and kept as Arrow in the cache.

    The file's name is a hash of everything the numbers depend on (model files, tokens, dtype), so a sweep over betas
    reads them once, and another model or another row never finds them.
    """

    def __init__(self, table: pa.RecordBatch) -> None:
        self._table = table
        ids, samples = (table.column(name).to_pylist() for name in ("prompt_id", "sample"))
        self._places = {key: place for place, key in enumerate(zip(ids, samples, strict=True))}

    @classmethod
    async def read(cls, settings: ScoringSpec, folder: str, rows: OfflineRows, display: Display) -> "ReferenceLogprobs":
        """Read the log-probs from the cache, or compute them with the reference scorers and store them there."""
        parts = rows.everything()
        path = loading.cache_directory() / "reference_logprobs" / f"{_key(settings, folder, parts)}.arrow"
        if kept := _kept(path):
            display.note(f"reference log-probs: cached ({path})")
            return cls(schema.from_bytes(kept))
        pool = actors.reference(settings, folder)
        await pool.ready()

        async def one(batch: pa.RecordBatch) -> pa.RecordBatch:
            handle, _ = await retrying(lambda: pool.score(batch), settings.failures.retries)
            return (await actors.fetch(handle)).select(["prompt_id", "sample", "reference_logprobs"])

        workers, what = pool.count, "reference log-probs"
        display.doing(what)
        scored = [await sampling.in_parts(part, one, _ROWS_PER_BATCH, workers, display, what) for part in parts]
        pool.stop()
        table = schema.concat(scored)
        _keep(path, schema.to_bytes(table))
        display.note(f"reference log-probs: {table.num_rows} completions read once, kept in {path}")
        return cls(table)

    def append(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Add the column reference_logprobs to rows that were read."""
        keys = zip(*(batch.column(name).to_pylist() for name in ("prompt_id", "sample")), strict=True)
        taken = self._table.column("reference_logprobs").take(pa.array([self._places[key] for key in keys]))
        assert pc.list_value_length(taken).equals(pc.list_value_length(batch.column("completion_tokens")))
        return schema.append(batch, schema.build(schema.REFERENCE, {"reference_logprobs": taken}))


def _keep(path: Path, content: pa.Buffer) -> None:
    """Write the file, then its digest beside it: Arrow has no checksum."""
    files.write(path, content)
    files.write_json(path.with_suffix(".json"), {"xxh3_128": files.digest_of(content)})


def _kept(path: Path) -> bytes | None:
    """The content of a cached file; None if it is missing or damaged. Raises ReadFailed."""

    def look() -> bytes | None:
        try:
            expected = reads.read_json(path.with_suffix(".json"))["xxh3_128"]
            content = reads.read(path)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return content if files.digest_of(content) == expected else None

    return reads.confirmed(path, look, lambda content: content is not None) if reads.is_there(path) else None


def _key(settings: ScoringSpec, folder: str, parts: Sequence[pa.RecordBatch]) -> str:
    """Hash of the model's files, the rows' tokens and the dtype."""
    assert settings.reference is not None
    hasher = xxhash.xxh3_128(settings.reference.dtype.encode())
    for path in [Path(folder) / "config.json", *model_files.weight_files(Path(folder))]:
        hasher.update(files.digest(path).encode())
    for batch in parts:
        for name in ("prompt_tokens", "completion_tokens"):
            values, lengths = schema.ragged(batch, name)
            hasher.update(values.tobytes())
            hasher.update(lengths.tobytes())
        for name in ("prompt_id", "sample"):
            hasher.update(batch.column(name).to_numpy().tobytes())
    return hasher.hexdigest()
