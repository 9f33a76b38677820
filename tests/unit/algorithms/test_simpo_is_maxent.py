"""SimPO is maximum entropy (2509.20265): what a tabular policy learns from preferences that known rewards make.

Maximum entropy with temperature beta/|y| ends where r_i - r_j = beta (A_i - A_j) + beta (1/|y_i| - 1/|y_j|), A = log pi / |y|
(oracle P1b). SimPO fits r_i - r_j by the first term alone; `exact_length_margin` by both.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from keel.algorithms.preferences import RANKING_SCORES, Sequences, pair_logits, ranking_loss, sigmoid_loss
from keel.config.objective import PreferenceSettings

REWARDS = torch.tensor([1.0, 0.3, -0.2], dtype=torch.float64)
LENGTHS = torch.tensor([2.0, 4.0, 5.0], dtype=torch.float64)
BETA = 2.0
OPTIMUM = [0.645732637, 0.2795037776, 0.0747635854]
"""Of maximum entropy with these rewards, lengths and beta (P1b)."""


def settings(loss: str = "simpo", **more: Any) -> PreferenceSettings:
    return PreferenceSettings(kind="preference", loss=loss, beta=BETA, **more)


def sequences(log_p: torch.Tensor) -> Sequences:
    zeros = torch.zeros_like(log_p)
    return Sequences(log_p, zeros, LENGTHS, zeros)


def expected_pair_loss(log_p: torch.Tensor, config: PreferenceSettings) -> torch.Tensor:
    """SimPO's loss over all ordered pairs, each as often as Bradley-Terry with REWARDS prefers it."""
    pairs = torch.tensor(list(itertools.permutations(range(3), 2)))
    won, lost = pairs[:, 0], pairs[:, 1]
    weight = torch.sigmoid(REWARDS[won] - REWARDS[lost])
    return (weight * sigmoid_loss(pair_logits(sequences(log_p), won, lost, config), config)).sum()


def expected_ranking_loss(log_p: torch.Tensor, config: PreferenceSettings) -> torch.Tensor:
    """Plackett-Luce's loss over all rankings, each as often as Plackett-Luce with REWARDS makes it."""
    scores = config.beta * RANKING_SCORES[config.loss](sequences(log_p))
    if config.exact_length_margin:
        scores = scores + config.beta / LENGTHS
    total = log_p.new_zeros(())
    for order in itertools.permutations(range(3)):
        weight = torch.exp(-ranking_loss(REWARDS[list(order)], 0.0))
        total = total + weight * ranking_loss(scores[list(order)], config.target_margin)
    return total


def fitted(loss: Any, config: PreferenceSettings) -> torch.Tensor:
    """log pi [3] that minimizes the loss over all policies."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0), config)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def implied_rewards(log_p: torch.Tensor) -> np.ndarray:
    """The rewards for which this policy is the maximum-entropy optimum, up to a constant: alpha log pi + alpha."""
    alpha = BETA / LENGTHS
    rewards = alpha * log_p + alpha
    return (rewards - rewards[0]).numpy()


TRUE = (REWARDS - REWARDS[0]).numpy()
LENGTH_TERM = (BETA / LENGTHS - BETA / LENGTHS[0]).numpy()


@pytest.mark.parametrize(
    ("loss", "form"), [(expected_pair_loss, "simpo"), (expected_ranking_loss, "simpo_plackett_luce")]
)
def test_simpo_recovers_the_rewards_up_to_the_length_term(loss: Any, form: str) -> None:
    log_p = fitted(loss, settings(form))
    assert implied_rewards(log_p) == pytest.approx(TRUE + LENGTH_TERM, abs=1e-6)
    assert np.abs(LENGTH_TERM[1:]).min() > 0.4  # and that is no small thing for answers this short


@pytest.mark.parametrize(
    ("loss", "form"), [(expected_pair_loss, "simpo"), (expected_ranking_loss, "simpo_plackett_luce")]
)
def test_with_the_exact_margin_it_ends_at_the_maximum_entropy_policy(loss: Any, form: str) -> None:
    log_p = fitted(loss, settings(form, exact_length_margin=True))
    assert implied_rewards(log_p) == pytest.approx(TRUE, abs=1e-6)
    assert log_p.exp().tolist() == pytest.approx(OPTIMUM, abs=1e-6)


def test_the_target_margin_widens_what_is_learned() -> None:
    """gamma is an assumption of SimPO's, not a part of maximum entropy: margins come out larger than the rewards say."""
    plain, wide = (implied_rewards(fitted(expected_pair_loss, settings(target_margin=g))) for g in (0.0, 0.5))
    assert abs(wide[2]) > abs(plain[2]) + 0.1
