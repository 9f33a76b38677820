"""Entropy of final answers in the reward: by hand, and its expected gradient over every possible group of samples.

A policy over four completions that hold three answers, two of them the same. All 4^k groups of k samples are weighed by
the objective itself and averaged by their probability; finite differences of the chance that two answers agree are the
other side.
"""

import itertools
import math
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from keel.algorithms.objective import Objective
from keel.algorithms.regularizers import answer_agreement
from keel.algorithms.types import Measured
from keel.config import loader
from keel.errors import ConfigError
from tabular import objective, rollout, tree

COMPLETIONS = ["so it is 4", " Thus: 4", "it is 5", "it is 6 "]
LOGITS = np.array([0.4, -0.3, 0.9, 0.0])


def last_word(text: str) -> str:
    return text.split()[-1]


def number(text: str) -> Any:
    return float(last_word(text))


HERE = f"{__name__}:last_word"


def policy_of(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def chance_of_agreement(logits: np.ndarray) -> float:
    first, second, *others = policy_of(logits)
    return (first + second) ** 2 + sum(p**2 for p in others)


def made(advantage: str, coefficient: float = 0.7, samples: int = 4, **settings: Any) -> Objective:
    return objective(
        objective={"advantage": advantage, "correction": "none"},
        sampling={"samples_per_prompt": samples},
        regularizer={
            "kl": {"coefficient": 0.0},
            "answer_entropy": {"coefficient": coefficient, "extract": HERE, **settings},
        },
    )


def group(chosen: tuple[int, ...], tickets: list[int] | None = None) -> pa.RecordBatch:
    nats = [[math.log(policy_of(LOGITS)[place])] for place in chosen]
    texts = pa.array([COMPLETIONS[place] for place in chosen])
    return rollout(nats, [0.0] * len(chosen), tickets, completion=texts)


def expected_gradient(subject: Objective, samples: int) -> np.ndarray:
    policy, total = policy_of(LOGITS), np.zeros(4)
    for chosen in itertools.product(range(4), repeat=samples):
        advantages = subject.weigh(group(chosen), Measured()).advantages
        scores = sum(a * (np.eye(4)[place] - policy) for a, place in zip(advantages, chosen, strict=True))
        total += math.prod(policy[list(chosen)]) * scores / samples
    return total


def finite_differences() -> np.ndarray:
    steps = 1e-6 * np.eye(4)
    return np.array([(chance_of_agreement(LOGITS + s) - chance_of_agreement(LOGITS - s)) / 2e-6 for s in steps])


@pytest.mark.parametrize("samples", [3, 4, 5])
@pytest.mark.parametrize(
    ("advantage", "factor"),
    [
        ("none", lambda k: 1.0),
        ("rloo", lambda k: (k - 2) / (k - 1)),
        ("dr_grpo", lambda k: (k - 2) / k),
    ],
)
def test_the_expected_gradient_is_half_that_of_the_chance_that_two_answers_agree(
    advantage: str, factor: Any, samples: int
) -> None:
    expected = -0.7 * factor(samples) * finite_differences() / 2
    result = expected_gradient(made(advantage, samples=samples), samples)
    assert result == pytest.approx(expected, abs=1e-9)
    assert np.abs(expected).max() > 5e-3
    assert expected_gradient(made(advantage, -0.7, samples), samples) == pytest.approx(-expected, abs=1e-9)


def test_two_samples_have_no_gradient_behind_a_group_baseline_which_is_refused() -> None:
    subject = made("rloo", samples=3)
    assert expected_gradient(subject, 2) == pytest.approx(np.zeros(4), abs=1e-12)
    with pytest.raises(
        ConfigError, match=r"^regularizer\.answer_entropy\.coefficient=0\.7: two samples agree or differ"
    ):
        made("rloo", samples=2)


def test_a_row_is_paid_by_the_others_of_its_own_prompt() -> None:
    """Prompt 7: 4 4 5 6; prompt 2: 4 5 5; prompt 3: one sample alone. Shares of the others, by hand."""
    answers = ["4", "4", "4", "5", "5", "6", "5", "4"]
    tickets = np.array([7, 2, 7, 7, 2, 7, 2, 3])
    expected = [1 / 3, 0, 1 / 3, 0, 1 / 2, 0, 1 / 2, 0]
    assert answer_agreement(answers, tickets).tolist() == pytest.approx(expected, abs=1e-15)


def test_the_text_is_the_answer_unless_a_function_says_which() -> None:
    batch = group((0, 1, 2, 3))
    terms = made("rloo").row_terms(batch)["answer_entropy"]
    assert terms.tolist() == pytest.approx([-0.7 / 3, -0.7 / 3, 0, 0])
    assert made("rloo", extract=None).row_terms(batch)["answer_entropy"].tolist() == [0, 0, 0, 0]
    same = rollout([[-1.0]] * 3, [0.0] * 3, completion=pa.array(["it", " it", "it\n"]))
    assert made("rloo", extract=None).row_terms(same)["answer_entropy"].tolist() == pytest.approx([-0.7] * 3)
    credit = made("rloo").credited(batch, Measured())
    assert credit.metrics["objective_term"] == {"answer_entropy": pytest.approx(-0.7 * 2 / 3 / 4)}


def test_paying_for_agreement_is_empo_but_for_a_constant_and_a_factor() -> None:
    """EMPO pays n_c / k: here 2/4, 2/4, 1/4, 1/4."""
    agreement = -made("rloo", 1.0).row_terms(group((0, 1, 2, 3)))["answer_entropy"]
    assert ((3 * agreement + 1) / 4).tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25])


def test_without_a_coefficient_nothing_is_read() -> None:
    assert "answer_entropy" not in made("rloo", 0.0).row_terms(rollout([[-1.0]] * 4, [0.0] * 4))


def test_an_answer_that_is_no_string_is_named() -> None:
    subject = made("rloo", extract=f"{__name__}:number")
    with pytest.raises(ValueError, match=r"^regularizer\.answer_entropy\.extract: 4\.0 returned; expected a string"):
        subject.row_terms(group((0, 1, 2, 3)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"objective": {"kind": "preference"}},
        "regularizer.answer_entropy.coefficient=-0.5: objective.kind=preference has no gradient",
    ),
    (
        {"objective": {"kind": "custom", "source": "m:c"}, "sampling": {"stored_ratio": 0.5, "max_tokens": 4}},
        "regularizer.answer_entropy.coefficient=-0.5: stored completions are no answers of the policy",
    ),
]


@pytest.mark.parametrize(("blocks", "expected"), REFUSED)
def test_where_it_is_no_regularizer_it_is_refused(blocks: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(expected)):
        loader.parse(tree(regularizer={"answer_entropy": {"coefficient": -0.5}}, **blocks))


def test_its_name_is_taken() -> None:
    terms = {"regularizer": {"terms": [{"name": "answer_entropy", "source": "m:f"}]}}
    with pytest.raises(ConfigError, match=r"name 'answer_entropy' is that of regularizer\.answer_entropy"):
        loader.parse(tree(**terms))
