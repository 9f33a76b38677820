"""One reward of an ensemble of rewards. Pure numpy; M members, one value a completion and member."""

import numpy as np
from scipy.special import logsumexp

from keel.algorithms.advantages import vary


def combine(
    members: np.ndarray, weights: np.ndarray, form: str, coefficient: float, centered: np.ndarray | None = None
) -> np.ndarray:
    """One reward of several, [M, rows] -> [rows]: population moments over members, each times its weight.

    sum | mean | lower_bound: mean - c std (2310.02743; QAM's critic target) | worst: min | variance: mean - c var |
    kl_dro: -c log mean exp(-r / c), the worst mean over member weights within a KL ball (2606.09073).
    Members whose zero is arbitrary differ by it, which is no uncertainty: spread and worst case are then those of the
    `centered` members, around the same mean.
    """
    weighted = members * weights[:, None]
    spread = weighted if centered is None else centered * weights[:, None]
    mean = weighted.mean(0)
    return {
        "sum": lambda: weighted.sum(0),
        "mean": lambda: mean,
        "lower_bound": lambda: mean - coefficient * spread.std(0),
        "worst": lambda: mean - spread.mean(0) + spread.min(0),
        "variance": lambda: mean - coefficient * spread.var(0),
        "kl_dro": lambda: mean - spread.mean(0) - coefficient * _log_mean_exp(-spread / coefficient),
    }[form]()


def _log_mean_exp(values: np.ndarray) -> np.ndarray:
    return logsumexp(values, axis=0) - np.log(len(values))


def center(members: np.ndarray, tickets: np.ndarray) -> np.ndarray:
    """Each member minus its mean over the prompt's completions; NaN (failed) ones stay. [M, rows] -> [M, rows]."""
    centered = members.astype(np.float64)
    for ticket in np.unique(tickets):
        rows = tickets == ticket
        for member in range(len(centered)):
            values = centered[member, rows]
            known = np.isfinite(values)
            zero = values[known].mean() if vary(values[known]) else values[known]  # equal ones: no rounding is left
            values[known] -= zero
            centered[member, rows] = values
    return centered
