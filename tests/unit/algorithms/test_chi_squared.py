"""The chi-squared penalty of 2403.03185: its expected gradient against finite differences of the divergence itself.

The policy is a tree of two tokens with probabilities in sixteenths, so sixteen rows are its distribution exactly and a
mean over them is an expectation, without sampling.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from keel.algorithms.objective import Objective
from keel.algorithms.regularizers import MIN_CHI_SQUARED, chi_squared_penalty
from keel.algorithms.types import Measured
from tabular import objective, rollout

POLICY = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
"""[state, token]: at the root, behind token 1, behind token 2; token 0 at the root ends the completion."""
REFERENCE = np.array([[0.2, 0.7, 0.1], [0.3, 0.3, 0.4], [0.6, 0.1, 0.3]])
ANSWERS = [[0], *([first, second] for first in (1, 2) for second in range(3))]
REWARDS = dict(zip(map(tuple, ANSWERS), [0.3, -1.0, 0.8, 1.5, -0.2, 0.1, 2.0], strict=True))
COEFFICIENT = 0.4


def token_logprobs(table: np.ndarray, answer: list[int]) -> list[float]:
    return [math.log(table[state, token]) for state, token in zip([0, *answer], answer, strict=False)]


def probability(table: np.ndarray, answer: list[int]) -> float:
    return math.exp(sum(token_logprobs(table, answer)))


def policy_of(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def divergence(policy: np.ndarray, bound: float) -> float:
    """Sum over all completions of ref h(pi/ref), minus 1."""
    total = -1.0
    for answer in ANSWERS:
        pi, ref = probability(policy, answer), probability(REFERENCE, answer)
        total += ref * (pi / ref) ** 2 if pi <= bound * ref else 2 * bound * pi - bound**2 * ref
    return total


def value(policy: np.ndarray, bound: float, root: bool) -> float:
    reward = sum(probability(policy, answer) * REWARDS[tuple(answer)] for answer in ANSWERS)
    size = divergence(policy, bound)
    return reward - COEFFICIENT * (math.sqrt(size) if root else size)


def rows() -> list[list[int]]:
    return [answer for answer in ANSWERS for _ in range(round(16 * probability(POLICY, answer)))]


def batch() -> pa.RecordBatch:
    return rollout(
        [token_logprobs(POLICY, answer) for answer in rows()],
        [REWARDS[tuple(answer)] for answer in rows()],
        reference=[token_logprobs(REFERENCE, answer) for answer in rows()],
    )


def subject(**settings: Any) -> Objective:
    term = {"chi_squared": {"coefficient": COEFFICIENT, **settings}}
    return objective(objective={"advantage": "none"}, regularizer=term)


def expected_gradient(made: Objective) -> np.ndarray:
    """Mean over the rows of advantage times the gradient of the completion's log-prob by the logits."""
    advantages, gradient, place = made.weigh(batch(), Measured()).advantages, np.zeros((3, 3)), 0
    for answer in rows():
        for state, token in zip([0, *answer], answer, strict=False):
            gradient[state] += advantages[place] * (np.eye(3)[token] - POLICY[state]) / len(rows())
            place += 1
    return gradient


def finite_differences(bound: float, root: bool) -> np.ndarray:
    gradient, step, logits = np.zeros((3, 3)), 1e-5, np.log(POLICY)
    for place in np.ndindex(3, 3):
        move = np.zeros((3, 3))
        move[place] = step
        above, below = (value(policy_of(logits + sign * move), bound, root) for sign in (1, -1))
        gradient[place] = (above - below) / (2 * step)
    return gradient


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("bound", [1.0, 2.0, 1000.0])
def test_the_expected_gradient_is_that_of_the_divergence_or_its_root(bound: float, root: bool) -> None:
    """Clipped ratios included: 3 of the 7 answers lie beyond 2, none beyond 1000."""
    made = expected_gradient(subject(max_ratio=bound, root=root))
    assert divergence(POLICY, bound) > MIN_CHI_SQUARED
    assert made == pytest.approx(finite_differences(bound, root), abs=1e-8)


def test_without_a_clip_the_divergence_is_chi_squared() -> None:
    chi_squared = sum(probability(POLICY, a) ** 2 / probability(REFERENCE, a) for a in ANSWERS) - 1
    assert divergence(POLICY, 1000.0) == pytest.approx(chi_squared, abs=1e-12)
    log_ratios = np.array([sum(token_logprobs(POLICY, a)) - sum(token_logprobs(REFERENCE, a)) for a in rows()])
    penalty = chi_squared_penalty(log_ratios, 1000.0, root=True)
    assert penalty == pytest.approx(np.exp(log_ratios) / math.sqrt(chi_squared), abs=1e-12)
    assert (penalty * math.sqrt(chi_squared)).mean() - 1 == pytest.approx(chi_squared, abs=1e-12)


def test_at_the_reference_the_root_is_bounded_and_far_away_nothing_overflows() -> None:
    assert chi_squared_penalty(np.zeros(4), 10.0, root=True) == pytest.approx([1 / math.sqrt(MIN_CHI_SQUARED)] * 4)
    far = chi_squared_penalty(np.array([-2000.0, 2000.0]), 10.0, root=True)
    assert far == pytest.approx([0.0, 10 / math.sqrt((0 + 20) / 2 - 1)])
    assert chi_squared_penalty(np.array([-2000.0, 2000.0]), 10.0, root=False) == pytest.approx([0.0, 20.0])


def test_its_mean_is_a_metric_and_every_linear_objective_pays_it() -> None:
    made = subject(root=False, max_ratio=2.0)
    ratios = [probability(POLICY, a) / probability(REFERENCE, a) for a in rows()]
    mean = -2 * COEFFICIENT * np.mean([min(ratio, 2.0) for ratio in ratios])
    assert made.credited(batch(), Measured()).metrics["objective_term"] == {
        "chi_squared": pytest.approx(mean, abs=1e-12)
    }
    terms = {"chi_squared": {"coefficient": COEFFICIENT, "root": False, "max_ratio": 2.0}}
    convex = objective(objective={"kind": "logits_convexity"}, regularizer=terms)
    assert convex.needs == {"reference_logprobs"}
    paid = convex.regularized_rewards(batch(), Measured()) - batch().column("reward").to_numpy()
    assert paid == pytest.approx([-2 * COEFFICIENT * min(ratio, 2.0) for ratio in ratios], abs=1e-12)
