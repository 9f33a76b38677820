"""Held-out evaluation: the same prompts and seeds every time, one frontier row each, estimates with intervals."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from keel import files, reads, schema
from keel.observability.diagnostics import Estimate, estimate, per_completion

_SHOWN = ("kl_nats", "entropy_nats", "length_tokens", "finished_ratio")
_FILE = re.compile(r"step-(\d+)\.arrow")


def store(run_directory: Path, step: int, batch: pa.RecordBatch) -> dict[str, float]:
    """Write evaluations/step-N.arrow and the frontier row; the row.

    frontier.arrow has one row an evaluation: step, kl_nats, proxy (the training reward), gold (the monitor called
    gold, else null), entropy_nats, length_tokens, n, stderr (of proxy), gold_stderr, and every reward_<name>.
    """
    files.write(path_of(run_directory, step), schema.to_bytes(batch))
    values = per_completion(batch)
    reward = values["reward"][np.isfinite(values["reward"])]
    row = {
        "step": float(step),
        "kl_nats": _mean(values.get("kl_nats")),
        "proxy": _mean(reward),
        "gold": _mean(values.get("reward_gold")),
        "entropy_nats": _mean(values["entropy_nats"]),
        "length_tokens": _mean(values["length_tokens"]),
        "n": float(len(reward)),
        "stderr": _standard_error(reward),
        "gold_stderr": _standard_error(values.get("reward_gold", np.empty(0))),
    }
    row |= {name: _mean(value) for name, value in values.items() if name.startswith("reward_")}
    earlier = [old for old in frontier(run_directory) if old["step"] < step]
    nulls = {name: None if np.isnan(value) else value for name, value in row.items()}
    table = pa.Table.from_pylist([*earlier, nulls], schema=pa.schema([(name, pa.float64()) for name in row]))
    files.write(run_directory / "frontier.arrow", schema.to_bytes(table.combine_chunks().to_batches()[0]))
    return row


def undo(run_directory: Path, last_step: int) -> None:
    """Move the evaluations of later steps aside, frontier rows first: a row has its file at every moment."""
    path = run_directory / "frontier.arrow"
    if reads.is_there(path):
        rows = schema.from_bytes(reads.read(path))
        files.write(path, schema.to_bytes(schema.select(rows, rows.column("step").to_numpy() <= last_step)))
    for file in reads.entries(run_directory / "evaluations"):
        if (name := _FILE.fullmatch(file.name)) and int(name[1]) > last_step:
            files.move_aside(run_directory, file)


def _standard_error(values: np.ndarray) -> float:
    """Of the mean over rows with a value; NaN for fewer than two."""
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")


def frontier(run_directory: Path) -> list[dict[str, float]]:
    """Rows of frontier.arrow in step order; none before the first evaluation."""
    path = run_directory / "frontier.arrow"
    return schema.from_bytes(path.read_bytes()).to_pylist() if path.exists() else []


def path_of(run_directory: Path, step: int) -> Path:
    return run_directory / "evaluations" / f"step-{step:06d}.arrow"


def load(run_directory: Path, step: int) -> pa.RecordBatch:
    return schema.from_bytes(path_of(run_directory, step).read_bytes())


def estimates(batch: pa.RecordBatch) -> dict[str, Estimate]:
    """Mean and 95 % interval over held-out prompts of rewards, KL, entropy and length."""
    values = per_completion(batch)
    return {name: estimate(values[name]) for name in shown(values)}


def shown(values: Iterable[str]) -> list[str]:
    """The names a reader is shown, in order: the reward, its parts and monitors, KL, entropy, length, own ends."""
    names = set(values)
    return [name for name in ("reward", *sorted(n for n in names if n.startswith("reward_")), *_SHOWN) if name in names]


def changes(first: pa.RecordBatch, last: pa.RecordBatch) -> dict[str, Estimate]:
    """Last minus first, paired by prompt: mean and 95 % interval."""
    assert first.column("prompt_id").equals(last.column("prompt_id"))
    before, after = per_completion(first), per_completion(last)
    return {name: estimate(after[name] - before[name]) for name in estimates(first) if name in after}


def _mean(values: np.ndarray | None) -> float:
    return float(np.nanmean(values)) if values is not None and np.isfinite(values).any() else float("nan")
