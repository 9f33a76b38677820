"""Reports an evaluation from its rows alone: means with intervals, win rates, pass@k. Pure numpy.

A row is one completion; `model` says whose (policy, other), `decoding` how it was drawn (sampled, greedy; the other
side may be given answers). Every interval resamples prompts: samples of a prompt are averaged first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from keel import schema
from keel.analysis import win_rates
from keel.observability.diagnostics import Estimate, estimate, per_completion
from keel.observability.evaluations import shown

_OF_SAMPLES = ("kl_nats", "kl_k3_nats", "entropy_nats", "sequence_entropy_nats")
"""Estimates over samples: a greedy or given answer is none."""


def report(batch: pa.RecordBatch, judge: str, pass_at: Sequence[int], pass_threshold: float | None) -> dict[str, Any]:
    """Build the report of all rows, as JSON.

    judge: column whose score decides who wins. pass_at: k of pass@k, of sampled answers with score >= pass_threshold.
    """
    parts = {key: schema.select(batch, rows) for key, rows in _parts(batch).items()}
    prompts = len(np.unique(batch.column("prompt_id").to_numpy()))
    tree: dict[str, Any] = {"prompts": prompts, "judge": judge, "means": {}}
    for (model, decoding), part in parts.items():
        tree["means"][f"{model}, {decoding}"] = means(part, sampled=decoding == "sampled")
    rates = {}
    for decoding in ("sampled", "greedy"):
        policy = parts.get(("policy", decoding))
        other = parts.get(("other", decoding)) or parts.get(("other", "given"))
        if policy is not None and other is not None:
            rates[decoding] = against(policy, other, judge)
    if rates:
        tree["win_rates"] = rates
    sampled = parts.get(("policy", "sampled"))
    if pass_threshold is not None and sampled is not None:
        scores = _by_prompt(sampled, judge)
        missing = np.isnan(scores).any(1)  # a judge that failed says nothing of its prompt
        ks = [k for k in pass_at if k <= scores.shape[1]]
        passed = win_rates.pass_at_k(scores[~missing] >= pass_threshold, ks)
        tree["pass_at_k"] = {str(k): value.as_json() for k, value in passed.items()}
        tree["pass_prompts"] = int((~missing).sum())
    return tree


def means(part: pa.RecordBatch, *, sampled: bool) -> dict[str, dict[str, float | None]]:
    """Mean and 95 % interval of every number of one model's answers, and how many of them have none."""
    values, prompts = per_completion(part), part.column("prompt_id").to_numpy()
    numbers = {}
    for name in shown(values):
        if name in _OF_SAMPLES and not sampled:
            continue
        known = np.isfinite(values[name])
        numbers[name] = _over_prompts(values[name][known], prompts[known]).as_json() | {"missing": int((~known).sum())}
    return numbers


def against(policy: pa.RecordBatch, other: pa.RecordBatch, judge: str) -> dict[str, Any]:
    """Win rates of the policy's over other answers of the same prompts; sample i meets sample i, or the only answer."""
    answers = {key: row for row, key in enumerate(_keys(other))}
    single = not any(sample for _, sample in answers)
    partner = np.array([answers[(prompt, 0 if single else sample)] for prompt, sample in _keys(policy)])
    scores, theirs = (_scores(side, judge) for side in (policy, other))
    won = win_rates.wins(scores, theirs[partner])
    lengths = [
        np.array([len(text) for text in side.column("completion").to_pylist()], float) for side in (policy, other)
    ]
    prompts = policy.column("prompt_id").to_numpy()
    controlled = win_rates.length_controlled_win_rate(won, lengths[0], lengths[1][partner], prompts)
    return {
        "win_rate": win_rates.win_rate(won, prompts).as_json(),
        "length_controlled_win_rate": controlled.as_json(),
        "unjudged": int(np.isnan(won).sum()),
        "length_characters": [float(lengths[0].mean()), float(lengths[1][partner].mean())],
    }


def _parts(batch: pa.RecordBatch) -> Mapping[tuple[str, str], np.ndarray]:
    """bool [rows] of each (model, decoding), in order of appearance."""
    keys = list(zip(*(batch.column(name).to_pylist() for name in ("model", "decoding")), strict=True))
    return {key: np.array([one == key for one in keys]) for key in dict.fromkeys(keys)}


def _keys(batch: pa.RecordBatch) -> list[tuple[int, int]]:
    return list(zip(*(batch.column(name).to_pylist() for name in ("prompt_id", "sample")), strict=True))


def _scores(batch: pa.RecordBatch, judge: str) -> np.ndarray:
    return batch.column(judge).to_numpy(zero_copy_only=False).astype(np.float64)


def _by_prompt(batch: pa.RecordBatch, judge: str) -> np.ndarray:
    """Scores [prompts, samples]."""
    order = np.lexsort((batch.column("sample").to_numpy(), batch.column("prompt_id").to_numpy()))
    prompts = len(np.unique(batch.column("prompt_id").to_numpy()))
    return _scores(batch, judge)[order].reshape(prompts, -1)


def _over_prompts(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    _, group, size = np.unique(prompts, return_inverse=True, return_counts=True)
    return estimate(np.bincount(group, values, len(size)) / size)
