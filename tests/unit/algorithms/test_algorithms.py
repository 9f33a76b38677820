"""Advantages and regularizers against hand-derived numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel import schema
from keel.algorithms import advantages, regularizers

SCORES = np.array([1.0, 2.0, 5.0, 8.0])
KL = np.array([2.0, 1.0, 4.0, 3.0])
TICKETS = np.zeros(4, int)


def test_rloo_with_kl_before_the_baseline() -> None:
    regularized = SCORES - 0.05 * KL
    expected = [-3.9666666667, -2.5666666667, 1.2333333333, 5.3]
    assert advantages.rloo(regularized) == pytest.approx(expected, abs=1e-9)


def test_group_mean_and_grpo() -> None:
    regularized = SCORES - 0.05 * KL
    centered = [-2.975, -1.925, 0.925, 3.975]
    assert advantages.group_mean(regularized) == pytest.approx(centered, abs=1e-9)
    deviation = np.std(regularized, ddof=1)
    assert advantages.grpo(regularized) == pytest.approx(np.array(centered) / (deviation + 1e-4), abs=1e-9)
    assert advantages.grpo(regularized) == pytest.approx([-0.9533, -0.6169, 0.2964, 1.2738], abs=1e-4)


def test_entropy_in_the_reward() -> None:
    """-S = [1.5, 2.4, .7, .8], alpha .1; log-probs after the end of a completion do not exist, so nothing leaks."""
    lengths = np.array([2, 3, 1, 4])
    logprobs = -np.concatenate([np.full(n, total / n) for n, total in zip(lengths, [1.5, 2.4, 0.7, 0.8], strict=True)])
    terms = regularizers.entropy_reward("sequence_sum", logprobs, lengths)
    reward = SCORES + 0.1 * schema.row_sums(terms, lengths)
    assert reward == pytest.approx([1.15, 2.24, 5.07, 8.08], abs=1e-9)
    assert advantages.rloo(reward) == pytest.approx([-3.98, -2.5266666667, 1.2466666667, 5.26], abs=1e-9)
    means = schema.row_sums(regularizers.entropy_reward("sequence_mean_naive", logprobs, lengths), lengths)
    assert means == pytest.approx([0.75, 0.8, 0.7, 0.2], abs=1e-9)


@pytest.mark.parametrize("name", list(advantages.GROUP))
def test_a_group_of_one_has_no_advantage(name: str) -> None:
    assert advantages.GROUP[name](np.array([3.0])).tolist() == [0.0]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.permutations(range(12)))
def test_groups_are_tickets_not_positions(rewards: list[float], order: list[int]) -> None:
    values = np.array(rewards)
    tickets = np.arange(len(values)) % 3
    places = np.array([place for place in order if place < len(values)])
    whole = advantages.by_ticket(advantages.rloo, values, tickets)
    shuffled = advantages.by_ticket(advantages.rloo, values[places], tickets[places])
    assert shuffled == pytest.approx(whole[places], abs=1e-9)
    for ticket in range(3):
        assert whole[tickets == ticket].sum() == pytest.approx(0, abs=1e-9)


def test_uniform_groups_are_counted() -> None:
    rewards, tickets = np.array([1.0, 1.0, 2.0, 3.0, 0.5, 0.5]), np.array([0, 0, 1, 1, 2, 2])
    assert advantages.num_uniform_groups(rewards, tickets) == 2


LOGITS = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.0, 0.3, 0.5], dtype=torch.float64)
GRADIENT_OF_KL = [-0.0123483624, -0.139546433, 0.1518947954]


def expectation_gradient(loss_of_action: object) -> list[float]:
    """Gradient of sum_a sg[p(a)] loss(a): what sampling estimates, by enumeration."""
    logits = LOGITS.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    probabilities = log_p.exp().detach()
    loss = (probabilities * loss_of_action(log_p, REFERENCE.log_softmax(-1))).sum()  # type: ignore[operator]
    return torch.autograd.grad(loss, logits)[0].tolist()


def test_k2_in_the_loss_has_the_gradient_of_the_kl() -> None:
    assert expectation_gradient(regularizers.kl_k2) == pytest.approx(GRADIENT_OF_KL, abs=1e-9)


def test_k1_in_the_reward_has_the_gradient_of_the_kl() -> None:
    """The policy-gradient loss of a detached penalty: -(-k1) log pi."""

    def surrogate(log_p: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        penalty = regularizers.sequence_kl(log_p.detach().numpy(), reference.numpy(), np.ones(3, int))
        return torch.from_numpy(penalty) * log_p

    assert expectation_gradient(surrogate) == pytest.approx(GRADIENT_OF_KL, abs=1e-9)


def test_k3_estimates_the_kl() -> None:
    log_p, reference = LOGITS.log_softmax(-1), REFERENCE.log_softmax(-1)
    k3 = regularizers.token_k3(log_p.numpy(), reference.numpy())
    assert (k3 >= 0).all()
    assert float((log_p.exp().numpy() * k3).sum()) == pytest.approx(0.1176064084, abs=1e-9)
    k1 = regularizers.sequence_kl(log_p.numpy(), reference.numpy(), np.ones(3, int))
    assert float((log_p.exp().numpy() * k1).sum()) == pytest.approx(0.1176064084, abs=1e-9)
    assert np.isfinite(regularizers.token_k3(np.array([-500.0]), np.array([0.0]))).all()


def two_step_tree() -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """P2d_seq_entropy: first token a (logit 0) or b (theta); after a a second choice with logit phi, after b a fair coin."""
    parameters = torch.tensor([-1.0, 3.0], dtype=torch.float64, requires_grad=True)
    theta, phi = parameters
    first = torch.stack([torch.zeros_like(theta), theta]).log_softmax(0)
    after_a = torch.stack([phi, torch.zeros_like(phi)]).log_softmax(0)
    after_b = torch.zeros(2, dtype=torch.float64).log_softmax(0)
    paths = [(first[0], after_a[k]) for k in range(2)] + [(first[1], after_b[k]) for k in range(2)]
    return parameters, paths


def test_the_entropy_reward_has_the_whole_gradient_and_the_bonus_only_its_first_part() -> None:
    parameters, paths = two_step_tree()
    totals = torch.stack([one + two for one, two in paths])
    flat = np.array([[one.item(), two.item()] for one, two in paths]).ravel()
    lengths = np.full(4, 2)
    reward = torch.from_numpy(schema.row_sums(regularizers.entropy_reward("sequence_sum", flat, lengths), lengths))
    objective = (totals.exp().detach() * reward * totals).sum()
    (whole,) = torch.autograd.grad(objective, parameters, retain_graph=True)
    assert whole.tolist() == pytest.approx([0.2953666094, -0.0990803539], abs=1e-9)
    first = -sum(p.exp() * p for p in (paths[0][0], paths[2][0]))
    later = sum(-one.exp().detach() * sum(p.exp() * p for p in pair) for one, pair in branches(paths))
    (bonus,) = torch.autograd.grad(first + later, parameters)
    assert bonus.tolist() == pytest.approx([0.1966119332, -0.0990803539], abs=1e-9)


def branches(paths: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    return [(paths[start][0], [paths[start][1], paths[start + 1][1]]) for start in (0, 2)]
