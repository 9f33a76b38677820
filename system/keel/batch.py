"""A record batch -> one rank's rows -> micro-batches of tensors under a token budget.

Every rank plans for all ranks from the same lengths, so micro-batch counts, head pieces and denominators agree
everywhere without asking: 1 rank and N ranks take the same step.
Shapes: B rows, T padded tokens, N completion tokens of the micro-batch (flat, row by row).
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import schema


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together."""

    rows: np.ndarray
    """[B] row numbers in the record batch."""
    tokens: Tensor
    """int64 [B, T], prompt then completion, zeros behind."""
    positions: Tensor
    """int64 [N], index into B * T of the token that predicts each completion token."""
    targets: Tensor
    """int64 [N], the completion tokens."""
    items: np.ndarray
    """[N] index of each completion token in the record batch's flat list columns."""
    row_of_item: Tensor
    """int64 [N], which of the B rows a completion token belongs to."""
    real: bool
    """False: filler so that all ranks do equally many passes; counts nothing."""


@dataclass(frozen=True)
class Plan:
    """Which rows each rank puts through the model together."""

    micro_batches: list[list[np.ndarray]]
    """[rank][micro-batch] row numbers; equally many for every rank."""
    real: list[list[bool]]
    """[rank][micro-batch] False for filler."""
    head_chunks: list[int]
    """[micro-batch] pieces the output head works in, the largest need of any rank."""


def plan(
    prompt_lengths: np.ndarray, completion_lengths: np.ndarray, *, ranks: int, tokens_per_batch: int, head_chunk_tokens: int
) -> Plan:
    """Deal rows to ranks, longest first and back and forth, then cut each rank's rows into padded micro-batches.

    Lengths [rows] in tokens. B * T <= tokens_per_batch unless one row alone is longer. Every row appears exactly
    once among the real micro-batches.
    """
    total = prompt_lengths + completion_lengths
    assert len(total) >= ranks, (len(total), ranks)
    order = np.argsort(-total, kind="stable")
    turns = np.arange(len(order)) % (2 * ranks)
    owner = np.minimum(turns, 2 * ranks - 1 - turns)
    per_rank = [_pack(order[owner == rank], total, tokens_per_batch) for rank in range(ranks)]
    count = max(len(batches) for batches in per_rank)
    padded = [batches + [batches[-1][:1]] * (count - len(batches)) for batches in per_rank]
    real = [[index < len(batches) for index in range(count)] for batches in per_rank]
    chunks = [
        max(-(-int(completion_lengths[batches[index]].sum()) // head_chunk_tokens) for batches in padded)
        for index in range(count)
    ]
    return Plan(padded, real, chunks)


def _pack(rows: np.ndarray, total: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Cut rows, longest first, into runs whose padded size fits the budget."""
    batches, start = [], 0
    while start < len(rows):
        size = max(1, int(tokens_per_batch // total[rows[start]]))
        batches.append(rows[start : start + size])
        start += size
    return batches


def tensors(batch: pa.RecordBatch, rows: np.ndarray, *, real: bool = True) -> MicroBatch:
    """The micro-batch of these rows."""
    prompts, prompt_lengths = schema.ragged(batch, "prompt_tokens")
    completions, completion_lengths = schema.ragged(batch, "completion_tokens")
    prompt_starts = np.cumsum(prompt_lengths) - prompt_lengths
    completion_starts = np.cumsum(completion_lengths) - completion_lengths
    width = int((prompt_lengths + completion_lengths)[rows].max())
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    positions, items = [], []
    for b, row in enumerate(rows):
        p, c = int(prompt_lengths[row]), int(completion_lengths[row])
        tokens[b, :p] = prompts[prompt_starts[row] : prompt_starts[row] + p]
        tokens[b, p : p + c] = completions[completion_starts[row] : completion_starts[row] + c]
        positions.append(b * width + p - 1 + np.arange(c))
        items.append(completion_starts[row] + np.arange(c))
    flat_items = np.concatenate(items)
    return MicroBatch(
        rows=rows,
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(completions[flat_items].astype(np.int64)),
        items=flat_items,
        row_of_item=torch.from_numpy(np.repeat(np.arange(len(rows)), completion_lengths[rows])),
        real=real,
    )
