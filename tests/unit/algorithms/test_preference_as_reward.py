"""PAR (2502.18770) against its equation, and its gradient against finite differences of what it maximizes."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from keel.algorithms.reward_shaping import reference_scores
from keel.algorithms.types import Measured
from keel.errors import ConfigError
from tabular import objective, rollout

LOGITS = np.array([0.4, -0.3, 0.1])
REWARDS = np.array([5.0, -1.5, 0.7])
SCORES = [0.5, -2.0]
"""Of two reference answers."""


def log_policy(logits: np.ndarray) -> np.ndarray:
    return logits - math.log(sum(math.exp(z) for z in logits))


def par(reward: float) -> float:
    """The equation with plain exponentials."""
    return sum(1 / (1 + math.exp(-(reward - score))) for score in SCORES) / len(SCORES)


def one_token_answers(scores: object, rewards: np.ndarray = REWARDS) -> pa.RecordBatch:
    columns = [json.dumps({"topic": "x", "scores": scores})] * len(rewards)
    extra = {
        "prompt_columns": pa.array(columns),
        "finish_reason": pa.array(["stop"] * len(rewards)),
        "completion_tokens": pa.array([[1]] * len(rewards)),
    }
    return rollout([[x] for x in log_policy(LOGITS)[: len(rewards)]], rewards.tolist(), **extra)


def test_the_reward_is_the_mean_sigmoid_of_what_it_has_over_the_references() -> None:
    subject = objective(shaping={"reference_scores": "scores"})
    assert subject.rewards(one_token_answers(SCORES)) == pytest.approx([par(r) for r in REWARDS], abs=1e-12)
    alone = subject.rewards(one_token_answers(0.7))  # one number needs no list
    assert alone == pytest.approx([1 / (1 + math.exp(-(r - 0.7))) for r in REWARDS], abs=1e-12)
    assert alone[2] == 0.5


def test_each_prompt_has_its_own_references() -> None:
    batch = one_token_answers(0.0, np.array([1.0, 1.0]))
    columns = pa.array([json.dumps({"scores": 0.0}), json.dumps({"scores": [3.0]})])
    batch = batch.set_column(batch.schema.get_field_index("prompt_columns"), "prompt_columns", columns)
    values = objective(shaping={"reference_scores": "scores"}).rewards(batch)
    assert values == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))], abs=1e-12)


def test_the_penalty_of_a_missing_end_is_subtracted_from_the_bounded_reward() -> None:
    batch = one_token_answers(SCORES)
    ends = pa.array(["stop", "length", "stop"])
    batch = batch.set_column(batch.schema.get_field_index("finish_reason"), "finish_reason", ends)
    values = objective(shaping={"reference_scores": "scores", "missing_end_penalty": 2.0}).rewards(batch)
    assert values == pytest.approx([par(5.0), par(-1.5) - 2.0, par(0.7)], abs=1e-12)


def test_the_expected_gradient_is_that_of_the_probability_to_be_preferred() -> None:
    """All answers in the batch, each weighed by its probability: no sampling is left."""
    subject = objective(objective={"advantage": "none"}, shaping={"reference_scores": "scores"})
    advantages = subject.weigh(one_token_answers(SCORES), Measured()).advantages
    policy = np.exp(log_policy(LOGITS))
    scores_of_logits = np.eye(3) - policy  # [answer, logit]: grad of log pi(answer)
    expected = (policy * advantages) @ scores_of_logits

    def value(logits: np.ndarray) -> float:
        return float(np.exp(log_policy(logits)) @ [par(r) for r in REWARDS])

    step = 1e-5
    differences = [(value(LOGITS + step * e) - value(LOGITS - step * e)) / (2 * step) for e in np.eye(3)]
    assert expected == pytest.approx(differences, abs=1e-9)
    raw = objective(objective={"advantage": "none"}).weigh(one_token_answers(SCORES), Measured()).advantages
    assert (policy * raw) @ scores_of_logits != pytest.approx(differences, abs=0.1)


@pytest.mark.parametrize("value", [None, [], "0.5", [0.1, None], True, {"keel.float": "nan"}])
def test_a_row_without_scores_is_refused(value: object) -> None:
    rows = [json.dumps({"scores": 1}), json.dumps({"scores": value})]
    with pytest.raises(
        ConfigError, match=r"^shaping.reference_scores=scores: a row .* no finite number there; expected"
    ):
        reference_scores(rows, "scores")
