"""Win rates against optimizers that share nothing with them, closed forms and simulations; pass@k against enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from keel.analysis import win_rates
from keel.observability.diagnostics import Estimate, estimate

NAN = math.nan


def controlled(won: np.ndarray, difference: np.ndarray, prompts: np.ndarray | None = None) -> Estimate:
    """At lengths around 1000 tokens, own longer by the difference."""
    return win_rates.length_controlled_win_rate(won, 1000.0 + difference, np.full(len(won), 1000.0), prompts)


def by_another_optimizer(won: np.ndarray, difference: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Maximize over (rate at equal lengths, odds ratio of one unit of x) by simplex, no gradients; sums in Python."""
    weights = np.ones(len(won)) if weights is None else weights
    center = np.average(difference, weights=weights)
    spread = math.sqrt(np.average((difference - center) ** 2, weights=weights))

    def minus_objective(parameters: np.ndarray) -> float:
        rate, ratio = 1 / (1 + math.exp(-parameters[0])), math.exp(parameters[1])
        total = 0.0
        for win, gap, weight in zip(won, difference, weights, strict=True):
            odds = rate / (1 - rate) * ratio ** math.tanh(gap / spread)
            total += weight * (win * math.log(odds / (1 + odds)) + (1 - win) * math.log(1 / (1 + odds)))
        return -total + 0.005 * math.log(ratio) ** 2

    start = minus_objective(np.array([0.1, 0.1]))
    result = optimize.minimize(
        minus_objective, [0.1, 0.1], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    )
    assert result.fun < start
    return float(special.expit(result.x[0]))


# ---- wins and plain rates


def test_wins_by_hand() -> None:
    first, other = np.array([2.0, 1.0, 0.0, NAN, 1.0, NAN, math.inf]), np.array([1.0, 1.0, 3.0, 0.0, NAN, NAN, 1.0])
    assert win_rates.wins(first, other) == pytest.approx([1, 0.5, 0, NAN, NAN, NAN, 1], nan_ok=True)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30))
def test_a_win_is_the_other_sides_loss(scores: list[tuple[int, int]]) -> None:
    first, other = np.array(scores, float).T
    assert win_rates.wins(first, other) + win_rates.wins(other, first) == pytest.approx(1)


def test_a_failed_judge_is_neither_win_nor_loss() -> None:
    wins = np.array([1.0, NAN, 0.0, 1.0, 1.0, NAN])
    assert win_rates.win_rate(wins) == win_rates.win_rate(wins[np.isfinite(wins)])
    assert win_rates.win_rate(wins).mean == 0.75
    lengths = np.array([3.0, 500.0, 4.0, 1.0, 7.0, 900.0])
    kept = np.isfinite(wins)
    assert controlled(wins, lengths) == controlled(wins[kept], lengths[kept])


def test_the_interval_of_a_win_rate_is_binomial_where_it_should_be() -> None:
    wins = (np.arange(400) < 120).astype(float)
    result, half = win_rates.win_rate(wins), 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert result.mean == pytest.approx(0.3)
    assert (result.low, result.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.007)


def test_prompts_are_resampled_not_their_samples() -> None:
    """Eight samples of a prompt that always agree are one observation, in both rates."""
    once = np.random.default_rng(0).integers(0, 2, 40).astype(float)
    gaps = np.random.default_rng(1).normal(size=40)
    prompts = np.repeat(np.arange(40), 8)
    assert win_rates.win_rate(np.repeat(once, 8), prompts) == win_rates.win_rate(once)
    assert win_rates.win_rate(np.repeat(once, 8)).half_width < 0.5 * win_rates.win_rate(once).half_width
    single, clustered = controlled(once, gaps), controlled(np.repeat(once, 8), np.repeat(gaps, 8), prompts)
    assert (clustered.mean, clustered.low, clustered.high) == pytest.approx(
        (single.mean, single.low, single.high), abs=1e-7
    )


def test_a_prompt_with_more_samples_weighs_the_same() -> None:
    wins, prompts = np.array([1.0, 1.0, 1.0, 0.0, NAN, 0.0]), np.array(["a", "a", "a", "b", "b", "c"])
    assert win_rates.win_rate(wins, prompts).mean == pytest.approx(1 / 3)
    assert win_rates.win_rate(wins).mean == pytest.approx(3 / 5)


# ---- equal lengths


@pytest.mark.parametrize("seed", range(6))
def test_the_controlled_rate_is_what_another_optimizer_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    difference = rng.normal(30 * rng.normal(), 40, 50).round()
    chance = special.expit(rng.normal() + rng.normal(0, 2) * np.tanh(difference / 40))
    won = np.where(rng.random(50) < 0.2, 0.5, rng.random(50) < chance)
    assert controlled(won, difference).mean == pytest.approx(by_another_optimizer(won, difference), abs=1e-6)


def test_so_it_is_with_several_samples_a_prompt() -> None:
    rng = np.random.default_rng(7)
    prompts = np.repeat(np.arange(12), np.arange(1, 13))
    difference, won = rng.normal(20, 40, len(prompts)), rng.integers(0, 2, len(prompts)).astype(float)
    weights = 1 / (prompts + 1)
    result = controlled(won, difference, prompts).mean
    assert result == pytest.approx(by_another_optimizer(won, difference, weights), abs=1e-6)
    assert abs(result - controlled(won, difference).mean) > 1e-3


def test_two_lengths_have_a_closed_form() -> None:
    """Own is 5 longer or 5 shorter, half each: x = +-tanh 1, so a is the mean of the two logits."""
    difference = np.repeat([5.0, -5.0], 400)
    won = np.concatenate([np.arange(400) < 360, np.arange(400) < 200]).astype(float)
    expected = special.expit((special.logit(0.9) + special.logit(0.5)) / 2)
    assert expected == pytest.approx(0.75)  # odds 3
    assert controlled(won, difference).mean == pytest.approx(expected, abs=2e-4)


def test_wins_by_length_alone_are_no_wins_at_equal_length() -> None:
    rng = np.random.default_rng(3)
    difference = rng.normal(60, 60, 700)
    won = (rng.random(700) < special.expit(2 * np.tanh(difference / 60))).astype(float)
    plain, equal = win_rates.win_rate(won), controlled(won, difference)
    assert plain.low > 0.65
    assert equal.low < 0.5 < equal.high and abs(equal.mean - 0.5) < 0.05


def test_the_interval_covers_the_truth() -> None:
    """sigmoid(0.4) at equal lengths, 80 prompts, own mostly longer: about 38 of 40 intervals hold it."""
    rng, truth = np.random.default_rng(4), float(special.expit(0.4))
    held = 0
    for _ in range(40):
        difference = rng.normal(10, 40, 80)
        won = (rng.random(80) < special.expit(0.4 + 1.5 * np.tanh(difference / 40))).astype(float)
        result = controlled(won, difference)
        held += result.low <= truth <= result.high
    assert 34 <= held <= 40


def test_where_length_separates_wins_from_losses_the_rate_is_finite() -> None:
    difference = np.linspace(-30, 30, 40)
    won = (difference > 0).astype(float)
    result = controlled(won, difference)
    assert result.mean == pytest.approx(0.5, abs=1e-6)
    assert result.mean == pytest.approx(by_another_optimizer(won, difference), abs=1e-6)
    assert 0 <= result.low < 0.5 < result.high <= 1
    needs_more = (difference > 15).astype(float)
    assert controlled(needs_more, difference).mean < 0.05 < win_rates.win_rate(needs_more).mean


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_without_anything_to_explain_it_is_the_plain_rate(value: float) -> None:
    won = np.full(20, value)
    assert controlled(won, np.arange(20.0)) == win_rates.win_rate(won) == Estimate(value, value, value)


@pytest.mark.parametrize("gap", [0.0, 10.0])
def test_without_anything_to_control_for_it_is_the_plain_rate(gap: float) -> None:
    won = np.array([1.0, 0.0, 0.5, 1.0, 1.0] * 4)
    assert controlled(won, np.full(20, gap)) == win_rates.win_rate(won)


def test_too_little_to_say_anything() -> None:
    assert math.isnan(win_rates.win_rate(np.array([NAN])).mean)
    assert math.isnan(controlled(np.array([NAN, NAN]), np.array([1.0, 2.0])).mean)
    assert controlled(np.array([1.0]), np.array([4.0])) == Estimate(1.0, 1.0, 1.0)
    alone = controlled(np.array([1.0, 0.0, 1.0]), np.array([4.0, -4.0, 0.0]), np.array([9, 9, 9]))
    assert alone.low == alone.mean == alone.high and 0.5 < alone.mean < 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 25))
def test_the_other_side_has_the_rest(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    won, difference = rng.choice([0.0, 0.5, 1.0], count), rng.integers(-20, 20, count).astype(float)
    first, other = controlled(won, difference), controlled(1 - won, -difference)
    assert first.mean + other.mean == pytest.approx(1, abs=1e-7)
    assert first.low - 1e-9 <= first.mean <= first.high + 1e-9
    assert (first.low + other.high, first.high + other.low) == pytest.approx((1, 1), abs=1e-5)


# ---- pass@k


def test_pass_at_k_is_the_share_of_subsets_with_a_success() -> None:
    correct = np.array([[i < c for i in range(7)] for c in range(8)])
    result = win_rates.pass_at_k(correct, range(1, 8))
    for k in range(1, 8):
        subsets = list(itertools.combinations(range(7), k))
        item = [sum(any(row[i] for i in subset) for subset in subsets) / len(subsets) for row in correct]
        assert result[k].mean == pytest.approx(np.mean(item), abs=1e-14)
        interval = estimate(np.array(item))
        assert (result[k].low, result[k].high) == pytest.approx((interval.low, interval.high), abs=0.02)
    assert result[1].mean == pytest.approx(correct.mean())


@given(st.integers(1, 40), st.data())
def test_pass_at_k_of_one_prompt_is_exact(samples: int, draw: st.DataObject) -> None:
    num_correct, k = draw.draw(st.integers(0, samples)), draw.draw(st.integers(1, samples))
    correct = np.array([[i < num_correct for i in range(samples)]])
    fail = math.comb(samples - num_correct, k) / math.comb(samples, k)
    assert win_rates.pass_at_k(correct, [k])[k].mean == pytest.approx(1 - fail, abs=1e-12)


def test_pass_at_k_where_binomials_overflow() -> None:
    correct = np.zeros((1, 20_000), bool)
    correct[0, :3] = True
    exact = 1 - (10_000 * 9_999 * 9_998) / (20_000 * 19_999 * 19_998)
    assert win_rates.pass_at_k(correct, [10_000])[10_000].mean == pytest.approx(exact, rel=1e-11)


def test_pass_at_k_is_unbiased() -> None:
    """Each of 5 samples is right with chance 0.3: pass@3 is 1 - 0.7^3 on average; the naive 1 - (1 - c/n)^3 is not."""
    correct = np.random.default_rng(5).random((2_000, 5)) < 0.3
    naive = 1 - (1 - correct.mean(axis=1)) ** 3
    result = win_rates.pass_at_k(correct, [3])[3]
    assert result.low < 1 - 0.7**3 < result.high
    assert abs(naive.mean() - (1 - 0.7**3)) > 0.03


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}: expected 1 to 4"):
        win_rates.pass_at_k(np.ones((2, 4), bool), [1, k])
