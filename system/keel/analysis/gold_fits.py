"""How gold depends on the distance from the start: the two curves of Gao et al. 2210.10760, fitted with intervals.

    d = sqrt(KL), in square roots of nats; gold(d) = intercept + R(d)
    reinforcement learning  R(d) = d (alpha - beta log d)  peak at d* = exp(alpha/beta - 1), R(d*) = beta d*
    best of n               R(d) = d (alpha - beta d)      peak at d* = alpha / (2 beta),    R(d*) = alpha^2 / (4 beta)

Both are linear in (intercept, alpha, beta), so a fit is weighted least squares, with weights 1 / standard error^2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["reinforcement_learning", "best_of_n"]
_SHORTEST = 0.3
"""The curves are not meant for smaller distances (2210.10760); only the start, at distance 0, is used below it."""
_DRAWS = 4000
_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class FittedNumber:
    """A number with its 95 % interval; an end is infinite where the evaluations do not bound it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GoldFit:
    """A fitted curve of gold over d = sqrt(KL)."""

    form: Form
    coefficients: np.ndarray
    """[3] intercept, alpha, beta."""
    covariance: np.ndarray
    """[3, 3] of the coefficients."""
    alpha: FittedNumber
    beta: FittedNumber
    peak_distance: FittedNumber
    """d*, in square roots of nats; infinite where gold does not turn (beta <= 0)."""
    residual_per_freedom: float
    """Chi-squared over degrees of freedom: about 1 where the curve fits, well above 1 where it does not; NaN: none."""

    def gold(self, distance: float) -> FittedNumber:
        """Gold predicted at a distance d, with the interval of the curve there (not that of a new evaluation)."""
        row = _columns(np.array([distance]), self.form)[0]
        value, half = float(row @ self.coefficients), _QUANTILE * math.sqrt(float(row @ self.covariance @ row))
        return FittedNumber(value, value - half, value + half)


def fit(
    form: Form, distances: Sequence[float], gold: Sequence[float], standard_errors: Sequence[float], seed: int = 0
) -> GoldFit | None:
    """Fit one curve to evaluations; None for fewer than three usable ones or where one has no standard error.

    Points with 0 < d < 0.3 are left out. Intervals of alpha and beta are alpha +- 1.96 standard errors from
    (X' W X)^-1; that of d* is the 2.5 % to 97.5 % range of 4,000 draws of (alpha, beta) from their normal
    distribution. Errors of evaluations are taken as independent: those on the same prompts share a part, which mostly
    moves the intercept.
    """
    d, values, errors = (np.asarray(column, np.float64) for column in (distances, gold, standard_errors))
    usable = np.isfinite(d) & np.isfinite(values) & (errors > 0) & ((d >= _SHORTEST) | (d <= 0))
    if usable.sum() < 3 or len(set(np.maximum(d[usable], 0).tolist())) < 3:
        return None
    columns = _columns(np.maximum(d[usable], 0), form)
    weighted = columns / errors[usable, None]
    covariance = np.linalg.inv(weighted.T @ weighted)
    coefficients = covariance @ weighted.T @ (values[usable] / errors[usable])
    residuals = (values[usable] - columns @ coefficients) / errors[usable]
    freedom = len(residuals) - 3
    alpha, beta = (_interval(coefficients[place], covariance[place, place]) for place in (1, 2))
    draws = np.random.default_rng(seed).multivariate_normal(coefficients[1:], covariance[1:, 1:], _DRAWS)
    low, high = np.quantile(_peaks(draws, form), [0.025, 0.975], method="lower")
    peak = float(_peaks(coefficients[None, 1:], form)[0])
    spread = float((residuals**2).sum() / freedom) if freedom else math.nan
    distance = FittedNumber(peak, float(low), float(high))
    return GoldFit(form, coefficients, covariance, alpha, beta, distance, spread)


def _columns(d: np.ndarray, form: Form) -> np.ndarray:
    """[points, 3]: 1, d, and -d log d or -d^2; 0 log 0 = 0."""
    turn = d * np.log(np.where(d > 0, d, 1)) if form == "reinforcement_learning" else d**2
    return np.stack([np.ones_like(d), d, -turn], axis=1)


def _peaks(pairs: np.ndarray, form: Form) -> np.ndarray:
    """d* of each (alpha, beta), [pairs]; infinite where beta <= 0, 0 where gold falls from the start (best of n)."""
    alpha, beta = pairs.T
    turns = beta > 0
    ratio = np.divide(alpha, beta, out=np.zeros_like(alpha), where=turns)
    with np.errstate(over="ignore"):
        peak = np.exp(ratio - 1) if form == "reinforcement_learning" else np.maximum(ratio / 2, 0)
    return np.where(turns, peak, np.inf)


def _interval(value: float, variance: float) -> FittedNumber:
    half = _QUANTILE * math.sqrt(variance)
    return FittedNumber(float(value), float(value - half), float(value + half))
