"""Weighted likelihood averaged over tokens: what supervised training minimizes, against a loop."""

from typing import Any

import numpy as np
import pytest
import torch

from fakes import settings_for
from keel import schema
from keel.algorithms import registry
from keel.algorithms.types import Measured, Outputs, Rows
from rollouts import generated, prompts, referenced, scored

LENGTHS = (1, 2, 5, 3)


def loss_and_gradient(likelihood: str, weights: str, rewards: list[float]) -> tuple[float, list[float], list[float]]:
    """Loss of the objective, its gradient by token, and the token log-probs."""
    logprobs = [[-0.5 * (row + 1) - 0.1 * t for t in range(length)] for row, length in enumerate(LENGTHS)]
    batch = scored(referenced(generated(prompts([0, 1]), logprobs=logprobs)), rewards)
    flat, lengths = schema.ragged(batch, "completion_logprobs")
    blocks: dict[str, Any] = {
        "objective": {"kind": "weighted_likelihood", "weights": weights, "likelihood": likelihood}
    }
    objective = registry.build(settings_for(**blocks, regularizer={"kl": {"coefficient": 0.0}}))
    credit = objective.credited(batch, Measured(flat, np.zeros((len(flat), 0))))
    rows = Rows(
        advantages=torch.from_numpy(credit.advantages),
        lengths=torch.from_numpy(lengths),
        row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths)),
        sampler=torch.from_numpy(flat.copy()),
        reference=torch.from_numpy(flat.copy()),
    )
    policy = torch.from_numpy(flat.astype(np.float64)).requires_grad_()
    result = objective.loss(rows, Outputs(policy, None, None), credit)
    result.loss.backward()
    assert policy.grad is not None
    return result.loss.item(), policy.grad.tolist(), flat.tolist()


def test_uniform_weights_are_the_mean_over_all_tokens() -> None:
    """-mean log pi: every token of the step counts the same, whichever completion it is in; what the reward says is unread."""
    loss, gradient, logprobs = loss_and_gradient("token_mean", "uniform", [0.0, 1.0, 5.0, -2.0])
    assert loss == pytest.approx(-np.mean(logprobs))
    assert gradient == pytest.approx([-1 / sum(LENGTHS)] * sum(LENGTHS))


@pytest.mark.parametrize(
    ("likelihood", "share"),
    [
        ("sum", [1.0] * 4),
        ("average", [1 / length for length in LENGTHS]),
        ("token_mean", [4 / sum(LENGTHS)] * 4),
    ],
)
def test_the_best_of_each_prompt_by_its_share(likelihood: str, share: list[float]) -> None:
    """Rows 1 and 2 are the best of their prompts and weigh 2, the others nothing; averaged over 4 rows."""
    loss, _, logprobs = loss_and_gradient(likelihood, "best_of_n", [0.0, 1.0, 5.0, -2.0])
    ends = np.cumsum(LENGTHS)
    sums = [sum(logprobs[end - length : end]) for end, length in zip(ends, LENGTHS, strict=True)]
    assert loss == pytest.approx(-(2 * share[1] * sums[1] + 2 * share[2] * sums[2]) / 4)
