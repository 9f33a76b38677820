"""The guard's factor on the KL: an objective with it equals one whose coefficient is that much larger."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keel import schema
from keel.algorithms.objective import Objective
from keel.algorithms.types import Measured, Outputs, Rows
from keel.config.workers import LearnerSettings
from keel.learner.engine import Engine
from rollouts import rollouts
from tabular import objective

PLACES: list[dict[str, Any]] = [
    {"placement": "reward"},
    {"placement": "reward", "order": "after_baseline"},
    {"placement": "loss", "estimator": "k2"},
]


def numbers_of(made: Objective) -> tuple[dict[str, float], Tensor]:
    """Loss, coefficients and metrics of an objective on two prompts, and the gradient of the loss by log-probs."""
    batch = rollouts([0, 1])
    sampler, lengths = schema.ragged(batch, "completion_logprobs")
    reference, _ = schema.ragged(batch, "reference_logprobs")
    learner = sampler - np.linspace(0, 0.5, len(sampler), dtype=np.float32)
    credit = made.credited(batch, Measured(learner if "logprobs" in made.measures else None, version=0))
    rows = Rows(
        advantages=torch.from_numpy(credit.advantages),
        lengths=torch.from_numpy(lengths),
        row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths)),
        sampler=torch.from_numpy(sampler.copy()),
        reference=torch.from_numpy(reference.copy()),
    )
    logprobs = torch.from_numpy(learner).requires_grad_()
    vocabulary = 0.5 * logprobs**2 if made.vocabulary is not None and made.needs_vocabulary else None
    terms = made.loss(rows, Outputs(logprobs, None, None, vocabulary), credit)
    (gradient,) = torch.autograd.grad(terms.loss, logprobs)
    return {**dict(terms.sums), **made.coefficients(), **dict(credit.metrics)}, gradient


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_multiplied_coefficient_is_that_coefficient(place: dict[str, Any]) -> None:
    numbers = []
    for coefficient, factor in ((0.2, 3.0), (0.6, 1.0), (0.2, 1.0)):
        made = objective(regularizer={"kl": {"coefficient": coefficient, **place}})
        made.multiply_kl(factor)
        numbers.append(numbers_of(made)[0])
    multiplied, larger, plain = numbers
    assert multiplied == pytest.approx(larger) and multiplied["kl_coefficient"] == pytest.approx(0.6)
    assert multiplied["loss"] != pytest.approx(plain["loss"], rel=1e-3)


RAISED_PLACES: list[dict[str, Any]] = [
    *PLACES,
    {"placement": "reward", "importance_weighted": True},
    {"placement": "loss", "estimator": "k3", "importance_weighted": True},
    {"placement": "loss", "estimator": "exact"},
]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("place", RAISED_PLACES, ids=str)
def test_a_coefficient_of_0_is_raised_by_the_first_firing(place: dict[str, Any], whiten: bool) -> None:
    def made(coefficient: float, **guard: Any) -> Objective:
        kl, whitening = {"coefficient": coefficient, **place}, {"whiten": "sample"} if whiten else {}
        return objective(regularizer={"kl": kl}, guard=guard, objective=whitening)

    raising = {"entropy": {"actions": ["raise_kl"]}, "raise_kl": {"min_coefficient": 0.3, "factor": 3.0}}
    subject = made(0.0, **raising)
    without, gradient_without = numbers_of(made(0.0))
    before, gradient_before = numbers_of(subject)
    assert before == without and torch.equal(gradient_before, gradient_without)  # to the last bit
    assert before["kl_coefficient"] == 0 and "kl_loss" not in before and not subject.measures
    assert (subject.kl_in_reward, subject.kl_in_loss) == (False, False)
    for multiplier, coefficient in ((3.0, 0.3), (9.0, 0.9), (16.0, 1.6)):
        subject.multiply_kl(multiplier)
        after, gradient = numbers_of(subject)
        configured, gradient_configured = numbers_of(made(coefficient))
        assert after == pytest.approx(configured) and after["kl_coefficient"] == pytest.approx(coefficient)
        assert torch.allclose(gradient, gradient_configured)
        assert (gradient - gradient_without).abs().max() > 0.01


def test_what_the_reward_pays_after_the_first_firing_is_the_kl() -> None:
    subject = objective(guard={"entropy": {"actions": ["raise_kl"]}, "raise_kl": {"min_coefficient": 0.3}})
    batch = rollouts([0, 1])
    sampler, lengths = schema.ragged(batch, "completion_logprobs")
    reference, _ = schema.ragged(batch, "reference_logprobs")
    ends = np.cumsum(lengths)
    kl = [float((sampler - reference)[end - length : end].sum()) for end, length in zip(ends, lengths, strict=True)]
    measured = Measured(version=0)
    plain = subject.regularized_rewards(batch, measured)
    assert np.array_equal(plain, batch.column("reward").to_numpy())
    subject.multiply_kl(2.0)
    assert subject.regularized_rewards(batch, measured) == pytest.approx(plain - 0.3 * np.array(kl))


def test_a_larger_coefficient_of_the_configuration_is_multiplied() -> None:
    """The least of 0.4 is above 0.1 * 2 and below 0.3 * 2."""
    for coefficient, expected in ((0.1, (0.4, 0.8)), (0.3, (0.6, 1.2))):
        subject = objective(
            regularizer={"kl": {"coefficient": coefficient}},
            guard={"entropy": {"actions": ["raise_kl"]}, "raise_kl": {"min_coefficient": 0.4}},
        )
        assert subject.kl_strength == coefficient
        taken = []
        for multiplier in (2.0, 4.0):
            subject.multiply_kl(multiplier)
            taken.append(subject.kl_strength)
        assert taken == pytest.approx(expected)


def test_the_rate_of_every_group_is_multiplied() -> None:
    engine = Engine(LearnerSettings(learning_rate=0.1, schedule="linear"), ranks=1, steps=4)
    groups = [{"lr": 0.0}, {"lr": 0.0}]
    engine._engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    engine._factors = [1.0, 3.0]
    engine.rate_multiplier = 0.5
    assert engine.set_rate(2) == pytest.approx(0.025)  # half way down, halved
    assert [group["lr"] for group in groups] == pytest.approx([0.025, 0.075])
