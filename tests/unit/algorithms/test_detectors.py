"""Detectors against scipy's own tests and intervals, and their rate of false alarms on noise."""

import math

import numpy as np
import pytest
from scipy import stats

from keel.algorithms import detectors
from keel.algorithms.detectors import Pairs, Sample


def held_out(step: int, mean: float, error: float, rows: int = 64) -> Sample:
    return Sample(step, mean, error, rows)


def test_a_sample_is_a_mean_with_its_standard_error() -> None:
    values = np.array([0.1, 0.4, float("nan"), 0.9])
    sample = detectors.sample(3, values)
    assert sample is not None and (sample.step, sample.rows) == (3, 3)
    assert sample.mean == pytest.approx(1.4 / 3) and sample.standard_error == pytest.approx(stats.sem([0.1, 0.4, 0.9]))
    assert detectors.sample(3, values[:1]) is None


def test_the_interval_of_a_difference_is_welchs() -> None:
    random = np.random.default_rng(0)
    late, early = random.normal(0.4, 1.0, 30), random.normal(0.1, 0.3, 12)
    samples = [detectors.sample(0, values) for values in (late, early)]
    assert samples[0] and samples[1]
    interval = stats.ttest_ind(late, early, equal_var=False).confidence_interval(0.9)
    expected = (late.mean() - early.mean(), interval.low, interval.high)
    assert detectors.difference(samples[0], samples[1], 1.0, 0.9) == pytest.approx(expected)
    scaled = stats.ttest_ind(late, 2.5 * early, equal_var=False).confidence_interval(0.95)
    assert detectors.difference(samples[0], samples[1], 2.5, 0.95)[1:] == pytest.approx((scaled.low, scaled.high))


def test_the_jackknife_leaves_out_one_prompt_after_another() -> None:
    """Three prompts of two, one and three completions and two more, by loops over pairs of completions."""
    random, prompts = np.random.default_rng(7), np.array([0, 0, 1, 2, 2, 2, 3, 4])
    values = random.random((8, 8))
    values += values.T

    def mean(left_out: int | None) -> float:
        kept = [row for row in range(8) if prompts[row] != left_out]
        return float(np.mean([values[a, b] for a in kept for b in kept if prompts[a] != prompts[b]]))

    member = prompts[:, None] == np.arange(5)
    sums, pairs = member.T @ values @ member, member.T @ np.ones((8, 8)) @ member
    np.fill_diagonal(sums, 0.0)
    np.fill_diagonal(pairs, 0.0)
    sample = detectors.jackknife(5, sums, pairs)
    without = [mean(prompt) for prompt in range(5)]
    error = math.sqrt(4 / 5 * sum((value - np.mean(without)) ** 2 for value in without))
    assert sample is not None and (sample.step, sample.rows) == (5, 5)
    assert (sample.mean, sample.standard_error) == pytest.approx((mean(None), error))
    assert detectors.jackknife(0, sums[:2, :2], pairs[:2, :2]) is None


@pytest.mark.parametrize(("share", "coverage"), [(0.2, 0.90), (0.5, 0.93), (0.9, 0.95)])
def test_the_jackknifes_interval_covers_the_overlap_of_a_template(share: float, coverage: float) -> None:
    """64 answers, each the template with probability `share`, so that two of them are equal with share^2."""
    random, runs = np.random.default_rng(1), 1000
    pairs = 1.0 - np.eye(64)
    covered = above = 0
    for _ in range(runs):
        template = (random.random(64) < share).astype(float)
        sample = detectors.jackknife(0, np.outer(template, template) * pairs, pairs)
        assert sample is not None
        half = stats.t.ppf(0.975, 63) * sample.standard_error
        covered += abs(sample.mean - share**2) <= half
        above += sample.mean - half > share**2
    assert covered / runs == pytest.approx(coverage, abs=0.025) and above / runs < 0.06


def test_pairs_taken_for_independent_would_be_far_too_sure() -> None:
    random, pairs = np.random.default_rng(2), 1.0 - np.eye(64)
    template = (random.random(64) < 0.5).astype(float)
    sample = detectors.jackknife(0, np.outer(template, template) * pairs, pairs)
    independent = math.sqrt(0.25 * 0.75 / (64 * 63 / 2))
    true = math.sqrt(4 * 0.5**3 * 0.5 / 64)  # of p^2, to first order: 2 p sqrt(p (1 - p) / n)
    assert sample is not None and sample.standard_error == pytest.approx(true, rel=0.15) and true > 6 * independent


# gold and proxy of a run whose proxy rose to the end while gold turned at step 15 (standard errors of 64 rows)
GOLD = [
    (0, 0.115, 0.038),
    (5, 0.258, 0.045),
    (10, 0.412, 0.038),
    (15, 0.490, 0.036),
    (20, 0.345, 0.036),
    (25, 0.316, 0.034),
]
PROXY = [(0, -0.11, 0.1), (5, 0.85, 0.1), (10, 1.31, 0.1), (15, 2.22, 0.1), (20, 3.13, 0.1), (25, 3.41, 0.1)]


@pytest.mark.parametrize(("evaluations", "fires"), [(2, False), (4, False), (5, False), (6, True)])
def test_divergence_fires_when_gold_has_fallen_by_more_than_its_interval(evaluations: int, fires: bool) -> None:
    gold, proxy = ([held_out(*row) for row in rows[:evaluations]] for rows in (GOLD, PROXY))
    verdict = detectors.proxy_gold_divergence(proxy, gold, 0.0, 0.95)
    assert verdict is not None and verdict.fired == fires
    if fires:
        variances = np.array([0.034, 0.036]) ** 2
        freedom = variances.sum() ** 2 / (variances**2 / 63).sum()
        half = stats.t.ppf(1 - 0.025 / 15, freedom) * math.sqrt(variances.sum())  # 15 pairs of six evaluations
        assert (verdict.statistic, verdict.high) == pytest.approx((-0.174, -0.174 + half))


def test_a_gold_that_stays_level_seldom_fires_in_a_whole_run() -> None:
    """Ten looks at 64 independent rows each: 9 % of runs, against 44 % without the correction."""
    random = np.random.default_rng(4)

    def fires() -> bool:
        gold = [detectors.sample(step, random.normal(0, 1, 64)) for step in range(10)]
        proxy = [held_out(step, float(step), 0.01) for step in range(10)]
        assert all(gold)
        looks = [detectors.proxy_gold_divergence(proxy[:n], gold[:n], 0.0, 0.95) for n in range(2, 11)]  # type: ignore[arg-type]
        return any(look is not None and look.fired for look in looks)

    assert 0.02 < np.mean([fires() for _ in range(300)]) < 0.16


def test_divergence_by_pairs_has_the_interval_of_a_paired_test() -> None:
    random = np.random.default_rng(5)
    own = random.normal(0, 1, 64)
    peak, now = own + random.normal(0, 0.3, 64), own - 0.3 + random.normal(0, 0.3, 64)
    gold = [detectors.sample(step, values) for step, values in enumerate([own - 9, peak, now])]
    proxy = [held_out(step, float(step), 0.01) for step in range(3)]
    pairs = Pairs(1, random.normal(1, 0.1, 64), now - peak)
    by_pairs, by_means = (detectors.proxy_gold_divergence(proxy, gold, 0.0, 0.95, given) for given in (pairs, None))  # type: ignore[arg-type]
    assert by_pairs and by_means and by_pairs.fired and not by_means.fired
    interval = stats.ttest_rel(now, peak).confidence_interval(1 - 0.05 / 3)
    assert (by_pairs.low, by_pairs.high) == pytest.approx((interval.low, interval.high))
    elsewhere, level = (
        detectors.proxy_gold_divergence(proxy, gold, 0.0, 0.95, given)  # type: ignore[arg-type]
        for given in (Pairs(0, pairs.proxy, pairs.gold), Pairs(1, random.normal(0, 1, 64), pairs.gold))
    )
    assert elsewhere == by_means  # no differences to the peak
    assert level and not level.fired and level.high == by_pairs.high  # the proxy does not rise by its own pairs


def test_a_level_gold_by_pairs_seldom_fires_though_half_of_a_row_is_its_prompts() -> None:
    """Ten looks: 7 % of runs, as without a share of the prompt; Welch's interval fires in less than 1 % of them."""
    random, scale = np.random.default_rng(6), math.sqrt(0.5)

    def fires() -> bool:
        own = random.normal(0, scale, 64)
        rows = [own + random.normal(0, scale, 64) for _ in range(10)]
        gold = [detectors.sample(step, values) for step, values in enumerate(rows)]
        proxy = [held_out(step, float(step), 0.01) for step in range(10)]
        for now in range(1, 10):
            then = detectors.peak(proxy[: now + 1], gold[: now + 1])  # type: ignore[arg-type]
            assert then is not None
            pairs = Pairs(then, np.linspace(1, 1.1, 64), rows[now] - rows[then])
            look = detectors.proxy_gold_divergence(proxy[: now + 1], gold[: now + 1], 0.0, 0.95, pairs)  # type: ignore[arg-type]
            if look is not None and look.fired:
                return True
        return False

    assert 0.03 < np.mean([fires() for _ in range(300)]) < 0.13


def test_divergence_needs_a_proxy_that_rises_and_a_fall_of_its_size() -> None:
    gold, proxy = ([held_out(*row) for row in rows] for rows in (GOLD, PROXY))
    level = [held_out(step, 2.2, 0.1) for step, *_ in PROXY]
    flat, small = (
        detectors.proxy_gold_divergence(*arguments)
        for arguments in ((level, gold, 0.0, 0.95), (proxy, gold, 0.1, 0.95))
    )
    assert flat and small and not flat.fired and not small.fired
    assert detectors.proxy_gold_divergence(proxy[:1], gold[:1], 0.0, 0.95) is None
    assert detectors.proxy_gold_divergence(proxy[:1], gold, 0.0, 0.95) is None


def test_divergence_compares_the_steps_that_proxy_and_gold_share() -> None:
    gold, proxy = ([held_out(*row) for row in rows] for rows in (GOLD, PROXY))
    verdict = detectors.proxy_gold_divergence([*proxy[:2], *proxy[3:]], gold, 0.0, 0.95)  # no proxy at step 10
    assert verdict == detectors.proxy_gold_divergence([*proxy[:2], *proxy[3:]], [*gold[:2], *gold[3:]], 0.0, 0.95)
    assert verdict is not None and verdict.fired and verdict.statistic == pytest.approx(-0.174)
    half = stats.t.ppf(1 - 0.025 / 10, 125) * math.hypot(0.034, 0.036)  # 10 pairs of five evaluations
    assert verdict.high == pytest.approx(-0.174 + half, rel=1e-3)


@pytest.mark.parametrize(("now", "bound", "fires"), [(2.6, 1.5, False), (4.0, 1.5, True), (1.0, 0.3, False)])
def test_a_ratio_is_held_to_the_bound_on_its_side(now: float, bound: float, fires: bool) -> None:
    verdict = detectors.ratio([held_out(0, 2.0, 0.1), held_out(5, now, 0.1)], 0.3, 1.5, 0.95)
    assert verdict is not None and (verdict.fired, verdict.threshold) == (fires, bound)
    assert verdict.statistic == pytest.approx(now / 2.0)


def test_a_ratio_below_the_lowest_fires_and_without_a_lowest_never_does() -> None:
    collapsed = [held_out(0, 2.0, 0.1), held_out(5, 0.2, 0.02)]
    verdict, upwards = (detectors.ratio(collapsed, lowest, 1.5, 0.95) for lowest in (0.3, None))
    assert verdict and verdict.fired and verdict.high < 0.3
    assert upwards and not upwards.fired
    wide = detectors.ratio([held_out(0, 2.0, 0.1), held_out(5, 0.2, 0.5)], 0.3, 1.5, 0.95)
    assert wide and not wide.fired  # a point below the bound, its interval is not
    assert detectors.ratio([held_out(0, 0.0, 0.1), held_out(5, 0.2, 0.5)], 0.3, 1.5, 0.95) is None


def test_a_rise_is_a_difference_to_the_start() -> None:
    series = [held_out(0, 0.02, 0.005), held_out(5, 0.9, 0.01), held_out(10, 0.15, 0.005)]
    verdict, above = detectors.rise(series, 0.1, 0.95), detectors.rise(series, 0.125, 0.95)
    assert verdict and verdict.fired and verdict.statistic == pytest.approx(0.13)
    assert above and not above.fired


def test_the_share_outside_has_the_exact_binomial_interval() -> None:
    low, high = detectors.band(np.append(np.arange(1001.0), float("nan")))
    assert (low, high) == pytest.approx((5.0, 995.0))
    verdict = detectors.share_outside(15, 64, 0.1, 0.95)
    assert verdict is not None and verdict.fired
    assert verdict.low == pytest.approx(stats.beta.ppf(0.025, 15, 50))
    assert verdict.high == pytest.approx(stats.beta.ppf(0.975, 16, 49))
    few = detectors.share_outside(10, 64, 0.1, 0.95)
    assert few and not few.fired and few.statistic > 0.1
    assert detectors.share_outside(0, 0, 0.1, 0.95) is None


def test_a_slope_is_scipys() -> None:
    values = 0.04 * np.arange(10) + np.random.default_rng(1).normal(0, 0.02, 10)
    line = stats.linregress(np.arange(10), values)
    half = stats.t.ppf(0.975, 8) * line.stderr
    verdict = detectors.slope(list(values), 0.03, 0.95)
    assert verdict is not None
    assert (verdict.statistic, verdict.low, verdict.high) == pytest.approx(
        (line.slope, line.slope - half, line.slope + half)
    )
    assert verdict.fired == (line.slope - half > 0.03)
    assert detectors.slope([1.0, 2.0], 0.0, 0.95) is None and detectors.slope([1.0, math.nan, 2.0], 0.0, 0.95) is None


def test_a_curvature_is_that_of_polyfit() -> None:
    values = 0.003 * np.arange(20) ** 2 + np.random.default_rng(2).normal(0, 0.02, 20)
    fit, covariance = np.polyfit(np.arange(20), values, 2, cov=True)
    half = stats.t.ppf(0.975, 17) * 2 * math.sqrt(covariance[0, 0])
    verdict = detectors.curvature(list(values), 0.001, 0.95)
    assert verdict is not None and verdict.fired
    assert (verdict.statistic, verdict.low) == pytest.approx((2 * fit[0], 2 * fit[0] - half))


def test_windows_are_compared_by_their_logarithms() -> None:
    early, late = [1.0, 1.1, 0.9, 1.2], [3.0, 3.5, 2.9, 3.3]
    interval = stats.ttest_ind(np.log(late), np.log(early), equal_var=False).confidence_interval(0.95)
    verdict = detectors.log_ratio_of_windows(early, late, 2.0, 0.95)
    assert verdict is not None and verdict.fired
    assert (verdict.low, verdict.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert detectors.log_ratio_of_windows([1.0, 0.0], late, 2.0, 0.95) is None


@pytest.mark.parametrize("detector", [detectors.slope, detectors.curvature])
def test_at_its_threshold_a_trend_fires_as_often_as_the_level_says(detector: object) -> None:
    """Exactly (1 - confidence) / 2 on independent normal residuals; 2,000 draws have a standard error of 0.005."""
    random, times = np.random.default_rng(3), np.arange(12)
    trend = 0.05 * times if detector is detectors.slope else 0.025 * times**2
    verdicts = [detector(list(trend + random.normal(0, 0.3, 12)), 0.05, 0.9) for _ in range(2000)]  # type: ignore[operator]
    assert np.mean([verdict.fired for verdict in verdicts]) == pytest.approx(0.05, abs=0.015)
