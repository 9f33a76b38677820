"""Intervals over two levels: seeds of training, and the prompts on which the policies of all seeds answered.

Value of seed s of an arm on prompt p: v[s, p] = mu + a[s] + b[p] + e[s, p]. Arms share the prompts, so b cancels in
a difference of arms as far as it is common to them; their seeds are drawn apart. The variance of the mean is

    sum over arms of  var_s(mean_p v) / S        seeds: contains a / S and e / (S P)
    + (var_p(D) - sum of e^2 / S) / P            prompts: D[p] the (difference of) means over seeds of prompt p, less
                                                 the share of e in it, which the seeds' part has already

with e^2 from the residuals of the two-way layout. Prompts are resampled (their values may be skewed). Two to five seeds
have no shape to resample, so their means are drawn from a normal distribution of that variance, and the quantiles of
all draws are stretched by t(df) / z, df by Welch and Satterthwaite. Resampling few seeds instead covers 72 to 81 % at 2
seeds and 82 to 90 % at 3 where seeds differ (benchmarks/seed_coverage.py).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from keel.observability.diagnostics import Estimate

_DRAWS = 4000
_TAILS = (0.025, 0.975)

Term = tuple[int, np.ndarray]
"""Sign of an arm in the sum, and its values [seeds, prompts]."""


def over_seeds_and_prompts(terms: Sequence[Term], seed: int = 0) -> Estimate:
    """Signed sum of the arms' means with a 95 % interval over their seeds and the prompts they share.

    One term is a mean, two with signs 1 and -1 are a difference. Prompts without a value in any row are left out. An
    arm of one seed has no spread over seeds, so the interval does not cover its other seeds.
    """
    known = np.all([np.isfinite(values).all(axis=0) for _, values in terms], axis=0)
    arms = [(sign, values[:, known]) for sign, values in terms]
    prompts = int(known.sum())
    if not prompts:
        return Estimate(np.nan, np.nan, np.nan)
    of_prompts = np.sum([sign * values.mean(axis=0) for sign, values in arms], axis=0)
    mean = float(of_prompts.mean())
    seeds = [(_seed_variance(values), len(values) - 1) for _, values in arms if len(values) > 1]
    spread = float(of_prompts.var(ddof=1)) if prompts > 1 else 0.0
    noise = sum(_noise_variance(values) / len(values) for _, values in arms if len(values) > 1 and prompts > 1)
    between_prompts = max(0.0, spread - noise)
    variances = [*seeds, (between_prompts / prompts, prompts - 1)]
    total = sum(variance for variance, _ in variances)
    if total <= (1e-12 * max(np.abs(values).max() for _, values in arms)) ** 2:
        return Estimate(mean, mean, mean)
    rng = np.random.default_rng(seed)
    draws = np.zeros(_DRAWS)
    if between_prompts > 0:
        scale = np.sqrt(between_prompts / spread * prompts / (prompts - 1))
        drawn = rng.integers(0, prompts, (_DRAWS, prompts))
        draws += scale * (of_prompts - mean)[drawn].mean(axis=1)
    for variance, _ in seeds:
        draws += np.sqrt(variance) * rng.standard_normal(_DRAWS)
    freedom = total**2 / sum(variance**2 / count for variance, count in variances if variance > 0)
    stretch = stats.t.ppf(_TAILS[1], freedom) / stats.norm.ppf(_TAILS[1])
    low, high = stretch * np.quantile(draws, _TAILS)
    return Estimate(mean, mean + float(low), mean + float(high))


def _seed_variance(values: np.ndarray) -> float:
    """Variance of the mean over seeds, from the means [seeds]."""
    return float(values.mean(axis=1).var(ddof=1)) / len(values)


def _noise_variance(values: np.ndarray) -> float:
    """Variance of e in the two-way layout: what neither the seed nor the prompt explains."""
    residuals = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    seeds, prompts = values.shape
    return float((residuals**2).sum()) / ((seeds - 1) * (prompts - 1))
