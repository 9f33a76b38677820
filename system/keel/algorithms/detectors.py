"""Detectors of over-optimization: each a statistic of series, its interval, and a threshold the interval must clear.

    held-out samples   proxy_gold_divergence  ratio (spread, entropy, length)  rise (repetition, template overlap)
                       share_outside
    training steps     slope  curvature  log_ratio_of_windows

A detector fires where the whole interval lies behind the threshold, never for a point. Pure functions on numpy; None
where a series is too short or has no spread. A sample is a mean over held-out completions with its standard error. Two
samples are compared as independent (Welch), although the prompts are the same ones: that is conservative where rows
of the two go together. proxy_gold_divergence compares prompt by prompt where it can. Intervals are those of one look,
and a run looks often, so false alarms are more frequent than 1 - confidence; proxy_gold_divergence alone corrects for
it.

A new detector: a function here, a block in config/guard.py, and its series in online/guard.py, which asks it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Sample:
    """A mean over the completions of one evaluation."""

    step: int
    mean: float
    standard_error: float
    rows: int


@dataclass(frozen=True)
class Pairs:
    """Differences of the same held-out prompts: the last evaluation minus the one at `step`, each [prompts]."""

    step: int
    proxy: np.ndarray
    gold: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What a detector says of its series."""

    fired: bool
    statistic: float
    low: float
    high: float
    """Ends of the interval of the statistic."""
    threshold: float


def sample(step: int, values: np.ndarray) -> Sample | None:
    """Mean and standard error s/sqrt(n) of the finite values; None for fewer than two."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    return Sample(step, float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values))


def jackknife(step: int, sums: np.ndarray, pairs: np.ndarray) -> Sample | None:
    """Mean over pairs of prompts with its standard error by the jackknife over prompts; None for fewer than three.

    `sums` and `pairs` are symmetric [m, m] with a diagonal of 0: a value summed over the pairs of completions of two
    prompts, and the number of these pairs. A completion is in many pairs, so pairs are no independent rows. With U_i
    the mean without prompt i, the squared error is (m - 1) / m sum_i (U_i - mean U)^2; `rows` is m. Where few
    completions share a template the interval lies too low, so `rise` fires late rather than early.
    """
    prompts = len(sums)
    if prompts < 3:
        return None
    without = (sums.sum() - 2 * sums.sum(0)) / (pairs.sum() - 2 * pairs.sum(0))
    error = math.sqrt((prompts - 1) * float(without.var()))
    return Sample(step, float(sums.sum() / pairs.sum()), error, prompts)


def difference(late: Sample, early: Sample, factor: float, confidence: float) -> tuple[float, float, float]:
    """late - factor * early with its Welch interval: t of (a + b)^2 / (a^2/(n1-1) + b^2/(n2-1)) degrees of freedom.

    a and b are the squared standard errors of the two parts.
    """
    a, b = late.standard_error**2, (factor * early.standard_error) ** 2
    point = late.mean - factor * early.mean
    if a + b == 0:
        return point, point, point
    freedom = (a + b) ** 2 / (a**2 / (late.rows - 1) + b**2 / (early.rows - 1))
    half = _quantile(confidence, freedom) * math.sqrt(a + b)
    return point, point - half, point + half


def paired(differences: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Mean of the differences with its t interval: mean +- t_(n-1) s / sqrt(n)."""
    mean, half = float(differences.mean()), float(stats.sem(differences)) * _quantile(confidence, len(differences) - 1)
    return mean, mean - half, mean + half


def peak(proxy: Sequence[Sample], gold: Sequence[Sample]) -> int | None:
    """Step of the largest mean of gold, the first of equals, among the steps that both have; None: there is none."""
    steps = {sample.step for sample in proxy}
    shared = [sample for sample in gold if sample.step in steps]
    return max(shared, key=lambda sample: sample.mean).step if shared else None


def proxy_gold_divergence(
    proxy: Sequence[Sample], gold: Sequence[Sample], min_fall: float, confidence: float, pairs: Pairs | None = None
) -> Verdict | None:
    """gold(now) - gold(peak), reward units; fires below -min_fall while proxy(now) - proxy(peak of gold) is above 0.

    Both by their intervals, over the n steps that both have. The peak is the largest of n means, and the run looks
    after each of them, so the interval of gold has level 1 - (1 - confidence) / (n (n - 1) / 2): Bonferroni over all
    pairs of evaluations so far. Without it flat gold fires in nearly every run of 30 evaluations. Proxy rising and gold
    falling is the picture of 2210.10760 (Gao et al.), where gold peaks over sqrt(KL).

    Intervals are those of `pairs`, where they are differences to the peak, else Welch's.
    """
    steps = {sample.step for sample in proxy} & {sample.step for sample in gold}
    best = peak(proxy, gold)
    if best is None or len(steps) < 2:
        return None
    level = 1 - (1 - confidence) / math.comb(len(steps), 2)
    if pairs is not None and pairs.step == best:
        (fall, low, high), (_, rise, _) = paired(pairs.gold, level), paired(pairs.proxy, confidence)
    else:
        of_gold, of_proxy = ({sample.step: sample for sample in series} for series in (gold, proxy))
        now = max(steps)
        fall, low, high = difference(of_gold[now], of_gold[best], 1.0, level)
        _, rise, _ = difference(of_proxy[now], of_proxy[best], 1.0, confidence)
    threshold = 0.0 - min_fall
    return Verdict(high < threshold and rise > 0, fall, low, high, threshold)


def ratio(series: Sequence[Sample], lowest: float | None, highest: float, confidence: float) -> Verdict | None:
    """mean(now) / mean(start), no unit; fires where mean(now) - bound * mean(start) excludes 0 on the far side.

    `lowest` None: only upwards. The interval reported is that difference's, divided by mean(start). Of the spread of
    ensemble members (2310.02743: their disagreement grows where the reward is no longer what it was fitted to be), of
    entropy a token, of length.
    """
    if len(series) < 2 or series[0].mean <= 0:
        return None
    start, now = series[0], series[-1]
    upwards = lowest is None or now.mean >= start.mean
    bound = highest if upwards or lowest is None else lowest
    point, low, high = (value / start.mean + bound for value in difference(now, start, bound, confidence))
    return Verdict(low > bound if upwards else high < bound, point, low, high, bound)


def rise(series: Sequence[Sample], most: float, confidence: float) -> Verdict | None:
    """mean(now) - mean(start), in the unit of the series; fires where the interval lies above `most`."""
    if len(series) < 2:
        return None
    point, low, high = difference(series[-1], series[0], 1.0, confidence)
    return Verdict(low > most, point, low, high, most)


def band(values: np.ndarray) -> tuple[float, float]:
    """The 0.5 % and 99.5 % quantile of the finite values: the band in which 99 % of them lie."""
    low, high = np.quantile(values[np.isfinite(values)], [0.005, 0.995])
    return float(low), float(high)


def share_outside(outside: int, rows: int, most: float, confidence: float) -> Verdict | None:
    """Share of completions outside the band of the start, with its Clopper-Pearson interval; fires above `most`.

    A band of n rows has about 2/(n + 1) of new rows outside, or 1 % for large n.
    """
    if not rows:
        return None
    interval = stats.binomtest(outside, rows).proportion_ci(confidence, "exact")
    return Verdict(interval.low > most, outside / rows, float(interval.low), float(interval.high), most)


def slope(values: Sequence[float], most: float, confidence: float) -> Verdict | None:
    """Slope b of the least-squares line a + b t over the window, unit of the values a step; fires above `most`.

    Interval: t with n - 2 degrees of freedom, residuals taken as independent. KL that does not level off is the
    sign of maximum-entropy runs in 2509.20265.
    """
    return _coefficient(values, 1, 1.0, most, confidence)


def curvature(values: Sequence[float], most: float, confidence: float) -> Verdict | None:
    """Second derivative 2c of the least-squares parabola a + b t + c t^2, unit of the values a step and step.

    Fires above `most`; t with n - 3 degrees of freedom. As an early warning it was measured to be poor
    (OpenRLHF issue 1263).
    """
    return _coefficient(values, 2, 2.0, most, confidence)


def log_ratio_of_windows(
    early: Sequence[float], late: Sequence[float], most: float, confidence: float
) -> Verdict | None:
    """exp of mean(log late) - mean(log early), no unit, with the Welch interval of the logarithms; fires above `most`.

    Of gradient norms: they rise as the reward model's accuracy falls (2602.18037).
    """
    if min(len(early), len(late)) < 2 or min(*early, *late) <= 0:
        return None
    first, last = (sample(0, np.log(np.asarray(values))) for values in (early, late))
    if first is None or last is None:
        return None
    point, low, high = (math.exp(value) for value in difference(last, first, 1.0, confidence))
    return Verdict(low > most, point, low, high, most)


def _coefficient(values: Sequence[float], degree: int, scale: float, most: float, confidence: float) -> Verdict | None:
    """Leading coefficient of a least-squares polynomial, times `scale`, with its t interval."""
    freedom = len(values) - degree - 1
    if freedom < 1 or not np.isfinite(values).all():
        return None
    times = np.arange(len(values)) - (len(values) - 1) / 2
    columns = np.vander(times, degree + 1)
    inverse = np.linalg.inv(columns.T @ columns)
    fit = inverse @ columns.T @ np.asarray(values, np.float64)
    residuals = np.asarray(values) - columns @ fit
    error = math.sqrt(max(float(residuals @ residuals) / freedom * inverse[0, 0], 0.0))
    point, half = scale * float(fit[0]), scale * error * _quantile(confidence, freedom)
    return Verdict(point - half > most, point, point - half, point + half, most)


def _quantile(confidence: float, freedom: float) -> float:
    return float(stats.t.ppf(0.5 + confidence / 2, freedom))
