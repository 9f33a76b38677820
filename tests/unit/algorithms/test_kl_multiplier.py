"""The guard's factor on the KL: an objective with it equals one whose coefficient is that much larger."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from keel import schema
from keel.algorithms.types import Measured, Outputs, Rows
from keel.config.workers import LearnerSettings
from keel.learner.engine import Engine
from rollouts import rollouts
from tabular import objective


@pytest.mark.parametrize(
    "place",
    [
        {"placement": "reward"},
        {"placement": "reward", "order": "after_baseline"},
        {"placement": "loss", "estimator": "k2"},
    ],
    ids=str,
)
def test_a_multiplied_coefficient_is_that_coefficient(place: dict[str, Any]) -> None:
    batch = rollouts([0, 1])
    sampler, lengths = schema.ragged(batch, "completion_logprobs")
    reference, _ = schema.ragged(batch, "reference_logprobs")
    numbers = []
    for coefficient, factor in ((0.2, 3.0), (0.6, 1.0), (0.2, 1.0)):
        made = objective(regularizer={"kl": {"coefficient": coefficient, **place}})
        made.kl_multiplier = factor
        credit = made.credited(batch, Measured(version=0))
        rows = Rows(
            advantages=torch.from_numpy(credit.advantages),
            lengths=torch.from_numpy(lengths),
            row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths)),
            sampler=torch.from_numpy(sampler.copy()),
            reference=torch.from_numpy(reference.copy()),
        )
        outputs = Outputs(torch.from_numpy(sampler - np.linspace(0, 0.5, len(sampler), dtype=np.float32)), None, None)
        numbers.append({**dict(made.loss(rows, outputs, credit).sums), **made.coefficients(), **dict(credit.metrics)})
    multiplied, larger, plain = numbers
    assert multiplied == pytest.approx(larger) and multiplied["kl_coefficient"] == pytest.approx(0.6)
    assert multiplied["loss"] != pytest.approx(plain["loss"], rel=1e-3)


def test_the_rate_of_every_group_is_multiplied() -> None:
    engine = Engine(LearnerSettings(learning_rate=0.1, schedule="linear"), ranks=1, steps=4)
    groups = [{"lr": 0.0}, {"lr": 0.0}]
    engine._engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    engine._factors = [1.0, 3.0]
    engine.rate_multiplier = 0.5
    assert engine.set_rate(2) == pytest.approx(0.025)  # half way down, halved
    assert [group["lr"] for group in groups] == pytest.approx([0.025, 0.075])
