"""Accuracy, calibration and length of a reward model's held-out pairs against brute force and hand examples."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from keel.analysis import reward_report


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_tie_is_half_right() -> None:
    margins = np.array([2.0, 0.0, -1.0, 1e-9, 0.0])
    assert reward_report.accuracies(margins).tolist() == [1.0, 0.5, 0.0, 1.0, 0.5]


@pytest.mark.parametrize("bins", [1, 3, 10])
def test_bins_are_those_of_brute_force(bins: int) -> None:
    rng = np.random.default_rng(0)
    margins = np.concatenate([rng.normal(0, 2, 500), [0.0, 0.0, 50.0, -50.0, 800.0, -800.0]])
    result = reward_report.calibration(margins, bins)
    width = 0.5 / bins
    place = 0
    for number in range(bins):
        low, high = 0.5 + number * width, 0.5 + (number + 1) * width
        last = number == bins - 1
        subject = [
            m for m in margins if low <= 1 / (1 + math.exp(-min(abs(m), 700))) and (last or sigma(abs(m)) < high)
        ]
        if not subject:
            continue
        one, place = result[place], place + 1
        assert (one.low, one.high, one.pairs) == (pytest.approx(low), pytest.approx(high), len(subject))
        assert one.predicted == pytest.approx(np.mean([sigma(min(abs(m), 700)) for m in subject]))
        assert one.observed == pytest.approx(np.mean([1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in subject]))
    assert place == len(result) and sum(one.pairs for one in result) == len(margins)


def test_the_expected_calibration_error_by_hand() -> None:
    """Four choices at 0.6 of which three are right, one at 0.9 that is wrong: (4 * 0.15 + 1 * 0.9) / 5 = 0.3."""
    margins = np.array([logit(0.6)] * 3 + [-logit(0.6)] + [-logit(0.9)])
    result = reward_report.calibration(margins, 5)
    assert [(one.pairs, one.observed) for one in result] == [(4, 0.75), (1, 0.0)]
    assert reward_report.calibration_error(result) == pytest.approx(0.3)


def test_a_calibrated_model_has_no_error() -> None:
    """Of pairs at sigma(m) = 0.75 three of four are right."""
    margins = np.array([logit(0.75)] * 3 + [-logit(0.75)])
    assert reward_report.calibration_error(reward_report.calibration(margins)) == pytest.approx(0.0)


def lengths(*pairs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    both = np.array(pairs, float)
    return both[:, 0], both[:, 1]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_model_that_is_always_sure_and_right_or_wrong(sign: float) -> None:
    scores = sign * np.full((1, 6), 30.0)
    result = reward_report.report(scores, -scores, lengths(*[(3, 3)] * 6))
    assert result["accuracy"] == dict.fromkeys(("mean", "low", "high"), 1.0 if sign > 0 else 0.0)
    assert result["calibration_error"] == pytest.approx(0.0 if sign > 0 else 1.0)
    assert result["loss"] == pytest.approx(0.0 if sign > 0 else 60.0)
    assert len(result["calibration"]) == 1 and result["calibration"][0]["high"] == 1.0
    assert result["length_correlation"] is None or abs(result["length_correlation"]) <= 1
    assert (result["prefers_longer"], result["label_prefers_longer"]) == (None, None)


def test_a_report_is_that_of_its_pairs() -> None:
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(0.4, 1, (3, 40)), rng.normal(0, 1, (3, 40))
    sizes = rng.integers(1, 50, (2, 40)).astype(float)
    sizes[0, :3] = sizes[1, :3]
    result = reward_report.report(chosen, rejected, (sizes[0], sizes[1]))
    margins = [float(np.mean(chosen[:, p]) - np.mean(rejected[:, p])) for p in range(40)]
    assert result["pairs"] == 40
    assert result["accuracy"]["mean"] == pytest.approx(sum(m > 0 for m in margins) / 40)
    assert result["accuracy"]["low"] < result["accuracy"]["mean"] < result["accuracy"]["high"]
    assert result["member_accuracies"] == pytest.approx([(chosen[m] > rejected[m]).mean() for m in range(3)])
    assert result["loss"] == pytest.approx(np.mean([-math.log(sigma(m)) for m in margins]))
    assert (result["margin_mean"], result["margin_std"]) == (
        pytest.approx(np.mean(margins)),
        pytest.approx(np.std(margins)),
    )
    everything = [column for side in (chosen, rejected) for column in side.T]
    assert result["member_std"] == pytest.approx(np.mean([np.std(column) for column in everything]))
    scores, characters = [np.mean(column) for column in everything], [*sizes[0], *sizes[1]]
    ranks = [stats.rankdata(values) for values in (scores, characters)]
    assert result["length_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    differ = [(m, a - b) for m, a, b in zip(margins, *sizes, strict=True) if a != b]
    assert result["prefers_longer"] == pytest.approx(np.mean([(m > 0) == (d > 0) for m, d in differ]))
    assert result["label_prefers_longer"] == pytest.approx(np.mean([d > 0 for _, d in differ]))
    assert json.loads(json.dumps(result)) == result


def test_of_one_model_the_members_do_not_differ() -> None:
    result = reward_report.report(np.array([[1.0, 2.0]]), np.array([[0.0, 3.0]]), lengths((1, 2), (3, 1)))
    assert result["member_std"] == 0.0 and result["member_accuracies"] == [0.5]
    assert (result["prefers_longer"], result["label_prefers_longer"]) == (0.0, 0.5)
