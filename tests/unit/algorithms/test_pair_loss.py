"""The loss of reward models against its closed form in float64, and its gradient against differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from keel.config import loader
from keel.config.stages import RewardModelSettings
from keel.learner.reward_learner import pair_loss

CHOSEN, REJECTED = np.array([0.3, -1.2, 4.0, 0.0, -30.0]), np.array([-0.4, 0.9, 4.0, 0.0, 25.0])
MARGINS = np.array([0.0, 0.5, 1.0, 0.0, 2.0])


def settings_for(**blocks: Any) -> RewardModelSettings:
    return loader.parse_as(RewardModelSettings, {"policy": {"model": "m"}, "prompts": {"source": "p"}, **blocks})


def interleaved(chosen: np.ndarray, rejected: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([chosen, rejected], axis=1).reshape(-1))


def closed_form(won: float, lost: float, margin: float, smoothing: float, penalty: float) -> float:
    """-(1-e) log sigma(u) - e log sigma(-u) + c (w + l)^2, with log sigma(u) = min(u, 0) - log1p(exp(-|u|))."""
    u = won - lost - margin
    log_sigma = [min(x, 0.0) - math.log1p(math.exp(-abs(x))) for x in (u, -u)]
    return -(1 - smoothing) * log_sigma[0] - smoothing * log_sigma[1] + penalty * (won + lost) ** 2


CASES = [{}, {"label_smoothing": 0.1}, {"center_penalty": 0.01}, {"label_smoothing": 0.3, "center_penalty": 0.5}]


@pytest.mark.parametrize("blocks", CASES)
def test_losses_are_those_of_the_formula(blocks: dict[str, float]) -> None:
    result = pair_loss(interleaved(CHOSEN, REJECTED), torch.from_numpy(MARGINS), settings_for(**blocks))
    terms = blocks.get("label_smoothing", 0.0), blocks.get("center_penalty", 0.0)
    expected = [closed_form(*row, *terms) for row in zip(CHOSEN, REJECTED, MARGINS, strict=True)]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert result.margins.tolist() == pytest.approx((CHOSEN - REJECTED).tolist())  # as the pair is, no margin taken off
    assert not result.margins.requires_grad


def test_known_values() -> None:
    """A tie is log 2; a difference of log 3 without noise is -log(3/4)."""
    result = pair_loss(torch.tensor([1.0, 1.0, math.log(3), 0.0]).double(), torch.zeros(2), settings_for())
    assert result.losses.tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


@pytest.mark.parametrize("blocks", CASES)
def test_gradients_are_those_of_differences(blocks: dict[str, float]) -> None:
    config, margins = settings_for(**blocks), torch.from_numpy(MARGINS[:4])
    scores = interleaved(CHOSEN[:4], REJECTED[:4]).requires_grad_()
    pair_loss(scores, margins, config).losses.mean().backward()
    step, numeric = 1e-6, []
    for place in range(len(scores)):
        sides = []
        for sign in (1, -1):
            moved = scores.detach().clone()
            moved[place] += sign * step
            sides.append(float(pair_loss(moved, margins, config).losses.mean()))
        numeric.append((sides[0] - sides[1]) / (2 * step))
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx(numeric, abs=1e-8)


def test_the_gradient_of_a_pair_is_what_it_got_wrong() -> None:
    """d loss / d r_w = -(1 - sigma(u) - e), and the opposite for the rejected text."""
    smoothing = 0.2
    scores = interleaved(CHOSEN[:4], REJECTED[:4]).requires_grad_()
    pair_loss(scores, torch.from_numpy(MARGINS[:4]), settings_for(label_smoothing=smoothing)).losses.sum().backward()
    u = CHOSEN[:4] - REJECTED[:4] - MARGINS[:4]
    expected = 1 / (1 + np.exp(-u)) - (1 - smoothing)
    assert scores.grad is not None
    assert scores.grad[0::2].tolist() == pytest.approx(expected.tolist())
    assert scores.grad[1::2].tolist() == pytest.approx((-expected).tolist())


def test_smoothed_labels_are_the_expectation_over_exchanged_pairs() -> None:
    smoothing, zero = 0.3, torch.zeros(5)
    as_given, exchanged = interleaved(CHOSEN, REJECTED), interleaved(REJECTED, CHOSEN)
    plain = settings_for()
    expected = (1 - smoothing) * pair_loss(as_given, zero, plain).losses + smoothing * pair_loss(
        exchanged, zero, plain
    ).losses
    smoothed = pair_loss(as_given, zero, settings_for(label_smoothing=smoothing)).losses
    assert smoothed.tolist() == pytest.approx(expected.tolist())


def test_a_huge_difference_overflows_nothing() -> None:
    scores = torch.tensor([1e4, -1e4, -1e4, 1e4], requires_grad=True)
    result = pair_loss(scores, torch.zeros(2), settings_for()).losses
    result.sum().backward()
    assert result.tolist() == [0.0, 2e4]
    assert scores.grad is not None and scores.grad.tolist() == [0.0, 0.0, -1.0, 1.0]
