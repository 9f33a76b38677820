"""Intervals at equal KL where reward and KL go together: independent draws cannot tell which way a correction goes."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from keel.analysis import compare
from keel.analysis.compare import Matching
from keel.analysis.compared_runs import Evaluation, Run

COUNT = 200


def arm(name: str, kl: Sequence[np.ndarray], reward: Sequence[np.ndarray], steps: Sequence[int] | None = None) -> Run:
    """A run whose evaluations have these values of each prompt."""
    pairs = zip(steps or range(len(kl)), kl, reward, strict=True)
    evaluations = tuple(Evaluation(step, math.nan, {"kl_nats": k, "reward": r}) for step, k, r in pairs)
    return Run(name, Path(name), {}, tuple((number, "") for number in range(len(kl[0]))), evaluations)


def at_equal_kl(*arms: Run) -> Matching:
    return next(item for item in compare.compare(arms).matchings if item.name == "kl")


def draws(seed: int, nats: Sequence[float], spread: float = 0.4) -> list[np.ndarray]:
    """KLs of every prompt, the same prompts lying higher in every evaluation."""
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 1, COUNT)
    return [nat * (1 + spread * (0.8 * first + 0.6 * rng.normal(0, 1, COUNT))) for nat in nats]


@pytest.mark.parametrize("slope", [0.5, -0.5, 2.0])
@pytest.mark.parametrize("interpolated_first", [True, False])
def test_a_reward_that_is_a_multiple_of_the_kl_has_no_error_at_equal_kl(slope: float, interpolated_first: bool) -> None:
    """reward = slope * KL, prompt by prompt, in both arms: at equal KL they are equal on every prompt, exactly.

    With the correction left out, or added where it is subtracted, the interval is as wide as that of the KL.
    """
    near, far = draws(1, [0.0, 3.0, 6.0]), draws(2, [0.0, 4.0, 9.0])
    short, long = (arm(name, kl, [slope * item for item in kl]) for name, kl in (("short", near), ("long", far)))
    order = [long, short] if interpolated_first else [short, long]
    result = at_equal_kl(*order)
    difference = result.arms_at_level[1].differences["reward"]
    assert result.level == pytest.approx(near[2].mean(), abs=1e-12)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-9)
    spread = abs(slope) * np.std(near[2], ddof=1) / math.sqrt(COUNT)
    for arm_at_level in result.arms_at_level:  # the value itself is as uncertain as the KL that is the level
        assert arm_at_level.values["reward"].half_width == pytest.approx(1.96 * spread, rel=0.15)
        assert arm_at_level.values["kl_nats"].half_width == pytest.approx(1.96 * spread / abs(slope), rel=0.15)


def bootstrap(short: Run, long: Run, name: str = "reward") -> tuple[float, float]:
    """Difference long - short at equal KL, and its deviation over prompts drawn again with the whole procedure."""
    kl = [item.values["kl_nats"] for item in long.evaluations]
    reward = [item.values[name] for item in long.evaluations]
    end = short.evaluations[-1].values

    def difference(drawn: np.ndarray) -> float:
        level = end["kl_nats"][drawn].mean()
        means = [item[drawn].mean() for item in kl]
        return float(np.interp(level, means, [item[drawn].mean() for item in reward]) - end[name][drawn].mean())

    rng = np.random.default_rng(0)
    again = [difference(rng.integers(0, COUNT, COUNT)) for _ in range(1500)]
    return difference(np.arange(COUNT)), float(np.std(again))


@pytest.mark.parametrize("correlation", [0.9, -0.9, 0.5])
@pytest.mark.parametrize("rising", [1.0, -1.0])
def test_the_interval_is_that_of_the_whole_procedure_whatever_goes_together(correlation: float, rising: float) -> None:
    """Prompts whose KL lies high have a reward that lies high, or low; the curve rises, or falls."""
    rng = np.random.default_rng(int(10 * correlation) + 20)

    def run(name: str, seed: int, nats: Sequence[float]) -> Run:
        kl = draws(seed, nats)
        rewards = []
        for mean, first in zip(nats, kl, strict=True):
            noise = math.sqrt(1 - correlation**2) * rng.normal(0, 1, COUNT)
            scaled = (first - mean) / (0.4 * mean) if mean else np.zeros(COUNT)
            rewards.append(rising * mean / 3 + 0.8 * (correlation * scaled + noise))
        return arm(name, kl, rewards)

    short, long = run("short", 5, [0.0, 2.0, 6.0]), run("long", 6, [0.0, 4.0, 9.0])
    mean, deviation = bootstrap(short, long)
    result = at_equal_kl(short, long).arms_at_level[1].differences["reward"]
    assert result.mean == pytest.approx(mean, abs=1e-9)
    assert result.half_width == pytest.approx(1.96 * deviation, rel=0.12)
    back = at_equal_kl(long, short).arms_at_level[1].differences["reward"]
    assert back.mean == pytest.approx(-mean, abs=1e-9)
    assert back.half_width == pytest.approx(result.half_width, rel=0.05)


def test_an_arm_at_an_evaluation_keeps_its_numbers_and_one_between_is_linear() -> None:
    """Weights are shares of the way, of values and of KL; w is that of the later evaluation."""
    zero = np.zeros(4)
    kl = [zero, np.array([1.0, 3.0, 2.0, 2.0]), np.array([8.0, 12.0, 10.0, 10.0])]
    reward = [zero, np.array([1.0, 2.0, 3.0, 4.0]), np.array([9.0, 2.0, 7.0, 4.0])]
    long = arm("long", kl, reward, steps=[0, 5, 20])
    short = arm("short", [zero, np.full(4, 4.0)], [zero, np.full(4, 2.5)], steps=[0, 7])
    matching = at_equal_kl(short, long)
    first, other = matching.arms_at_level
    assert (first.places[0].before, first.places[0].after, first.places[0].weight) == (7, 7, 1.0)
    assert first.values["reward"].mean == 2.5 and first.values["reward"].half_width == 0
    assert (other.places[0].before, other.places[0].after, other.places[0].weight) == (
        5,
        20,
        0.25,
    )  # from 2 to 10 nats, at 4
    assert other.values["reward"].mean == pytest.approx(0.75 * 2.5 + 0.25 * 5.5)
    assert other.differences["reward"].mean == pytest.approx(0.75)
    # per prompt: v = .75 r5 + .25 r20, corrected by the slope (5.5 - 2.5) / (10 - 2) times how far its KL lies from 4
    between = 0.75 * reward[1] + 0.25 * reward[2] - 3 / 8 * (0.75 * kl[1] + 0.25 * kl[2] - 4.0)
    assert np.std(between) > 0.1
    expected = compare.estimate(between - 2.5)
    assert other.differences["reward"] == expected


def test_a_metric_that_some_prompts_lack_is_corrected_on_the_others() -> None:
    kl = draws(3, [0.0, 2.0, 8.0])
    gold = [item.copy() for item in kl]
    for values in gold:
        values[::7] = np.nan
    end = draws(4, [0.0, 5.0])
    rows = tuple((number, "") for number in range(COUNT))

    def run(name: str, nats: list[np.ndarray], values: list[np.ndarray]) -> Run:
        evaluations = [
            Evaluation(step, math.nan, {"kl_nats": a, "reward_gold": b})
            for step, (a, b) in enumerate(zip(nats, values, strict=True))
        ]
        return Run(name, Path(name), {}, rows, tuple(evaluations))

    arm_at_level = at_equal_kl(run("end", end, end), run("other", kl, gold)).arms_at_level[1]
    assert (
        arm_at_level.paired["reward_gold"] == COUNT - len(range(0, COUNT, 7))
        and arm_at_level.paired["kl_nats"] == COUNT
    )
    known = np.isfinite(gold[2])
    rise = (gold[2][known].mean() - gold[1][known].mean()) / (kl[2].mean() - kl[1].mean())
    weight = (end[1].mean() - kl[1].mean()) / (kl[2].mean() - kl[1].mean())
    between = [(1 - weight) * a + weight * b for a, b in ((gold[1], gold[2]), (kl[1], kl[2]))]
    expected = between[0] - rise * (between[1] - end[1]) - end[1]
    assert arm_at_level.differences["reward_gold"].mean == pytest.approx(expected[known].mean(), abs=1e-12)


@pytest.mark.parametrize("matching", ["steps", "tokens"])
def test_at_equal_steps_and_tokens_nothing_is_corrected(matching: str) -> None:
    kl, other = draws(7, [0.0, 3.0]), draws(8, [0.0, 5.0])
    arms = []
    for name, nats in (("one", kl), ("two", other)):
        evaluations = [Evaluation(n, 100.0 * n, {"kl_nats": k, "reward": 2 * k}) for n, k in enumerate(nats)]
        arms.append(Run(name, Path(name), {}, tuple((n, "") for n in range(COUNT)), tuple(evaluations)))
    result = next(item for item in compare.compare(arms).matchings if item.name == matching)
    assert result.arms_at_level[1].differences["reward"] == compare.estimate(2 * other[1] - 2 * kl[1])
    assert result.arms_at_level[1].differences["kl_nats"] == compare.estimate(other[1] - kl[1])


def test_a_table_has_a_line_below_every_metric() -> None:
    arms = [
        arm(name, draws(seed, [0.0, 3.0]), draws(seed, [1.0, 2.0])) for name, seed in (("a", 1), ("b", 2), ("c", 3))
    ]
    comparison = compare.compare(arms)
    table = compare._table(comparison, next(one for one in comparison.matchings if one.name == "kl"))
    assert [row.end_section for row in table.rows] == [False, False, True] * len(comparison.metrics)
