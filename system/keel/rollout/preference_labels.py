"""From scored completions to preference pairs: rules first, then selection, then (on purpose) wrong labels.

    failed judge, empty, cut, equal     completions left out, counted by reason
    pairs.*                             which two of a prompt's completions are compared (pair_selection.py)
    noise.*                             which of them is called chosen

Rows have TRL's columns (`prompt`, `chosen`, `rejected`), messages where the prompt is conversational, and what the
judge said. All of it is a function of the completions and the seed.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from scipy import special

from keel import schema
from keel.algorithms import pair_selection
from keel.algorithms.pair_selection import Candidates
from keel.config.label import LabelSettings, NoiseSettings


@dataclass(frozen=True)
class Labeled:
    """Preference rows and what was left out on the way."""

    table: pa.Table
    dropped: dict[str, int]
    """Completions (judge_failed, empty, truncated, equal) and prompts or pairs (tie, too_few) by reason."""

    @property
    def flipped_ratio(self) -> float:
        return float(np.mean(self.table.column("flipped").to_numpy())) if self.table.num_rows else 0.0


def label(batch: pa.RecordBatch, config: LabelSettings) -> Labeled:
    """Pairs of every ticket's completions, ordered by the column `reward`."""
    kept, dropped = usable(batch, truncated=config.truncated == "keep")
    rows = schema.select(batch, kept)
    seeds = rows.column("seed").to_numpy()
    judged = rows.column("reward").to_numpy(zero_copy_only=False).astype(np.float64)
    candidates = Candidates(
        tickets=rows.column("ticket").to_numpy(),
        seeds=seeds,
        rewards=judged,
        judged=judged,
        lengths=schema.lengths(rows, "completion_tokens"),
        finished=schema.finished(rows),
        members=judged[None],
    )
    pairs = pair_selection.select(config.pairs, candidates)
    for reason, count in pairs.dropped.items():
        dropped["too_few" if reason == "unfinished" else reason] += count
    both = zip(seeds[pairs.chosen].tolist(), seeds[pairs.rejected].tolist(), strict=True)
    draws = np.array([xxhash.xxh3_64_intdigest(f"{one}:{other}".encode()) >> 1 for one, other in both], np.int64)
    flipped = flips(judged[pairs.chosen] - judged[pairs.rejected], draws, config.noise, config.run.seed)
    chosen = np.where(flipped, pairs.rejected, pairs.chosen)
    rejected = np.where(flipped, pairs.chosen, pairs.rejected)
    return Labeled(_table(rows, chosen, rejected, flipped), dict(dropped))


def usable(batch: pa.RecordBatch, *, truncated: bool) -> tuple[np.ndarray, Counter[str]]:
    """bool [rows] of completions that may be compared, and how many may not, by reason.

    Of equal texts of one prompt the first stays. `truncated`: completions cut at the budget may stay.
    """
    keep = np.ones(batch.num_rows, bool)
    dropped: Counter[str] = Counter()
    seen: set[tuple[int, str]] = set()
    columns = (batch.column(name).to_pylist() for name in ("ticket", "completion", "reward"))
    for row, (ticket, text, reward, whole) in enumerate(zip(*columns, schema.finished(batch) | truncated, strict=True)):
        words = text.strip()
        problems = {"judge_failed": reward is None, "empty": not words, "truncated": not whole}
        problems["equal"] = (ticket, words) in seen
        if reason := next((name for name, holds in problems.items() if holds), None):
            keep[row] = False
            dropped[reason] += 1
        else:
            seen.add((ticket, words))
    return keep, dropped


def flips(differences: np.ndarray, seeds: np.ndarray, noise: NoiseSettings, run_seed: int) -> np.ndarray:
    """bool [P]: label exchanged. P = 1 - sigma(difference / temperature), then flip_ratio on top; drawn by pair."""
    draws = np.array([[_uniform(run_seed, int(seed), what) for what in ("temperature", "flip")] for seed in seeds])
    draws = draws.reshape(-1, 2)
    wrong = np.zeros(len(differences), bool)
    if noise.temperature > 0:
        wrong = draws[:, 0] < special.expit(-differences / noise.temperature)
    return wrong ^ (draws[:, 1] < noise.flip_ratio)


def _uniform(run_seed: int, seed: int, what: str) -> float:
    return xxhash.xxh3_64_intdigest(f"label:{run_seed}:{seed}:{what}".encode()) / 2**64


def _table(rows: pa.RecordBatch, chosen: np.ndarray, rejected: np.ndarray, flipped: np.ndarray) -> pa.Table:
    messages = [json.loads(text) for text in rows.column("prompt_messages").to_pylist()]
    texts, scores = rows.column("completion").to_pylist(), rows.column("reward").to_pylist()
    prompts, ended = rows.column("prompt").to_pylist(), schema.finished(rows)

    conversational = any(messages)  # one form in all rows: plain prompts among others become a user's message

    def prompt(row: int) -> Any:
        return (messages[row] or [{"role": "user", "content": prompts[row]}]) if conversational else prompts[row]

    def answer(row: int) -> Any:
        return [{"role": "assistant", "content": texts[row]}] if conversational else texts[row]

    return pa.table(
        {
            "prompt": [prompt(row) for row in chosen],
            "chosen": [answer(row) for row in chosen],
            "rejected": [answer(row) for row in rejected],
            "score_chosen": pa.array([scores[row] for row in chosen], pa.float32()),
            "score_rejected": pa.array([scores[row] for row in rejected], pa.float32()),
            "chosen_finished": pa.array(ended[chosen]),
            "rejected_finished": pa.array(ended[rejected]),
            "flipped": pa.array(flipped, pa.bool_()),
            "prompt_id": pa.array([rows.column("prompt_id")[int(row)].as_py() for row in chosen], pa.int64()),
        }
    )
