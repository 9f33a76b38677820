"""Measures of over-optimization in a batch of rollouts: reward, KL, entropy, length, repetition. Pure numpy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy import stats

from keel import schema
from keel.algorithms import regularizers
from keel.observability import sample_diagnostics


def per_completion(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """One value a completion, float64 [rows]; a reward that a monitor failed to give is NaN.

    reward, reward_<name>; length_tokens; sequence_entropy_nats = -S and entropy_nats = -S/|y| (sampled estimates at the
    sampling temperature); kl_nats = S - S_ref (k1 over the completion); finished_ratio (1: ended with an end token);
    repetition_ratio (of 3-grams); reference_nll_nats = -S_ref/|y|.
    Completions that no policy sampled have no entropy and no KL, hence NaN: where there are stored ones, the same
    numbers of them are stored_logprob_nats, stored_token_logprob_nats and stored_log_ratio_nats.
    """
    lengths = schema.completion_lengths(batch)
    values = {
        name: batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
        for name in batch.schema.names
        if name.startswith("reward")
    }
    values |= {
        "length_tokens": lengths.astype(np.float64),
        "finished_ratio": np.array([reason == "stop" for reason in batch.column("finish_reason").to_pylist()], float),
    }
    if "completion_tokens" in batch.schema.names:
        values["repetition_ratio"] = sample_diagnostics.repetition(batch)
    if "reference_logprobs" in batch.schema.names:
        values["reference_nll_nats"] = sample_diagnostics.reference_nll(batch)
    if "completion_logprobs" in batch.schema.names:
        values |= _of_logprobs(batch, lengths)
    return values


def _of_logprobs(batch: pa.RecordBatch, lengths: np.ndarray) -> dict[str, np.ndarray]:
    logprobs, _ = schema.ragged(batch, "completion_logprobs")
    totals, sampled = schema.row_sums(logprobs, lengths), schema.sampled(batch)
    of_samples = {"sequence_entropy_nats": -totals, "entropy_nats": -totals / lengths}
    of_stored = {"stored_logprob_nats": totals, "stored_token_logprob_nats": totals / lengths}
    if "reference_logprobs" in batch.schema.names:
        reference, _ = schema.ragged(batch, "reference_logprobs")
        of_samples["kl_nats"] = regularizers.sequence_kl(logprobs, reference, lengths)
        of_samples["kl_k3_nats"] = schema.row_sums(regularizers.token_k3(logprobs, reference), lengths)
        of_stored["stored_log_ratio_nats"] = of_samples["kl_nats"]
    if sampled.all():
        return of_samples
    stored = np.array([name == schema.STORED for name in batch.column("generator").to_pylist()])
    of_samples["sampled_length_tokens"] = lengths.astype(np.float64)
    parts = [(of_samples, sampled), (of_stored, stored)]
    return {name: np.where(rows, value, np.nan) for part, rows in parts if rows.any() for name, value in part.items()}


def summarize(batch: pa.RecordBatch) -> dict[str, float | dict[str, float]]:
    """Mean of every value of `per_completion` over the rows, and the spread of the reward, by metric.

    The means of the columns reward_<name> are those of the metric reward_component, by its label.
    """
    values = per_completion(batch)
    means = {name: float(np.nanmean(value)) for name, value in values.items() if np.isfinite(value).any()}
    columns = [name for name in means if name.startswith("reward_")]
    components = {name.removeprefix("reward_"): means.pop(name) for name in columns}
    spread = {"reward_std": float(np.nanstd(values["reward"]))}
    return {**means, **spread, **({"reward_component": components} if components else {}), **of_batch(batch, values)}


def of_batch(batch: pa.RecordBatch, values: Mapping[str, np.ndarray]) -> dict[str, float | dict[str, float]]:
    """The numbers of the whole batch that are no means over its rows; those that it cannot give are absent.

    `values` are those of `per_completion`. Correlations are with the training reward.
    """
    reward, log_ratio = values["reward"], values.get("kl_nats", np.empty(0))
    importance = sample_diagnostics.importance(log_ratio) or (None, None)
    texts = {"completion", "completion_tokens"} <= set(batch.schema.names)
    numbers = {
        "reward_length_correlation": sample_diagnostics.correlation(reward, values["length_tokens"]),
        "reward_tail_index": sample_diagnostics.tail_index(reward),
        "template_overlap": sample_diagnostics.template_overlap(batch) if texts else None,
        "compression_ratio": sample_diagnostics.compression_ratio(batch) if texts else None,
        "reference_importance_mass": importance[0],
        "reference_effective_sample_ratio": importance[1],
    }
    names = [name for name in values if name.startswith("reward_")]
    pairs = {name.removeprefix("reward_"): sample_diagnostics.correlation(reward, values[name]) for name in names}
    correlations = {name: value for name, value in pairs.items() if value is not None}
    known: dict[str, float | dict[str, float]] = {name: value for name, value in numbers.items() if value is not None}
    return known | ({"reward_correlation": correlations} if correlations else {})


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def as_json(self) -> dict[str, float | None]:
        """The three numbers as JSON values: what is not finite is null."""
        return {name: value if np.isfinite(value) else None for name, value in vars(self).items()}


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean over completions of different prompts with a BCa bootstrap interval (95 %, 2,000 resamples).

    Values that differ by rounding alone have no interval; BCa would answer NaN.
    """
    values = values[np.isfinite(values)]
    if len(values) < 2 or np.ptp(values) <= 1e-12 * np.abs(values).max():
        mean = float(values.mean()) if len(values) else float("nan")
        return Estimate(mean, mean, mean)
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(float(values.mean()), float(interval.low), float(interval.high))
