"""Rates at which one policy beats another: win rates, win rates at equal lengths, pass@k. Intervals resample prompts.

One row is one completion beside another of the same prompt. Rows of one prompt share what makes it hard, so prompts
are resampled, not rows (cluster bootstrap), and every prompt weighs the same however many rows it has.

Shapes: n rows, P prompts, R resamples.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from keel.observability.diagnostics import Estimate, estimate

RIDGE = 0.01
"""Penalty of the length coefficient; that of a normal prior with standard deviation 10 on a regressor within +-1."""
_RESAMPLES, _CELLS = 2000, 1_000_000
_ITERATIONS, _TOLERANCE = 200, 1e-10


def wins(scores: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n] 1 where `scores` is higher, 0.5 at a tie, 0 else; NaN where a score is: a failed judge is never a loss."""
    assert scores.shape == other.shape, (scores.shape, other.shape)
    return np.where(np.isnan(scores) | np.isnan(other), np.nan, (scores > other) + 0.5 * (scores == other))


def win_rate(wins: np.ndarray, prompts: np.ndarray | None = None, seed: int = 0) -> Estimate:
    """Mean over prompts of the prompt's mean win [n], rows without one left out.

    `prompts` [n] says which rows share a prompt; None: each row is its own. With all wins (or all losses) the bootstrap
    knows no spread and the interval is a point, whatever n is.
    """
    known = np.isfinite(wins)
    if prompts is None:
        return estimate(wins[known], seed)
    _, group, size = np.unique(prompts[known], return_inverse=True, return_counts=True)
    return estimate(np.bincount(group, wins[known]) / size, seed)


def length_controlled_win_rate(
    wins: np.ndarray,
    own_lengths: np.ndarray,
    other_lengths: np.ndarray,
    prompts: np.ndarray | None = None,
    seed: int = 0,
) -> Estimate:
    """The win rate if both answers had the same length, by logistic regression on the length difference.

    P(win) = sigmoid(a + b x), x = tanh((own length - other length) / std of that difference over the rows);
    the estimate is sigmoid(a). This is the length term of AlpacaEval 2 LC (arXiv 2404.04475). Its term for the
    instruction's difficulty is left out: that needs the wins of many models on the same instructions. A tie is half
    a win.

    (a, b) maximize the log-likelihood, each prompt weighing 1, minus RIDGE b^2 / 2: where length separates wins from
    losses b would be infinite; where it does not, the ridge moves b by the order of RIDGE b / P. a is free: shrinking
    it would pull every rate to 0.5. Equal to `win_rate` where there is nothing to control for or nothing to explain:
    no variance of the difference [also when own is always 10 longer: then length and quality cannot be told apart], or
    all rows the same win. When all differences have one sign, equal lengths are an extrapolation, and the interval
    is wide.

    The interval (95 %, BCa) resamples prompts and fits again, the std included.
    """
    assert wins.shape == own_lengths.shape == other_lengths.shape, (wins.shape, own_lengths.shape, other_lengths.shape)
    known = np.isfinite(wins)
    won, difference = wins[known], (own_lengths - other_lengths)[known].astype(np.float64)
    rows = np.arange(len(wins)) if prompts is None else prompts
    _, group, size = np.unique(rows[known], return_inverse=True, return_counts=True)
    if len(won) == 0 or np.ptp(won) == 0 or np.ptp(difference) == 0:
        return win_rate(wins, prompts, seed)

    def rates(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """[..., draws] prompts -> [...] rates."""
        assert axis in (-1, drawn.ndim - 1), axis
        flat = drawn.reshape(-1, drawn.shape[-1])
        counts = np.stack([np.bincount(places, minlength=len(size)) for places in flat])
        estimates = _rates_at_equal_length((counts / size)[:, group], won, difference)
        return np.round(estimates, 9).reshape(drawn.shape[:-1])  # BCa counts ties: equal but for rounding is equal

    everyone = np.arange(len(size))
    mean = float(rates(everyone))
    if len(size) < 2:
        return Estimate(mean, mean, mean)
    bootstrap = stats.bootstrap(
        (everyone,), rates, n_resamples=_RESAMPLES, batch=max(1, _CELLS // len(won)), rng=np.random.default_rng(seed)
    )
    low, high = bootstrap.confidence_interval
    if not np.isfinite([low, high]).all():  # BCa has no answer where every resample says the same
        low, high = np.quantile(bootstrap.bootstrap_distribution, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def pass_at_k(correct: np.ndarray, ks: Sequence[int], seed: int = 0) -> dict[int, Estimate]:
    """Chance that one of k samples is correct, from correct [P, n] (bool), n >= k samples a prompt: mean over prompts.

    1 - C(n-c, k) / C(n, k) with c correct ones, unbiased (arXiv 2107.03374, eq. 1); as a product, since the binomials
    overflow: C(n-c, k) / C(n, k) = prod_{i=n-c+1}^{n} (1 - k/i). Raises ValueError for a k outside 1..n.
    """
    assert correct.ndim == 2 and correct.dtype == bool, (correct.shape, correct.dtype)
    samples = correct.shape[1]
    if wrong := [k for k in ks if not 1 <= k <= samples]:
        raise ValueError(f"k={wrong[0]}: expected 1 to {samples}, the samples of a prompt")
    num_correct = correct.sum(axis=1)
    descending = np.arange(samples, 0, -1)
    estimates = {}
    for k in ks:
        factors = np.maximum(1 - k / descending, 0)  # the first zero is exact and ends the product
        all_fail = np.concatenate([[1.0], np.cumprod(factors)])  # by number of correct samples
        estimates[k] = estimate(1 - all_fail[num_correct], seed)
    return estimates


def _rates_at_equal_length(weights: np.ndarray, won: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """sigmoid(a) of each weighting [R, n] of the rows; the plain rate where there is nothing to control for."""
    total = weights.sum(axis=1)
    plain = weights @ won / total
    center = weights @ difference / total
    spread = np.sqrt(np.maximum(weights @ difference**2 / total - center**2, 0))
    varies = spread > 1e-9 * np.abs(difference).max()
    fitted = varies & (np.minimum(plain, 1 - plain) > 1e-12)  # all wins: a is infinite, its sigmoid 1
    if fitted.any():
        regressor = np.tanh(difference / spread[fitted, None])
        plain[fitted] = special.expit(_intercepts(weights[fitted], won, regressor))
    return plain


def _intercepts(weights: np.ndarray, won: np.ndarray, regressor: np.ndarray) -> np.ndarray:
    """a [R] of the penalized logistic regressions of won [n] on regressor [R, n], rows weighted by weights [R, n].

    Newton steps on (a, b), halved for the resamples whose objective would fall: concave, so this ends at the maximum.
    """

    def objective(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        logits = a[:, None] + b[:, None] * regressor
        return (weights * (won * logits - np.logaddexp(0, logits))).sum(axis=1) - RIDGE * b**2 / 2

    a, b, scale = np.zeros(len(weights)), np.zeros(len(weights)), np.ones(len(weights))
    best = objective(a, b)
    for _ in range(_ITERATIONS):
        chance = special.expit(a[:, None] + b[:, None] * regressor)
        residual, curvature = weights * (won - chance), weights * chance * (1 - chance)
        slope_a, slope_b = residual.sum(axis=1), (residual * regressor).sum(axis=1) - RIDGE * b
        if max(np.abs(slope_a).max(), np.abs(slope_b).max()) < _TOLERANCE * weights.sum(axis=1).max():
            break
        aa, ab = curvature.sum(axis=1), (curvature * regressor).sum(axis=1)
        bb = (curvature * regressor**2).sum(axis=1) + RIDGE
        determinant = aa * bb - ab**2
        next_a = a + scale * (bb * slope_a - ab * slope_b) / determinant
        next_b = b + scale * (aa * slope_b - ab * slope_a) / determinant
        reached = objective(next_a, next_b)
        better = reached >= best - 1e-12 * np.abs(best)
        a, b, best = np.where(better, next_a, a), np.where(better, next_b, b), np.where(better, reached, best)
        scale = np.where(better, np.minimum(1, 2 * scale), scale / 2)
    return a
