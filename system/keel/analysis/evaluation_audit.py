"""Evaluations of a run: every file is readable, and frontier.arrow says of each what its rows say."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import reads, schema
from keel.analysis.audit import UNREADABLE, Audit
from keel.config.run import Settings

_RELATIVE_ERROR = 1e-6  # means of the frontier are summed in another order here


def audit_evaluations(own: Audit, settings: Settings, committed: Sequence[int]) -> None:
    """frontier.arrow has the due evaluations in order, and says what their files say.

    `committed`: steps of checkpoints. What was evaluated behind the newest is evaluated again by a resumed run, which
    writes the file first and then the row.
    """
    sure = max(committed, default=-1)
    rows: list[dict[str, Any]] = []
    path = own.directory / "frontier.arrow"
    content = _content(path) if reads.is_there(path) else None
    try:
        rows = schema.from_bytes(content).to_pylist() if content is not None else []
        steps = [int(row["step"]) for row in rows]
    except (*UNREADABLE, KeyError, TypeError) as error:
        own.fault("frontier.arrow", "an Arrow file with one row an evaluation", f"{type(error).__name__}: {error}")
        steps = []
    else:
        every = settings.evaluation.every_steps
        due = {0, *range(every, sure + 1, every)} if every else {0}
        if missing := sorted(due - set(steps)) if sure >= 0 else []:
            own.fault("frontier.arrow", f"rows of steps {sorted(due)}", f"none of {missing}")
    own.test("frontier.arrow", "steps in order, each once", sorted(set(steps)), steps)
    files = {path.stem: path for path in reads.entries(own.directory / "evaluations") if path.match("step-*.arrow")}
    for row, step in zip(rows, steps, strict=False):
        name = f"step-{step:06d}"
        if name in files:
            _evaluation(own, files.pop(name), row, step > sure)
        else:
            own.fault(f"evaluations/{name}.arrow", "the evaluation that frontier.arrow tells of", "no file")
    for name, path in files.items():
        _evaluation(own, path, {}, again=True)
        if steps and name < f"step-{steps[-1]:06d}":
            own.fault("frontier.arrow", f"a row for evaluations/{name}.arrow", "none")


def _content(path: Path) -> bytes:
    """Bytes of an Arrow file; where they are none they were read twice. Raises ReadFailed."""
    return reads.settled(path, lambda: reads.read(path), _is_arrow)


def _is_arrow(content: bytes) -> bool:
    try:
        schema.from_bytes(content).validate(full=True)
    except UNREADABLE:
        return False
    return True


def _evaluation(own: Audit, path: Path, row: Mapping[str, Any], again: bool) -> None:
    """One evaluation against its row of the frontier; `again`: it may have been written anew by a resumed run."""
    file = f"evaluations/{path.name}"
    batch = own.arrow(file, _content(path))
    if batch is None:
        return
    own.counts["evaluations"] += 1
    for name, value in _means(batch).items() if row and not again else []:
        there = math.nan if row.get(name) is None else row[name]
        if not np.isclose(value, there, rtol=_RELATIVE_ERROR, atol=1e-9, equal_nan=True):
            own.fault("frontier.arrow", f"step {row['step']:.0f}: {name} {value:.6g}, by {file}", there)


def _means(batch: pa.RecordBatch) -> dict[str, float]:
    """Columns of a frontier row from the rows of its evaluation."""
    lengths = schema.completion_lengths(batch)
    surprise = -schema.row_sums(schema.ragged(batch, "completion_logprobs")[0], lengths)
    names = [name for name in batch.schema.names if name.startswith("reward")]
    columns = {name: batch.column(name).to_numpy(zero_copy_only=False).astype(float) for name in names}
    columns["proxy"] = columns.pop("reward")
    found = columns | {"length_tokens": lengths.astype(float), "entropy_nats": surprise / lengths}
    if "reference_logprobs" in batch.schema.names:
        found["kl_nats"] = -surprise - schema.row_sums(schema.ragged(batch, "reference_logprobs")[0], lengths)
    means = {name: float(np.nanmean(value)) if np.isfinite(value).any() else math.nan for name, value in found.items()}
    return means | {"n": float(np.isfinite(columns["proxy"]).sum())}
