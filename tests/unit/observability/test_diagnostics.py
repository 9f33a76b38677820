"""What a batch says about over-optimization, against naive sums; intervals against their coverage."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from keel.observability import diagnostics, evaluations
from keel.observability.diagnostics import Estimate
from rollouts import generated, prompts, referenced, scored

SAMPLER = [[-0.5, -1.0, -0.2], [-2.0], [-0.1, -0.3], [-0.7, -0.7, -0.7, -0.7, -0.7]]
REFERENCE = [[-1.0, -1.5, -0.1], [-0.5], [-0.1, -0.3], [-0.9, -0.7, -1.2, -0.7, -25.0]]
GOLD = [1.0, None, 3.0, -1.0]


def batch(rewards: list[float | None]):  # type: ignore[no-untyped-def]
    rows = referenced(generated(prompts([0, 1]), logprobs=SAMPLER), REFERENCE)
    return scored(rows, rewards, {"gold": GOLD})


def test_one_value_a_completion() -> None:
    values = diagnostics.per_completion(batch([0.1, 0.2, 0.3, 0.4]))
    expected = {
        "reward": [0.1, 0.2, 0.3, 0.4],
        "reward_gold": [1.0, math.nan, 3.0, -1.0],
        "length_tokens": [3, 1, 2, 5],
        "sequence_entropy_nats": [1.7, 2.0, 0.4, 3.5],
        "entropy_nats": [1.7 / 3, 2.0, 0.2, 0.7],
        "finished_ratio": [1, 1, 1, 0],  # the fifth token was the last the budget had
        "repetition_ratio": [0, 0, 0, 0],  # by brute force in test_sample_diagnostics.py
        "reference_nll_nats": [-sum(row) / len(row) for row in REFERENCE],
        "kl_nats": [1.0 - 0.1, -1.5, 0.0, 0.2 + 0.5 + 24.3],
        "kl_k3_nats": [
            2 * (math.exp(-0.5) - 1 + 0.5) + math.exp(0.1) - 1 - 0.1,
            math.exp(1.5) - 1 - 1.5,
            0.0,
            sum(math.exp(-x) - 1 + x for x in (0.2, 0.5, 24.3)),
        ],
    }
    assert set(values) == set(expected)
    for name, item in expected.items():
        assert values[name] == pytest.approx(item, abs=1e-6, nan_ok=True), name


def test_k3_of_a_token_the_policy_hates_stays_finite() -> None:
    rows = referenced(generated(prompts([0]), logprobs=[[-90.0], [-0.1]]), [[-0.1], [-0.1]])
    values = diagnostics.per_completion(scored(rows))
    assert values["kl_nats"] == pytest.approx([-89.9, 0.0], abs=1e-5)
    assert values["kl_k3_nats"] == pytest.approx([math.expm1(20) - 89.9, 0.0], rel=1e-6)


def test_means_leave_out_what_a_monitor_failed_to_give() -> None:
    means = diagnostics.summarize(batch([0.1, 0.2, 0.3, 0.4]))
    assert means["reward"] == pytest.approx(0.25)
    assert means["reward_component"]["gold"] == pytest.approx(1.0)
    assert means["reward_std"] == pytest.approx(math.sqrt(0.0125))
    assert means["entropy_nats"] == pytest.approx((1.7 / 3 + 2.0 + 0.2 + 0.7) / 4)
    assert means["length_tokens"] == 2.75 and means["finished_ratio"] == 0.75


def test_a_monitor_that_gave_nothing_has_no_mean() -> None:
    rows = scored(referenced(generated(prompts([0]))), extra={"gold": [None, None]})
    means = diagnostics.summarize(rows)
    assert "reward_gold" not in means
    assert all(math.isfinite(value) for value in means.values())


def test_a_sample_without_reward_does_not_take_the_spread_away() -> None:
    means = diagnostics.summarize(batch([0.1, None, 0.3, 0.5]))
    assert means["reward"] == pytest.approx(0.3)
    assert means["reward_std"] == pytest.approx(math.sqrt(0.08 / 3))


def test_the_interval_is_the_t_interval_where_that_is_exact() -> None:
    """BCa and Student agree to a few percent on many normal values."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    result = diagnostics.estimate(values)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert result.mean == pytest.approx(values.mean(), abs=1e-12)
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert result.half_width == pytest.approx((result.high - result.low) / 2)


def test_the_interval_covers_the_mean_of_skewed_rewards() -> None:
    """64 held-out prompts, exponential rewards of mean 1: about 95 of 100 intervals hold it."""
    draws = np.random.default_rng(0).exponential(1.0, (100, 64))
    result = [diagnostics.estimate(values) for values in draws]
    assert 86 <= sum(item.low <= 1.0 <= item.high for item in result) <= 100
    above, below = (sum(item) for item in zip(*((e.high - e.mean, e.mean - e.low) for e in result), strict=True))
    assert above > 1.1 * below  # BCa follows the skew, a plain normal interval does not


def test_an_estimate_is_a_function_of_values_and_seed() -> None:
    values = np.random.default_rng(2).normal(size=30)
    assert diagnostics.estimate(values) == diagnostics.estimate(values)
    assert diagnostics.estimate(values) != diagnostics.estimate(values, seed=1)
    with_gaps = np.concatenate([values, [math.nan]])
    assert diagnostics.estimate(with_gaps) == diagnostics.estimate(values)


def test_values_without_spread_have_no_interval() -> None:
    assert diagnostics.estimate(np.array([2.0])) == Estimate(2.0, 2.0, 2.0)
    assert diagnostics.estimate(np.array([2.0, 2.0, 2.0])) == Estimate(2.0, 2.0, 2.0)
    assert math.isnan(diagnostics.estimate(np.array([math.nan])).mean)


# ---- held-out evaluations


def held_out(rewards: list[float | None], kl: float, tickets: tuple[int, ...] = (0, 1, 2, 3)) -> pa.RecordBatch:
    """One completion a prompt, log-probs SAMPLER, a reference `kl` nats below on every completion."""
    reference = [[row[0] - kl, *row[1:]] for row in SAMPLER]
    rows = referenced(generated(prompts(tickets, samples=1), logprobs=SAMPLER), reference)
    return scored(rows, rewards, {"gold": GOLD})


def test_a_frontier_row_is_what_the_stored_rows_say(tmp_path: Path) -> None:
    rows = held_out([0.5, 0.25, None, 1.5], kl=0.75)
    row = evaluations.store(tmp_path, 3, rows)
    assert evaluations.load(tmp_path, 3).equals(rows)
    expected = {
        "step": 3,
        "kl_nats": 0.75,
        "proxy": 0.75,
        "gold": 1.0,
        "reward_gold": 1.0,
        "entropy_nats": (1.7 / 3 + 2.0 + 0.2 + 0.7) / 4,
        "length_tokens": 2.75,
        "n": 3,
        "stderr": stats.sem([0.5, 0.25, 1.5]),
        "gold_stderr": stats.sem([value for value in GOLD if value is not None]),
    }
    assert row == pytest.approx(expected, abs=1e-6)
    assert evaluations.frontier(tmp_path) == [row]


def test_the_frontier_grows_by_step_and_is_cut_back_by_a_resumed_run(tmp_path: Path) -> None:
    assert evaluations.frontier(tmp_path) == []
    for step, kl in ((0, 0.0), (2, 1.0), (4, 2.0), (2, 1.5)):  # killed after 4, resumed before 2
        evaluations.store(tmp_path, step, held_out([1.0] * 4, kl))
    rows = evaluations.frontier(tmp_path)
    assert [(row["step"], row["kl_nats"]) for row in rows] == [(0.0, 0.0), (2.0, pytest.approx(1.5))]
    assert [row["stderr"] for row in rows] == [0.0, 0.0]


def test_a_number_nobody_measured_is_no_number(tmp_path: Path) -> None:
    """No monitor called gold, no reference, and every training reward failed."""
    rows = generated(prompts([0, 1, 2, 3], samples=1), logprobs=SAMPLER)
    row = evaluations.store(tmp_path, 1, scored(rows, [None] * 4))
    assert all(row[name] is None or math.isnan(row[name]) for name in ("gold", "kl_nats", "proxy", "stderr"))
    assert (row["n"], row["length_tokens"]) == (0, 2.75)


def test_estimates_cover_rewards_monitors_and_the_signs_of_over_optimization() -> None:
    rows = held_out([0.5, 0.25, None, 1.5], kl=0.75)
    result = evaluations.estimates(rows)
    assert list(result) == ["reward", "reward_gold", "kl_nats", "entropy_nats", "length_tokens", "finished_ratio"]
    values = diagnostics.per_completion(rows)
    for name, item in result.items():
        known = values[name][np.isfinite(values[name])]
        assert item.mean == pytest.approx(known.mean()) and item.low <= item.mean <= item.high, name
    reward = result["reward"]
    assert reward.as_json() == {
        "mean": reward.mean,
        "low": reward.low,
        "high": reward.high,
    }


def test_changes_are_paired_by_prompt() -> None:
    """Rewards spread over 0 to 30 rise by 2 on every prompt: the change is known exactly, the means are not."""
    first, last = held_out([0.0, 10.0, 20.0, 30.0], kl=0.5), held_out([2.0, 12.0, 22.0, 32.0], kl=1.0)
    change = evaluations.changes(first, last)
    assert change["reward"] == Estimate(2.0, 2.0, 2.0)
    assert change["kl_nats"].mean == pytest.approx(0.5, abs=1e-6)
    assert change["kl_nats"].half_width < 1e-6
    assert evaluations.estimates(first)["reward"].half_width > 5
    lost = held_out([None, 12.0, 22.0, 35.0], kl=1.0)  # the prompt without a reward is in neither mean
    assert evaluations.changes(first, lost)["reward"].mean == pytest.approx(3.0)


def test_changes_of_other_prompts_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"^$"):
        evaluations.changes(held_out([1.0] * 4, 0.5), held_out([1.0] * 4, 0.5, tickets=(0, 1, 3, 2)))
