"""The paper's failure mode where it can be solved exactly: a softmax table trained through the real objective.

Four answers, one reward hack, 2,000 kinds of gibberish, each an answer of one token (oracle P1d). Every step shows every
answer once, as a stale sample of a uniform sampler; importance weights and importance-weighted terms turn that into the
exact policy gradient of the policy of now. With one token a sum, a mean and a bonus are the same objective, so below the
same is done with answers of 1 to 6 tokens, where each arm has an optimum of its own.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import optimize

from keel.algorithms import registry
from keel.algorithms.types import Measured, Outputs, Rows
from keel.config import loader
from keel.learner.frozen_models import FrozenView, chunk_term_of
from optimal_policies import GOLD, OPTIMA, PROXY, REFERENCE, optimum

N = len(PROXY)
STEPS = 800
REFERENCE_GOLD = float(REFERENCE @ GOLD)
KL: dict[str, Any] = {"importance_weighted": True}
ARMS: dict[str, Any] = {
    "kl": lambda t: {"kl": {"coefficient": t, **KL}},
    "kl_k2": lambda t: {"kl": {"coefficient": t, "placement": "loss", "estimator": "k2", **KL}},
    "kl_k3_weighted": lambda t: {"kl": {"coefficient": t, "placement": "loss", "estimator": "k3", **KL}},
    "kl_exact": lambda t: {"kl": {"coefficient": t, "placement": "loss", "estimator": "exact"}},
    "entropy_sequence_sum": lambda t: {"entropy": {"form": "sequence_sum", "coefficient": t, **KL}},
    "entropy_sequence_mean_exact": lambda t: {"entropy": {"form": "sequence_mean_exact", "coefficient": t, **KL}},
    "entropy_sequence_mean_naive": lambda t: {"entropy": {"form": "sequence_mean_naive", "coefficient": t, **KL}},
    "entropy_token": lambda t: {"entropy": {"form": "token_bonus", "coefficient": t}},
    "none": lambda t: {},
}
BATCH = pa.record_batch(
    {
        "ticket": pa.array(np.zeros(N, np.int64)),
        "seed": pa.array(np.arange(N)),
        "reward": pa.array(PROXY),
        "completion_logprobs": pa.array(np.full((N, 1), -np.log(N)).tolist(), pa.list_(pa.float64())),
        "reference_logprobs": pa.array(np.log(REFERENCE)[:, None].tolist(), pa.list_(pa.float64())),
    }
)


@functools.cache
def trained(arm: str, temperature: float) -> np.ndarray:
    """The policy [N] that this arm's objective leads to from the reference."""
    tree: dict[str, Any] = {
        "policy": {"model": "m"},
        "prompts": {"source": "p"},
        "objective": {"correction_cap": 1e9},
        "regularizer": ARMS[arm](temperature),
        "rewards": [{"name": "proxy", "source": "a:b"}],
    }
    objective = registry.build(loader.parse(tree))
    logits = torch.tensor(np.log(REFERENCE)).requires_grad_()
    optimizer = torch.optim.Adam([logits], betas=(0.9, 0.9), eps=1e-30)
    places, ones = torch.arange(N), torch.ones(N, dtype=torch.float64)
    reference = FrozenView(torch.tensor(np.log(REFERENCE)).expand(N, -1), torch.nn.Identity())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / STEPS) ** 3 + 1e-4
        log_p = logits.log_softmax(0)
        credit = objective.weigh(BATCH, Measured(log_p.detach().numpy()))
        advantages = torch.from_numpy(credit.advantages)
        rows = Rows(advantages, ones, places, torch.full((N,), -np.log(N), dtype=torch.float64), None, LOG_REFERENCE)
        entropy = -(log_p.exp() * log_p).sum().expand(N) if objective.needs_entropy else None
        term = None
        if objective.vocabulary is not None:  # one state: what the term says of it stands for every row
            piece = chunk_term_of(objective.vocabulary, places, advantages, None, {"reference": reference}, 1.0)
            term = piece(logits[None], 0, 1).expand(N)
        optimizer.zero_grad()
        objective.loss(rows, Outputs(log_p, entropy, None, term), credit).loss.backward()
        optimizer.step()
    return logits.detach().softmax(0).numpy()


LOG_REFERENCE = torch.tensor(np.log(REFERENCE))


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ (np.log(one) - np.log(other)))


@pytest.mark.parametrize(
    ("arm", "temperature"),
    [("kl", 0.2), ("kl", 0.5), ("kl", 1.0), ("kl_k2", 0.5), ("kl_k3_weighted", 0.5), ("kl_exact", 0.5)]
    + [("entropy_sequence_sum", t) for t in (0.2, 0.5, 2.0)]
    + [("entropy_sequence_mean_naive", 0.5), ("entropy_token", 0.5)],
)
def test_training_reaches_the_closed_form_optimum_of_the_arm(arm: str, temperature: float) -> None:
    policy, family = trained(arm, temperature), arm.split("_")[0]
    assert divergence(policy, optimum(family, temperature)) < 1e-3
    result = (policy @ PROXY, policy @ GOLD, divergence(policy, REFERENCE), -policy @ np.log(policy), policy[4])
    assert result == pytest.approx(OPTIMA[family, temperature], abs=0.03)


def test_maximum_entropy_ends_below_the_reference_at_every_temperature() -> None:
    """The hack at low temperatures, gibberish at high ones: there is none at which it stays near the reference."""
    for temperature in (0.05, 0.2, 0.5, 1.0, 2.0):
        policy = trained("entropy_sequence_sum", temperature)
        assert policy @ GOLD < REFERENCE_GOLD - 1
        assert divergence(policy, REFERENCE) > 8
    assert trained("entropy_sequence_sum", 0.05)[4] > 0.99
    assert trained("entropy_sequence_sum", 2.0)[5:].sum() > 0.99


def test_kl_control_has_a_window_and_hacks_when_its_coefficient_is_too_small() -> None:
    assert trained("kl", 0.5) @ GOLD > REFERENCE_GOLD + 0.1
    assert trained("kl", 1.0) @ GOLD > REFERENCE_GOLD + 0.05
    assert trained("kl", 0.2) @ GOLD < 0 < trained("kl", 0.2) @ PROXY - 2
    assert trained("none", 0.0)[4] > 0.999


# ---- answers of 1 to 6 tokens: at each place the policy continues or ends, at the budget of 6 it is cut

PLACES = 6
CHAIN_STEPS = 300
CHAIN_LENGTHS = np.array([*range(1, PLACES + 1), PLACES])
"""End at place 1 to 6, or none within the budget."""
CHAIN_SCORES = np.array([0.4, 1.0, 0.3, 0.7, -0.2, 0.9, 0.1])
CHAIN_ROWS = np.repeat(np.arange(len(CHAIN_LENGTHS)), CHAIN_LENGTHS)
CHAIN_STATES = torch.from_numpy(np.concatenate([np.arange(n) for n in CHAIN_LENGTHS]))
_LAST = np.cumsum(CHAIN_LENGTHS) - 1
CHAIN_ENDS = torch.from_numpy(np.isin(np.arange(len(CHAIN_ROWS)), _LAST[:-1]))
"""bool [tokens]: the token is the end; the last answer has none."""
CHAIN_REFERENCE = torch.tensor([-1.0, -0.5, 0.2, -0.8, 0.4, -0.3], dtype=torch.float64)


def token_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """[tokens] of all answers under a policy whose logit of ending at each place this is."""
    ends = logits[CHAIN_STATES]
    return torch.where(CHAIN_ENDS, torch.nn.functional.logsigmoid(ends), torch.nn.functional.logsigmoid(-ends))


def sequence_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """S [answers]."""
    rows = torch.from_numpy(CHAIN_ROWS)
    return torch.zeros(len(CHAIN_LENGTHS), dtype=torch.float64).index_add(0, rows, token_logprobs(logits))


def place_entropies(logits: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(logits)
    return -(p * torch.nn.functional.logsigmoid(logits) + (1 - p) * torch.nn.functional.logsigmoid(-logits))


def per_answer(flat: torch.Tensor) -> list[list[float]]:
    return [flat[row == CHAIN_ROWS].tolist() for row in range(len(CHAIN_LENGTHS))]


CHAIN_BATCH = pa.record_batch(
    {
        "ticket": pa.array(np.zeros(len(CHAIN_LENGTHS), np.int64)),
        "seed": pa.array(np.arange(len(CHAIN_LENGTHS))),
        "reward": pa.array(CHAIN_SCORES),
        "completion_logprobs": pa.array(
            [[-np.log(len(CHAIN_LENGTHS)) / n] * n for n in CHAIN_LENGTHS], pa.list_(pa.float64())
        ),
        "reference_logprobs": pa.array(per_answer(token_logprobs(CHAIN_REFERENCE)), pa.list_(pa.float64())),
    }
)
"""Every answer once, from a sampler that gives all the same probability."""


def chain_objective(arm: str, temperature: float, **objective: Any) -> Any:
    tree: dict[str, Any] = {
        "policy": {"model": "m"},
        "prompts": {"source": "p"},
        "objective": {"advantage": "none", "correction": "sequence", "correction_cap": 1e9, **objective},
        "regularizer": ARMS[arm](temperature),
        "rewards": [{"name": "proxy", "source": "a:b"}],
    }
    return registry.build(loader.parse(tree))


def chain_loss(built: Any, logits: torch.Tensor) -> torch.Tensor:
    """The step's loss as an expectation under the policy of now, its gradient the exact one of the objective."""
    lengths, rows = torch.from_numpy(CHAIN_LENGTHS).double(), torch.from_numpy(CHAIN_ROWS)
    flat = token_logprobs(logits)
    credit = built.weigh(CHAIN_BATCH, Measured(flat.detach().numpy()))
    weights = sequence_logprobs(logits).detach().exp() * len(lengths)  # pi / sampler
    # a bonus is a mean over sampled tokens: the tokens of each answer as often as the policy gives it
    credit = dataclasses.replace(credit, num_tokens=float(weights @ lengths))
    made = Rows(
        advantages=torch.from_numpy(credit.advantages),
        lengths=lengths,
        row_of_item=rows,
        sampler=torch.from_numpy(np.concatenate(CHAIN_BATCH.column("completion_logprobs").to_pylist())),
        reference=token_logprobs(CHAIN_REFERENCE),
    )
    entropies = place_entropies(logits)[CHAIN_STATES] * weights[rows] if built.needs_entropy else None
    return built.loss(made, Outputs(flat, entropies), credit).loss


@functools.cache
def trained_chain(arm: str, temperature: float) -> np.ndarray:
    """The probability of each answer that this arm's objective leads to from the reference."""
    built = chain_objective(arm, temperature)
    logits = CHAIN_REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], betas=(0.9, 0.9), eps=1e-30)
    for step in range(CHAIN_STEPS):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / CHAIN_STEPS) ** 3 + 1e-4
        optimizer.zero_grad()
        chain_loss(built, logits).backward()
        optimizer.step()
    return sequence_logprobs(logits.detach()).exp().numpy()


def solved(policy: Any, low: float, high: float) -> np.ndarray:
    """The policy of one unknown number, between these, that adds up to 1."""
    return policy(optimize.brentq(lambda number: policy(number).sum() - 1, low, high, xtol=1e-13))


def token_bonus_optimum(coefficient: float) -> np.ndarray:
    """At every place softmax of the score to come over c / E|y|: the entropy to come is in no place's account."""

    def policy(mean_length: float) -> np.ndarray:
        to_come, reach = CHAIN_SCORES[-1], []
        for place in reversed(range(PLACES)):
            end = 1 / (1 + np.exp(-(CHAIN_SCORES[place] - to_come) * mean_length / coefficient))
            to_come = end * CHAIN_SCORES[place] + (1 - end) * to_come
            reach.append(end)
        ends = np.array(reach[::-1])
        going_on = np.concatenate([[1.0], np.cumprod(1 - ends)])
        return np.append(ends * going_on[:-1], going_on[-1])

    return policy(optimize.brentq(lambda mean: policy(mean) @ CHAIN_LENGTHS - mean, 1.0, PLACES, xtol=1e-13))


def chain_optimum(arm: str, t: float) -> np.ndarray:
    if arm == "kl":
        weights = sequence_logprobs(CHAIN_REFERENCE).exp().numpy() * np.exp(CHAIN_SCORES / t)
        return weights / weights.sum()
    if arm == "entropy_sequence_sum":
        return np.exp(CHAIN_SCORES / t) / np.exp(CHAIN_SCORES / t).sum()
    if arm == "entropy_sequence_mean_exact":  # a log pi + a = s - lambda with a = beta / |y|
        return solved(lambda x: np.exp((CHAIN_SCORES - x) * CHAIN_LENGTHS / t - 1), -20, 20)
    if arm == "entropy_sequence_mean_naive":  # SimPO's fixed point: s - beta S / |y| is constant
        return solved(lambda x: np.exp((CHAIN_SCORES - x) * CHAIN_LENGTHS / t), -20, 20)
    return token_bonus_optimum(t)


CHAIN_ARMS = ["kl", "entropy_sequence_sum", "entropy_sequence_mean_exact", "entropy_sequence_mean_naive"]
CHAIN_ARMS += ["entropy_token"]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("arm", CHAIN_ARMS)
def test_with_answers_of_many_lengths_every_arm_reaches_its_own_optimum(arm: str, temperature: float) -> None:
    result = trained_chain(arm, temperature)
    assert result == pytest.approx(chain_optimum(arm, temperature), abs=2e-4)
    for other in set(CHAIN_ARMS) - {arm}:
        assert np.abs(result - chain_optimum(other, temperature)).max() > 0.02, other


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_naive_mean_is_no_maximum_of_what_the_exact_one_maximizes(temperature: float) -> None:
    def reached(policy: np.ndarray) -> float:
        return float(policy @ (CHAIN_SCORES - temperature / CHAIN_LENGTHS * np.log(policy)))

    best = reached(trained_chain("entropy_sequence_mean_exact", temperature))
    assert all(reached(trained_chain(arm, temperature)) < best - 1e-3 for arm in CHAIN_ARMS if "exact" not in arm)


def numeric_gradient(value: Any, at: torch.Tensor) -> list[float]:
    steps = 1e-5 * torch.eye(len(at), dtype=torch.float64)
    return [float(value(at + step) - value(at - step)) / 2e-5 for step in steps]


def expected_objective(arm: str, beta: float, logits: torch.Tensor) -> torch.Tensor:
    """E[s - temperature(y) S] over all answers."""
    totals = sequence_logprobs(logits)
    lengths = torch.from_numpy(CHAIN_LENGTHS).double()
    temperature = beta if arm == "entropy_sequence_sum" else beta / lengths
    return totals.exp() @ (torch.from_numpy(CHAIN_SCORES) - temperature * totals)


@pytest.mark.parametrize("advantage", ["rloo", "none", "dr_grpo"])
@pytest.mark.parametrize("seed", range(3))
def test_entropy_in_the_reward_has_the_gradient_of_its_objective(advantage: str, seed: int) -> None:
    """Finite differences of E[s - (beta/|y|) S] at random policies; the naive form misses grad beta E[1/|y|]."""
    at = torch.from_numpy(np.random.default_rng(seed).normal(size=PLACES))
    factor = {"rloo": 7 / 6}.get(advantage, 1.0)  # k / (k - 1), which sampling cancels and enumeration keeps
    result = {}
    for arm in CHAIN_ARMS[1:4]:
        logits = at.clone().requires_grad_()
        built = chain_objective(arm, 0.8, advantage=advantage)
        (slope,) = torch.autograd.grad(chain_loss(built, logits), logits)
        result[arm] = (-slope / factor).numpy()
    for arm in ("entropy_sequence_sum", "entropy_sequence_mean_exact"):
        numeric = numeric_gradient(lambda logits, arm=arm: expected_objective(arm, 0.8, logits), at)
        assert result[arm] == pytest.approx(numeric, abs=1e-8)
    inverse = 1 / torch.from_numpy(CHAIN_LENGTHS).double()
    missing = numeric_gradient(lambda logits: 0.8 * sequence_logprobs(logits).exp() @ inverse, at)
    difference = result["entropy_sequence_mean_naive"] - result["entropy_sequence_mean_exact"]
    assert difference == pytest.approx(missing, abs=1e-8)
    assert np.abs(missing).max() > 0.01
