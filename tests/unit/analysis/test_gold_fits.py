"""The fits of gold over distance recover planted coefficients, agree with scipy, and cover at their nominal rate."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from keel.analysis import gold_fits

DISTANCES = np.array([0.0, 0.5, 1, 2, 3, 4, 6, 8])


def rl(d: np.ndarray, intercept: float, alpha: float, beta: float) -> np.ndarray:
    return intercept + d * (alpha - beta * np.log(np.where(d > 0, d, 1)))


def bon(d: np.ndarray, intercept: float, alpha: float, beta: float) -> np.ndarray:
    return intercept + d * (alpha - beta * d)


def test_planted_coefficients_and_the_peak_of_the_closed_form() -> None:
    fit = gold_fits.fit("reinforcement_learning", DISTANCES, rl(DISTANCES, 0.2, 1.0, 0.35), [0.1] * 8)
    assert fit is not None
    assert fit.coefficients.tolist() == pytest.approx([0.2, 1.0, 0.35], abs=1e-9)
    assert fit.peak_distance.value == pytest.approx(6.4054094322, abs=1e-8)
    assert fit.gold(fit.peak_distance.value).value - 0.2 == pytest.approx(2.2418933013, abs=1e-8)
    assert fit.residual_per_freedom == pytest.approx(0, abs=1e-12)
    best = gold_fits.fit("best_of_n", DISTANCES, bon(DISTANCES, 0.0, 1.0, 0.12), [0.1] * 8)
    assert best is not None and best.peak_distance.value == pytest.approx(4.1666666667, abs=1e-8)
    assert best.gold(best.peak_distance.value).value == pytest.approx(2.0833333333, abs=1e-8)


@pytest.mark.parametrize(("form", "curve"), [("reinforcement_learning", rl), ("best_of_n", bon)])
def test_noisy_points_with_unequal_errors_as_scipy_fits_them(form: gold_fits.Form, curve: object) -> None:
    draw = np.random.default_rng(4)
    errors = draw.uniform(0.02, 0.2, 8)
    gold = rl(DISTANCES, 0.1, 0.8, 0.3) + errors * draw.normal(size=8)
    fit = gold_fits.fit(form, DISTANCES, gold, errors)
    assert fit is not None
    expected, covariance = curve_fit(curve, DISTANCES, gold, p0=[0, 1, 0.1], sigma=errors, absolute_sigma=True)
    assert fit.coefficients.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert fit.covariance.ravel().tolist() == pytest.approx(covariance.ravel().tolist(), rel=1e-3)
    half = 1.959964 * math.sqrt(covariance[2, 2])
    assert (fit.beta.low, fit.beta.high) == pytest.approx((expected[2] - half, expected[2] + half), abs=1e-4)


@pytest.mark.parametrize(("form", "curve", "beta"), [("reinforcement_learning", rl, 0.35), ("best_of_n", bon, 0.12)])
def test_intervals_cover_at_the_nominal_rate(form: gold_fits.Form, curve: object, beta: float) -> None:
    """400 experiments: 95 % within four standard errors of a share (1.1 %), for alpha, beta, d* and gold at d = 5."""
    draw = np.random.default_rng(11)
    true = curve(DISTANCES, 0.1, 1.0, beta)  # type: ignore[operator]
    peak = math.exp(1 / beta - 1) if form == "reinforcement_learning" else 1 / (2 * beta)
    at_five = float(curve(np.array([5.0]), 0.1, 1.0, beta)[0])  # type: ignore[operator]
    inside = np.zeros(4)
    for _ in range(400):
        fit = gold_fits.fit(form, DISTANCES, true + 0.05 * draw.normal(size=8), [0.05] * 8)
        assert fit is not None
        pairs = [(fit.alpha, 1.0), (fit.beta, beta), (fit.peak_distance, peak), (fit.gold(5.0), at_five)]
        inside += [interval.low <= value <= interval.high for interval, value in pairs]
    assert (np.abs(inside / 400 - 0.95) < 0.045).all(), inside


def test_gold_that_does_not_turn_has_no_peak() -> None:
    fit = gold_fits.fit("reinforcement_learning", DISTANCES, rl(DISTANCES, 0.0, 1.0, -0.2), [0.01] * 8)
    assert fit is not None and math.isinf(fit.peak_distance.value) and math.isinf(fit.peak_distance.high)
    unsure = gold_fits.fit("reinforcement_learning", [0, 1, 2, 3], [0.0, 0.5, 0.9, 1.1], [0.2] * 4)
    assert unsure is not None and math.isinf(unsure.peak_distance.high) and math.isfinite(unsure.peak_distance.low)


@pytest.mark.parametrize(
    ("distances", "errors"),
    [([0, 1], [0.1] * 2), ([0, 1, 1], [0.1] * 3), ([0, 0.1, 0.2, 1], [0.1] * 4), ([0, 1, 2], [0.1, 0.1, math.nan])],
)
def test_too_few_points_have_no_fit(distances: list[float], errors: list[float]) -> None:
    assert gold_fits.fit("best_of_n", distances, [0.0] * len(distances), errors) is None


def test_points_closer_than_the_curves_are_meant_for_are_left_out() -> None:
    near, gold = np.append(DISTANCES, 0.2), np.append(rl(DISTANCES, 0.2, 1.0, 0.35), 50.0)
    fit = gold_fits.fit("reinforcement_learning", near, gold, [0.1] * 9)
    assert fit is not None and fit.coefficients.tolist() == pytest.approx([0.2, 1.0, 0.35], abs=1e-9)
