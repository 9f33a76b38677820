"""The entropy among the likeliest tokens (AEnt, 2509.03493), its gradient and its coefficient, by brute force.

Brute force: sort the probabilities, keep the first so many, divide by their sum, add up -q log q, in plain Python.
"""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keel.algorithms import coefficients
from keel.algorithms.coefficients import Observation
from keel.algorithms.objective import Objective
from keel.algorithms.regularizers import ClampedEntropy
from keel.algorithms.types import Credit, Outputs, Rows
from keel.config.regularizer import ControllerSettings
from keel.learner import loading, tiny
from keel.learner.frozen_models import chunk_term_of
from keel.learner.networks import Policy, TokenLogprobs
from tabular import objective, rollout

LOGITS = torch.from_numpy(np.random.default_rng(5).normal(0, 2, (6, 10)))


def clamped(logits: Tensor, share: float) -> Tensor:
    places = torch.zeros(len(logits), dtype=torch.long)
    return ClampedEntropy(share)(logits, places, places.double(), {})


def brute_force(logits: list[float], kept: int) -> float:
    likeliest = sorted((math.exp(z) for z in logits), reverse=True)[:kept]
    shares = [weight / sum(likeliest) for weight in likeliest]
    return -sum(q * math.log(q) for q in shares)


@pytest.mark.parametrize(("share", "kept"), [(0.1, 1), (0.2, 2), (0.25, 3), (0.6, 6), (0.7, 7), (0.8, 8), (1.0, 10)])
def test_the_entropy_is_that_of_the_likeliest_tokens_alone(share: float, kept: int) -> None:
    expected = [brute_force(row, kept) for row in LOGITS.tolist()]
    assert clamped(LOGITS, share).tolist() == pytest.approx(expected, abs=1e-12)
    assert brute_force(LOGITS[0].tolist(), max(kept - 1, 1)) != pytest.approx(expected[0], abs=1e-4) or kept == 1


def test_two_of_three_tokens_are_a_coin() -> None:
    """Logits .2, -.5, 1: the first and the last remain, with odds exp(.8)."""
    p = 1 / (1 + math.exp(-0.8))
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert clamped(torch.tensor([[0.2, -0.5, 1.0]], dtype=torch.float64), 2 / 3).item() == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("percent", [20, 30, 40])
def test_as_many_tokens_are_dropped_as_in_the_published_code(percent: int) -> None:
    """floor(V p) of them; entropy of equal logits in descending order of tokens is log of what is left."""
    for size in (5, 7, 10, 49, 50, 152, 320):
        logits = torch.zeros(1, size).double() - 1e-9 * torch.arange(size)
        left = size - size * percent // 100
        assert clamped(logits, 1 - percent / 100).item() == pytest.approx(math.log(left), abs=1e-6)


def test_a_share_keeps_as_many_tokens_as_it_says() -> None:
    """0.07 * 100 is 7.000000000000001 in floating point, and 7 tokens."""
    assert clamped(-1e-9 * torch.arange(100.0).double()[None], 0.07).item() == pytest.approx(math.log(7), abs=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_the_gradient_is_that_of_finite_differences_and_none_reaches_the_tail(share: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(clamped(logits, share).sum(), logits)
    for row, token in np.ndindex(6, 10):
        step = torch.zeros(6, 10).double()
        step[row, token] = 1e-6
        slope = (clamped(LOGITS + step, share) - clamped(LOGITS - step, share)).sum().item() / 2e-6
        assert gradient[row, token].item() == pytest.approx(slope, abs=1e-8)
    tail = LOGITS.argsort(-1)[:, : 10 - math.ceil(share * 10)]
    assert (gradient.gather(-1, tail) == 0).all() and tail.numel() == 6 * (10 - round(10 * share))


def test_with_all_tokens_it_is_the_plain_entropy() -> None:
    targets = torch.zeros(6, dtype=torch.long)
    first, second = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    plain = TokenLogprobs.apply(first, targets, 1.0)[1]
    (wanted,) = torch.autograd.grad(plain.sum(), first)
    (gradient,) = torch.autograd.grad(clamped(second, 1.0).sum(), second)
    assert torch.allclose(clamped(LOGITS, 1.0), plain) and torch.allclose(gradient, wanted, atol=1e-12)


def test_equal_logits_at_the_border_all_stay() -> None:
    """Of 2, 1, 1, 0 a half would be two tokens, but the second ties with the third: whatever their order, three."""
    expected = brute_force([2.0, 1.0, 1.0], 3)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        assert clamped(torch.tensor([[2.0, 1.0, 1.0, 0.0]])[:, order], 0.5).item() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return loading.load_policy(tiny.write(tmp_path_factory.mktemp("clamped") / "tiny"), "float32")


@pytest.mark.parametrize("pieces", [1, 3, 11])
def test_the_head_in_pieces_gives_the_same_value_and_gradient(policy: Policy, pieces: int) -> None:
    """Eleven pieces of ten tokens: one of them is empty."""
    states = torch.randn(10, policy.head.weight.shape[1], generator=torch.Generator().manual_seed(2))
    targets = torch.arange(10)
    weights = torch.linspace(-1.0, 1.0, 10)

    leaf = states.clone().requires_grad_()
    term = chunk_term_of(ClampedEntropy(0.3), targets, torch.zeros(10), None, {}, 0.7)
    policy.kept_chunks = 1
    values = policy.read(leaf, targets, 0.7, pieces, False, term)[2]
    assert values is not None
    (gradient,) = torch.autograd.grad(values @ weights, leaf)

    whole = states.clone().requires_grad_()
    logits = policy.logits(whole) / 0.7
    size = logits.shape[-1]
    likeliest = logits.topk(math.ceil(0.3 * size), dim=-1).values.softmax(-1)
    plain = -(likeliest * likeliest.log()).sum(-1)
    (wanted,) = torch.autograd.grad(plain @ weights, whole)
    assert torch.allclose(values, plain, atol=1e-5) and torch.allclose(gradient, wanted, atol=1e-6)
    assert wanted.abs().max() > 1e-4


def bonus(controller: dict[str, Any] | None = None, ratio: float = 0.0, **more: Any) -> Objective:
    settings = {"form": "token_bonus", "coefficient": 0.2, "top_share": 0.6, "controller": controller or {}, **more}
    return objective(
        objective={"kind": "preference", "loss": "dpo"} if ratio else {"correction": "none"},
        sampling={"stored_ratio": ratio, "samples_per_prompt": 2},
        regularizer={"kl": {"coefficient": 0.0}, "entropy": settings},
    )


def test_the_loss_pays_the_mean_over_the_steps_tokens_and_tells_it() -> None:
    """Mean of .5, 1, 3 over the six tokens of the step, of which this micro-batch holds three."""
    subject = bonus()
    rows = Rows(torch.zeros(3), torch.tensor([2.0, 1.0]), torch.tensor([0, 0, 1]), torch.zeros(3))
    entropies = torch.tensor([0.5, 1.0, 3.0], requires_grad=True)
    result = subject.loss(rows, Outputs(torch.zeros(3), vocabulary=entropies), Credit(np.zeros(6), 2, 6))
    assert result.loss.item() == pytest.approx(-0.2 * 4.5 / 6) == pytest.approx(result.sums["entropy_loss"])
    assert result.sums["clamped_policy_entropy_nats"] == pytest.approx(4.5 / 6)
    assert torch.autograd.grad(result.loss, entropies)[0].tolist() == pytest.approx([-0.2 / 6] * 3)
    assert "policy_entropy_nats" not in result.sums
    assert subject.needs_vocabulary and not subject.needs_entropy and bonus(monitor=True).needs_entropy


def test_beside_stored_completions_the_entropy_told_is_that_of_the_sampled_ones() -> None:
    rows = Rows(
        torch.zeros(3), torch.tensor([2.0, 1.0]), torch.tensor([0, 0, 1]), torch.zeros(3),
        reference=torch.zeros(3), stored=torch.tensor([False, True]),
    )  # fmt: skip
    outputs = Outputs(torch.zeros(3), vocabulary=torch.tensor([0.5, 1.0, 3.0]))
    sums = bonus(ratio=0.5).loss(rows, outputs, Credit(np.zeros(3), 2, 3, num_sampled_tokens=2)).sums
    assert sums["clamped_policy_entropy_nats"] == pytest.approx(0.75)
    assert sums["clamped_teacher_forced_entropy_nats"] == pytest.approx(3.0)


def test_without_a_coefficient_or_with_all_tokens_nothing_is_clamped() -> None:
    assert bonus(coefficient=0.0).vocabulary is None and bonus(top_share=1.0).vocabulary is None
    assert bonus(top_share=1.0).needs_entropy and not bonus(coefficient=0.0).needs_entropy


# ---- its coefficient

BAND = {"kind": "band", "low_nats": 0.1, "high_nats": 0.5, "rate": 0.02, "minimum": 0.195, "maximum": 0.203}


@pytest.mark.parametrize(
    ("nats", "value"),
    [(0.0, 0.202), (0.1, 0.2), (0.3, 0.2), (0.5, 0.2), (0.6, 0.198), (2.0, 0.195), (0.05, 0.201)],
)
def test_the_coefficient_moves_by_what_lies_outside_the_band(nats: float, value: float) -> None:
    """0.2 - 0.02 (min(0, nats - .1) + max(0, nats - .5)), and never below the minimum."""
    subject = coefficients.coefficient(ControllerSettings(**BAND), 0.2, -1.0)
    subject.update(Observation(nats, 8, 0.0, 9.0, 0.0))
    assert subject.value == pytest.approx(value, abs=1e-12)
    for _ in range(5):
        subject.update(Observation(0.0, 8, 0.0, 9.0, 0.0))
    assert subject.value == pytest.approx(0.203, abs=1e-12)


@pytest.mark.parametrize(
    ("controller", "expected"),
    [
        (BAND, 0.2 - 0.02 * (0.6 - 0.5)),
        ({"kind": "dual", "target_nats": 0.5, "rate": 0.1}, 0.2 * math.exp(-0.1 * (0.6 / 0.5 - 1))),
    ],
)
def test_controllers_follow_the_clamped_entropy_of_the_step_not_the_sampled_one(
    controller: dict[str, Any], expected: float
) -> None:
    """The sampled estimate of the batch is 1.5 nats a token."""
    subject, resumed = bonus(controller), bonus(controller)
    batch = rollout([[-1.0, -2.0], [-1.5]], [0.5, 0.25])
    subject.adapt(batch, {"clamped_policy_entropy_nats": 0.6})
    assert subject.coefficients()["entropy_coefficient"] == pytest.approx(expected, abs=1e-12)
    resumed.restore(json.loads(json.dumps(subject.state())))
    for one in (subject, resumed):
        one.adapt(batch, {"clamped_policy_entropy_nats": 0.05})
    assert subject.coefficients() == resumed.coefficients() != bonus(controller).coefficients()
