"""The paper's failure mode where it can be solved exactly: a softmax table trained through the real objective.

Four answers, one reward hack, 2,000 kinds of gibberish, each an answer of one token (oracle P1d). Every step shows every
answer once, as a stale sample of a uniform sampler; importance weights and importance-weighted terms turn that into the
exact policy gradient of the policy of now.
"""

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel import config
from keel.algorithms import kinds
from keel.algorithms.credit import Measured, Outputs, Rows
from keel.anchors import FrozenView, vocabulary_piece
from test_arms import GOLD, OPTIMA, PROXY, REFERENCE, optimum

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
    "entropy_sequence_mean": lambda t: {"entropy": {"form": "sequence_mean", "coefficient": t, **KL}},
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
        "regulariser": ARMS[arm](temperature),
        "rewards": [{"name": "proxy", "source": "a:b"}],
    }
    own = kinds.build(config.parse(tree))
    logits = torch.tensor(np.log(REFERENCE)).requires_grad_()
    optimizer = torch.optim.Adam([logits], betas=(0.9, 0.9), eps=1e-30)
    places, ones = torch.arange(N), torch.ones(N, dtype=torch.float64)
    reference = FrozenView(torch.tensor(np.log(REFERENCE)).expand(N, -1), torch.nn.Identity())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / STEPS) ** 3 + 1e-4
        log_p = logits.log_softmax(0)
        credit = own.weigh(BATCH, Measured(log_p.detach().numpy()))
        advantages = torch.from_numpy(credit.advantages)
        rows = Rows(advantages, ones, places, torch.full((N,), -np.log(N), dtype=torch.float64), None, LOG_REFERENCE)
        entropy = -(log_p.exp() * log_p).sum().expand(N) if own.needs_entropy else None
        term = None
        if own.vocabulary is not None:  # one state: what the term says of it stands for every row
            piece = vocabulary_piece(own.vocabulary, places, advantages, None, {"reference": reference}, 1.0)
            term = piece(logits[None], 0, 1).expand(N)
        optimizer.zero_grad()
        own.loss(rows, Outputs(log_p, entropy, None, term), credit).loss.backward()
        optimizer.step()
    return logits.detach().softmax(0).numpy()


LOG_REFERENCE = torch.tensor(np.log(REFERENCE))


def divergence(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ (np.log(one) - np.log(other)))


@pytest.mark.parametrize(
    ("arm", "temperature"),
    [("kl", 0.2), ("kl", 0.5), ("kl", 1.0), ("kl_k2", 0.5), ("kl_k3_weighted", 0.5), ("kl_exact", 0.5)]
    + [("entropy_sequence_sum", t) for t in (0.2, 0.5, 2.0)]
    + [("entropy_sequence_mean", 0.5), ("entropy_token", 0.5)],
)
def test_training_reaches_the_closed_form_optimum_of_the_arm(arm: str, temperature: float) -> None:
    policy, family = trained(arm, temperature), arm.split("_")[0]
    assert divergence(policy, optimum(family, temperature)) < 1e-3
    found = (policy @ PROXY, policy @ GOLD, divergence(policy, REFERENCE), -policy @ np.log(policy), policy[4])
    assert found == pytest.approx(OPTIMA[family, temperature], abs=0.03)


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
