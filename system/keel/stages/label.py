"""`keel label`: completions of a policy, or the rollouts of runs, and a judge -> preference pairs in Parquet.

    prompts -> generators  \\
                             judge -> labels.py -> RUN_DIR/pairs.parquet, completions.arrow, stage.json
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
from keel.learner import forward_contract, loading
from keel.observability.console import Display
from keel.online import preflight, text_checks
from keel.protocols import Sampling
from keel.rollout import preference_labels
from keel.rollout.prompts import Prompts
from keel.stages import offline_loop, sampling

_ROLLOUT = ("seed", "prompt_id", "prompt", "prompt_messages", "completion", "completion_tokens", "finish_reason")
_SCORED = ("reward", "reference_", "score", "failure")


@dataclass(frozen=True)
class Prepared:
    """A checked stage."""

    settings: LabelSettings
    spec: ScoringSpec
    directory: Path
    folder: str | None
    reference_folder: str | None
    prompts: pa.RecordBatch | None
    rollouts: pa.RecordBatch | None
    draws: Sampling
    notes: tuple[str, ...] = ()
    """What the stage says first: where its texts end."""

    @property
    def completions(self) -> int:
        rows = self.prompts if self.prompts is not None else self.rollouts
        assert rows is not None
        return rows.num_rows


def prepare(settings: LabelSettings) -> Prepared:
    """Check model, prompts or rollouts, judge, memory and run directory. Raises ConfigError, one line."""
    directory = Path(settings.run_directory).resolve()
    preflight.check_directory(directory, settings)
    preflight.check_memory(settings.cluster)
    spec = settings.scoring_spec()
    preflight.check_reward_source(settings.judge, "judge.source")
    folder = prompts = rollouts = None
    stop, notes = tuple[int, ...](settings.sampling.stop_token_ids or ()), tuple[str, ...]()
    if isinstance(spec, SamplingSpec):
        located = loading.locate_policy(spec.policy.model, "policy.model")
        preflight.check_context(located, spec)
        tokenizer = loading.load_tokenizer(located, "policy.model")
        source = Prompts(spec, tokenizer)
        count = min(settings.max_prompts or source.counts["train"], source.counts["train"])
        prompts, folder = source.batch(range(count)), str(located)
        text_checks.check_token_ids(located, source.largest_token, spec)
        preflight.check_rewards(spec, prompts)
        ends = text_checks.check_text(located, spec, tokenizer, settings.sampling.stop_token_ids)
        stop, notes = ends.stop, ends.notes
    else:
        rollouts = _rollouts(settings.runs)
        preflight.check_rewards(spec, rollouts)
    reference = None
    if settings.reference:
        reference = str(loading.locate_policy(settings.reference.model or settings.policy_model, "reference.model"))
        if folder is not None:
            preflight.check_vocabulary(Path(folder), Path(reference), "reference.model")
        notes += tuple(forward_contract.require({"reference.model": reference}, _longest_row(spec, rollouts)))
    by = settings.sampling
    draws = Sampling(by.temperature, by.top_p, by.max_tokens, stop)
    return Prepared(settings, spec, directory, folder, reference, prompts, rollouts, draws, notes)


def _longest_row(spec: ScoringSpec, rollouts: pa.RecordBatch | None) -> int:
    """Tokens of the longest prompt with its completion."""
    if isinstance(spec, SamplingSpec):
        return spec.max_model_tokens
    assert rollouts is not None
    lengths = schema.lengths(rollouts, "prompt_tokens") + schema.lengths(rollouts, "completion_tokens")
    return int(lengths.max(initial=1))


def _rollouts(runs: Sequence[str]) -> pa.RecordBatch:
    """Every rollout of the runs, tickets made different from step to step. Raises ConfigError for a run without any."""
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


def run(prepared: Prepared, display: Display) -> dict[str, Any]:
    """Sample (unless there are rollouts), judge, pair, write; what stage.json says. Not again once it is finished.

    Raises ConfigError for a directory another process works on, NoPairs, JudgeFailed, or what a part raised.
    """
    started = time.monotonic()
    directory = prepared.directory
    if done := offline_loop.finished(directory):
        display.note(f"{directory} holds this stage, finished")
        return done
    files.make_folder(directory)
    with files.lock(directory):
        return _label(prepared, display, started)


def _label(prepared: Prepared, display: Display, started: float) -> dict[str, Any]:
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
    found = preference_labels.label(batch, settings)
    _check_share(batch, settings)
    if found.table.num_rows == 0:
        raise NoPairs(f"none of {batch.num_rows} completions made a pair: {found.dropped}")
    aside = directory / ".pairs.parquet.tmp"
    pq.write_table(found.table, aside)
    files.sync_file(aside)
    aside.rename(directory / "pairs.parquet")
    files.sync_directory(directory)
    margins = np.abs(found.table.column("score_chosen").to_numpy() - found.table.column("score_rejected").to_numpy())
    summary = {
        "stage": "label",
        "completions": batch.num_rows,
        "pairs": found.table.num_rows,
        "dropped": found.dropped,
        "flipped_ratio": found.flipped_ratio,
        "margin_mean": float(margins.mean()),
        "truncated_ratio": float(1 - np.mean([r == "stop" for r in batch.column("finish_reason").to_pylist()])),
        "seconds": round(time.monotonic() - started, 1),
    }
    offline_loop.mark(directory, ["completions.arrow", "pairs.parquet"], summary)
    (directory / "sampled.arrow").unlink(missing_ok=True)
    return summary


def _check_share(batch: pa.RecordBatch, settings: LabelSettings) -> None:
    """Stop when the judge failed on more than `failures.max_failed_ratio` of the completions."""
    failed, allowed = batch.column("failure").drop_null(), settings.failures.max_failed_ratio
    if len(failed) > allowed * batch.num_rows:
        reasons = {entry["values"]: entry["counts"] for entry in failed.value_counts().to_pylist()}
        raise JudgeFailed(
            f"judge {settings.judge.name}: failed on {len(failed)} of {batch.num_rows} completions ({reasons});"
            f" failures.max_failed_ratio={allowed}"
        )


class NoPairs(KeelError, RuntimeError):
    """Every completion was left out, or tied with every other."""


class JudgeFailed(KeelError, RuntimeError):
    """The judge failed on more completions than the configuration allows."""


async def _sampled(prepared: Prepared, folder: str, prompts: pa.RecordBatch, display: Display) -> pa.RecordBatch:
    """Completions of the prompts; kept until they are judged, so a judge that fails costs no second sampling."""
    path = prepared.directory / "sampled.arrow"
    if path.is_file():
        display.note(f"sampled before: {path}")
        return schema.from_bytes(reads.read(path))
    assert isinstance(prepared.spec, SamplingSpec)
    samplers = sampling.Samplers(prepared.spec, folder, prepared.settings.generators.max_sequences)
    batch = await samplers.answer(prompts, prepared.draws, display, "sampled")
    samplers.stop()
    files.write(path, schema.to_bytes(batch))
    return batch


async def _scored(prepared: Prepared, display: Display) -> pa.RecordBatch:
    batch = prepared.rollouts
    if batch is None:
        assert prepared.folder is not None and prepared.prompts is not None
        batch = await _sampled(prepared, prepared.folder, prepared.prompts, display)
    return await sampling.score(prepared.spec, prepared.reference_folder, batch, display)
