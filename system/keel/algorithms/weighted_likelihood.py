"""Weighted likelihood: -sum_i w_i log pi(y_i|x) with weights from the rewards of one prompt's completions.

OptiDICE (2106.10783) for completions: one step, e = r - nu(x), w = max(0, (f')^-1(e / alpha)), nu(x) solved per prompt
so that the weights average 1. It never asks for anything outside the samples, so it cannot hack a reward beyond them.

    kl         f = w log w         w = k softmax(r / alpha): reward-weighted regression, FLAME's weighting of candidates
    chi2       f = (w - 1)^2 / 2   w = max(0, (r - nu)/alpha + 1): bad samples get nothing
    soft_chi2  in between          w = exp(x) for x < 0, x + 1 above: bad samples little, good ones linearly
    best_of_n  the best sample alone (RAFT, 2304.06767);   rejection: kept or not, by pair_selection.acceptance: an
               online variant: weights reach the generators after every step, so a stage of several steps applies its
               factor to samples of a policy that has moved within it; stage_steps 1 is one factor a step
"""

import numpy as np
import pyarrow as pa
from scipy import optimize, special

from keel import schema
from keel.algorithms import advantages, pair_selection
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured
from keel.config.objective import WeightedLikelihoodSettings
from keel.config.run import LearnerSpec


def chi2(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, x + 1)


def soft_chi2(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.exp(np.minimum(x, 0.0)), x + 1)


def divergence_weights(rewards: np.ndarray, form: str, temperature: float) -> np.ndarray:
    """w of one prompt's samples, mean 1: rewards [k] -> [k]. A group of one, or of equal rewards, has weights 1."""
    if not advantages.vary(rewards):
        return np.ones(len(rewards))
    if form == "kl":
        return len(rewards) * special.softmax(rewards / temperature)
    weights = {"chi2": chi2, "soft_chi2": soft_chi2}[form]

    def excess(nu: float) -> float:
        return float(weights((rewards - nu) / temperature).mean() - 1)

    # at nu = min every weight is at least 1, at nu = max at most 1
    nu = optimize.brentq(excess, rewards.min(), rewards.max(), xtol=1e-13 * max(1.0, np.abs(rewards).max()))
    return weights((rewards - nu) / temperature)


def effective_samples(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: how many of a prompt's samples count, between 1 and k."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


_REDUCTIONS = {"sum": "sequence_sum", "average": "sequence_mean", "token_mean": "token_mean"}
"""How regularizers in the loss are reduced: as the likelihood is."""


class WeightedLikelihood(Objective):
    """Likelihood of the samples, each weighted by what its reward says within its prompt."""

    reads_old = False

    def __init__(self, settings: LearnerSpec) -> None:
        super().__init__(settings)
        assert isinstance(settings.objective, WeightedLikelihoodSettings)
        self.config: WeightedLikelihoodSettings = settings.objective
        self.reduction = _REDUCTIONS[self.config.likelihood]

    def weigh(self, batch: pa.RecordBatch, measured: Measured) -> Credit:
        rewards, tickets = self.rewards(batch), batch.column("ticket").to_numpy()
        lengths = schema.completion_lengths(batch)
        weights, effective, best, accepted = np.zeros(len(rewards)), [], [], []
        for ticket in np.unique(tickets):
            rows = np.flatnonzero(tickets == ticket)
            weights[rows] = self._weights(rewards[rows], batch, rows, measured.version)
            accepted.append(float((weights[rows] > 0).mean()))
            effective.append(effective_samples(weights[rows]))
            best.append(rewards[rows].max())
        weights *= len(weights) / weights.sum()  # rejection keeps different numbers of each prompt's
        share = {"sum": 1.0, "average": 1 / lengths, "token_mean": len(lengths) / lengths.sum()}[self.config.likelihood]
        per_token = np.repeat(weights * share, lengths)
        sampled = tickets[schema.sampled(batch)]  # of stored completions it is not known what they were chosen from
        group = len(sampled) / max(len(np.unique(sampled)), 1)
        return Credit(
            advantages=per_token,
            num_rows=len(rewards),
            num_tokens=len(per_token),
            metrics={
                "effective_samples": float(np.mean(effective)),
                "accepted_ratio": float(np.mean(accepted)),
                "best_reward": float(np.mean(best)),
                **({"best_of_n_kl_nats": pair_selection.best_of_n_kl(round(group))} if group else {}),
            },
        )

    def _weights(self, rewards: np.ndarray, batch: pa.RecordBatch, rows: np.ndarray, version: int) -> np.ndarray:
        if self.config.weights == "best_of_n":
            return len(rewards) * (np.arange(len(rewards)) == rewards.argmax())
        if self.config.weights == "uniform" or not advantages.vary(rewards):
            return np.ones(len(rewards))
        if self.config.weights == "rejection":
            etas = self.config.rejection_temperatures
            stage = min(version // self.config.stage_steps, len(etas) - 1)
            keep = pair_selection.acceptance(rewards, etas[stage], etas[stage - 1] if stage else None)
            seeds = batch.column("seed").to_numpy()[rows]
            draws = np.array([np.random.default_rng(seed).random() for seed in seeds])
            return (draws < keep).astype(np.float64)  # the best is always kept: its probability is 1
        return divergence_weights(rewards, self.config.weights, self.config.temperature)
