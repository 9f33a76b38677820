"""A record batch -> one rank's rows -> micro-batches of tensors under a token budget.

Samples of one prompt are packed behind a single copy of it (a unit), so a prompt goes through the model once:

    tokens     p p p p  a a a  b b b b | q q  c c c     a sees p and a;  b sees p and b, never a
    positions  0 1 2 3  4 5 6  4 5 6 7 | 0 1  2 3 4     c sees q and c, never p, a, b

With `packed_tokens` units of different prompts (here p and q) share a sequence, each blind to the other, and with
positions of its own; without, a sequence ends where the picture has a bar.

Every rank plans for all ranks from the same lengths, so micro-batch counts, head pieces and denominators agree
everywhere without asking: 1 rank and N ranks take the same step.
Shapes: U units, B rows in them, T padded tokens, N completion tokens (flat, row by row).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import schema

Unit = np.ndarray
"""Row numbers that go through the model as one sequence; rows of a prompt are neighbors."""


@dataclass(frozen=True)
class SequenceLayout:
    """Which tokens of a sequence belong to one row, where several rows share it; each tensor is int64 [U, T]."""

    places: Tensor
    """Position of a token in its own row: in its prompt, or behind that in its completion; 0 for padding."""
    prompts: Tensor
    """Number of the token's prompt in the sequence; -1 for padding."""
    completions: Tensor
    """0 for a token of the prompt itself, k for its k-th completion; -1 for padding."""

    def to(self, device: torch.device) -> "SequenceLayout":
        return SequenceLayout(self.places.to(device), self.prompts.to(device), self.completions.to(device))

    def same_row(self, sequence: Any, query: Any, key: Any) -> Any:
        """bool of (sequence, query, key) indices: the key is in the prompt or completion of the query, in any order."""
        prompt = self.prompts[sequence, query] == self.prompts[sequence, key]
        completion = self.completions[sequence, key]
        return prompt & ((completion == 0) | (completion == self.completions[sequence, query]))


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together."""

    rows: np.ndarray
    """[B] row numbers in the record batch."""
    tokens: Tensor
    """int64 [U, T], a prompt and then its completions, then the next one's, zeros behind."""
    layout: SequenceLayout | None
    """Which tokens belong together; None: every sequence is one row, and a causal model needs to be told nothing."""
    positions: Tensor
    """int64 [N], index into U * T of the token that predicts each completion token."""
    targets: Tensor
    """int64 [N], the completion tokens."""
    items: np.ndarray
    """[N] index of each completion token in the record batch's flat list columns."""
    row_of_item: Tensor
    """int64 [N], which of the B rows a completion token belongs to."""
    real: bool
    """False: filler so that all ranks do equally many passes; counts nothing."""


@dataclass(frozen=True)
class PackingPlan:
    """Which units each rank puts through the model together."""

    micro_batches: list[list[list[Unit]]]
    """[rank][micro-batch] units; equally many micro-batches for every rank."""
    real: list[list[bool]]
    """[rank][micro-batch] False for filler."""
    head_chunks: list[int]
    """[micro-batch] pieces the output head works in, the largest need of any rank."""


@dataclass(frozen=True)
class TokenBudget:
    """Limits of a pass through the model, in tokens."""

    tokens_per_batch: int
    """Of a micro-batch, padding included."""
    shared_prompt_tokens: int
    """Of a unit of several rows; 0: one row a unit."""
    head_chunk_tokens: int
    """Completion tokens in the output head at once."""
    packed_tokens: int = 0
    """Of a sequence that several units share; 0: each has its own."""


def plan(batch: pa.RecordBatch, ranks: int, budget: TokenBudget) -> PackingPlan:
    """Deal units to ranks, longest first and back and forth, then cut each rank's units into padded micro-batches.

    U * T <= tokens_per_batch unless one unit alone is longer. Every row appears exactly once among the real
    micro-batches.
    """
    prompts, completions = schema.lengths(batch, "prompt_tokens"), schema.lengths(batch, "completion_tokens")
    assert len(prompts) >= ranks, (len(prompts), ranks)
    units = _units(batch.column("ticket").to_numpy(), prompts, completions, budget.shared_prompt_tokens)
    if len(units) < ranks:
        units = [np.array([row]) for row in range(len(prompts))]
    total = np.array([prompts[unit[0]] + completions[unit].sum() for unit in units])
    if budget.packed_tokens:
        units, total = _packed(units, total, budget.packed_tokens, ranks)
    per_rank, real = share_out(total, ranks, budget.tokens_per_batch)
    count = len(real[0])
    padded = [[[units[index] for index in numbers] for numbers in batches] for batches in per_rank]
    items = [[sum(int(completions[unit].sum()) for unit in micro) for micro in batches] for batches in padded]
    chunks = [-(-max(rank_items[index] for rank_items in items) // budget.head_chunk_tokens) for index in range(count)]
    return PackingPlan(padded, real, chunks)


def share_out(total: np.ndarray, ranks: int, tokens_per_batch: int) -> tuple[list[list[np.ndarray]], list[list[bool]]]:
    """[rank][micro-batch] numbers of sequences, and whether it is real; `total` [U] tokens of each sequence.

    Longest first and back and forth between ranks; equally many micro-batches each, the missing ones filler.
    """
    order = np.argsort(-total, kind="stable")
    turns = np.arange(len(order)) % (2 * ranks)
    owner = np.minimum(turns, 2 * ranks - 1 - turns)
    per_rank = [_pack(order[owner == rank], total, tokens_per_batch) for rank in range(ranks)]
    count = max(len(batches) for batches in per_rank)
    real = [[index < len(batches) for index in range(count)] for batches in per_rank]
    return [batches + [batches[-1][:1]] * (count - len(batches)) for batches in per_rank], real


def _units(tickets: np.ndarray, prompts: np.ndarray, completions: np.ndarray, limit: int) -> list[Unit]:
    """Rows of a ticket together while prompt and completions fit the limit."""
    units: list[Unit] = []
    for ticket in dict.fromkeys(tickets.tolist()):
        open_unit: list[int] = []
        for row in np.flatnonzero(tickets == ticket):
            if open_unit and prompts[row] + completions[open_unit].sum() + completions[row] > limit:
                units.append(np.array(open_unit))
                open_unit = []
            open_unit.append(int(row))
        units.append(np.array(open_unit))
    return units


def _packed(units: list[Unit], total: np.ndarray, limit: int, ranks: int) -> tuple[list[Unit], np.ndarray]:
    """Units joined into sequences of at most `limit` tokens, longest first into the first that has room.

    At least as many sequences as ranks. A unit longer than the limit stays alone.
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for number in np.argsort(-total, kind="stable"):
        place = next((place for place, left in enumerate(room) if left >= total[number]), None)
        if place is None or len(sequences) < ranks:
            sequences.append([])
            room.append(limit)
            place = len(room) - 1
        sequences[place].append(int(number))
        room[place] -= int(total[number])
    joined = [np.concatenate([units[number] for number in numbers]) for numbers in sequences]
    return joined, np.array([total[numbers].sum() for numbers in sequences])


def _pack(numbers: np.ndarray, total: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Cut units, longest first, into runs whose padded size fits the budget."""
    batches, start = [], 0
    while start < len(numbers):
        size = max(1, int(tokens_per_batch // total[numbers[start]]))
        batches.append(numbers[start : start + size])
        start += size
    return batches


def tensors(batch: pa.RecordBatch, units: list[Unit], *, real: bool = True) -> MicroBatch:
    """The micro-batch of these units."""
    prompts, prompt_lengths = schema.ragged(batch, "prompt_tokens")
    completions, completion_lengths = schema.ragged(batch, "completion_tokens")
    prompt_starts = np.cumsum(prompt_lengths) - prompt_lengths
    completion_starts = np.cumsum(completion_lengths) - completion_lengths
    tickets = batch.column("ticket").to_numpy()
    # a prompt stands before a row whose neighbor before it is another prompt's
    opens = [np.diff(tickets[unit], prepend=tickets[unit[0]] - 1) != 0 for unit in units]
    rows = np.concatenate(units)
    totals = [completion_lengths[u].sum() + prompt_lengths[u[o]].sum() for u, o in zip(units, opens, strict=True)]
    width = int(max(totals))
    tokens, places = np.zeros((2, len(units), width), np.int64)
    groups, segments = np.full((2, len(units), width), -1)  # which prompt; 0 the prompt itself, k its k-th completion
    positions, items = [], []
    for u, unit in enumerate(units):
        end = group = start = p = k = 0
        for row, opening in zip(unit, opens[u], strict=True):
            if opening:
                p, start, group, k = int(prompt_lengths[row]), end, group + 1, 0
                end += p
                tokens[u, start:end] = prompts[prompt_starts[row] : prompt_starts[row] + p]
                places[u, start:end], groups[u, start:end], segments[u, start:end] = np.arange(p), group, 0
            c, k = int(completion_lengths[row]), k + 1
            completion_items = completion_starts[row] + np.arange(c)
            tokens[u, end : end + c] = completions[completion_items]
            places[u, end : end + c], groups[u, end : end + c], segments[u, end : end + c] = p + np.arange(c), group, k
            # the last prompt token predicts the first token of every completion behind it
            positions.append(u * width + np.concatenate([[start + p - 1], end + np.arange(c - 1)]).astype(np.int64))
            items.append(completion_items)
            end += c
    flat_items = np.concatenate(items)
    return MicroBatch(
        rows=rows,
        tokens=torch.from_numpy(tokens),
        layout=SequenceLayout(*map(torch.from_numpy, (places, groups, segments))) if len(rows) > len(units) else None,
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(completions[flat_items].astype(np.int64)),
        items=flat_items,
        row_of_item=torch.from_numpy(np.repeat(np.arange(len(rows)), completion_lengths[rows])),
        real=real,
    )
