"""Where two numbers may differ they differ here, and every cap is reached: clips, caps, columns, stages."""

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel.algorithms import coefficients, registry, regularizers
from keel.algorithms.coefficients import Observation
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config import loader
from keel.config.regularizer import ControllerSettings
from tabular import objective, rollout

RATIOS = [0.5, 0.75, 0.85, 0.95, 1.0, 1.05, 1.15, 1.25, 1.5]
BOUNDS = [(0.1, 0.3), (0.3, 0.1), (0.2, None), (None, 0.2), (0.2, 0.2)]


def clipped_loss(ratio: float, advantage: float, low: float | None, high: float | None) -> tuple[float, float]:
    """PPO's term and its slope by log pi, as the paper has it: -min(rho A, clip(rho, 1 - low, 1 + high) A)."""
    bounded = max(ratio, 1 - low) if low is not None else ratio
    bounded = min(bounded, 1 + high) if high is not None else bounded
    flat = bounded * advantage < ratio * advantage
    return -min(ratio * advantage, bounded * advantage), 0.0 if flat else -ratio * advantage


def rows_of(lengths: list[int], advantages: list[float], **more: Any) -> Rows:
    counts = torch.tensor(lengths)
    return Rows(
        advantages=torch.repeat_interleave(torch.tensor(advantages, dtype=torch.float64), counts),
        lengths=counts.double(),
        row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), counts),
        **{"sampler": torch.zeros(sum(lengths), dtype=torch.float64), **more},
    )


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_the_lower_and_the_upper_clip_are_two_numbers(level: str, low: float | None, high: float | None) -> None:
    """Ratios on both sides of both bounds, advantages of both signs, completions of two tokens above token level."""
    tokens = 1 if level == "token" else 2
    cases = list(itertools.product(RATIOS, [1.0, -2.0]))
    config = {"level": level, "correction": "none", "clip_low": low, "clip_high": high}
    subject = objective(objective=config)
    lengths = [tokens] * len(cases)
    share = 1.0 if level == "sequence_mean" else 1 / tokens  # of the log-ratio, in each token
    new = torch.tensor([math.log(ratio) * share for ratio, _ in cases for _ in range(tokens)], dtype=torch.float64)
    new.requires_grad_()
    made = rows_of(lengths, [advantage for _, advantage in cases], old=torch.zeros(len(new), dtype=torch.float64))
    terms = subject.loss(made, Outputs(new), Credit(np.zeros(len(new)), len(cases), len(new)))
    expected = [clipped_loss(ratio, advantage, low, high) for ratio, advantage in cases]
    assert terms.loss.item() == pytest.approx(sum(loss for loss, _ in expected) / len(cases), abs=1e-12)
    (gradient,) = torch.autograd.grad(terms.loss, new)
    within = 1 / tokens if level == "sequence_mean" else 1.0
    slopes = [within * slope / len(cases) for _, slope in expected for _ in range(tokens)]
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-12)
    outside = sum(slope == 0 for _, slope in expected)
    assert terms.sums["clip_ratio"] == pytest.approx(outside / len(cases)) and outside > 0


SAMPLER = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
CURRENT = SAMPLER + torch.tensor([-1.0, 0.2, 0.5, 1.5], dtype=torch.float64)  # pi / mu from .37 to 4.5
REFERENCE = SAMPLER + torch.tensor([0.4, -0.3, 1.0, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("cap", [1.1, 1.5, 3.0, 10.0])
def test_the_weight_of_a_stale_kl_is_capped_and_detached_but_for_k3(cap: float) -> None:
    ratio, x = (CURRENT - SAMPLER).exp(), CURRENT - REFERENCE
    values = {"k2": x.square() / 2, "k3": (-x).exp() - 1 + x, "k3_k2": (-x).exp() - 1 + x}
    slopes = {"k2": x, "k3_k2": x}
    for estimator, value in values.items():
        subject = CURRENT.clone().requires_grad_()
        result = regularizers.weighted_kl(estimator, subject, REFERENCE, SAMPLER, cap)
        (gradient,) = torch.autograd.grad(result.sum(), subject)
        weight = ratio if estimator == "k3" else ratio.clamp(max=cap)
        assert result.tolist() == pytest.approx((weight * value).tolist(), abs=1e-12)
        # of k3 the weight is differentiated, too: r (k3 + 1 - e^-x) = r x
        slope = ratio * (value + 1 - (-x).exp()) if estimator == "k3" else weight * slopes[estimator]
        assert gradient.tolist() == pytest.approx(slope.tolist(), abs=1e-12)


def kl_loss_of(subject: Objective) -> float:
    made = rows_of([1, 1, 1, 1], [0.0] * 4, sampler=SAMPLER, reference=REFERENCE)
    return subject.loss(made, Outputs(CURRENT), Credit(np.zeros(4), 4, 4)).sums["kl_loss_nats"]


@pytest.mark.parametrize(
    ("config", "cap"),
    [
        ({"correction_cap": 1.3}, 1.3),
        ({"correction_cap": 4.0}, 4.0),
        ({}, 2.0),
        ({"kind": "preference", "loss": "simpo"}, 2.0),
        ({"kind": "weighted_likelihood"}, 2.0),
    ],
)
def test_the_cap_of_the_kl_weight_is_the_objectives_where_it_has_one(config: dict[str, Any], cap: float) -> None:
    kl = {"coefficient": 0.5, "placement": "loss", "estimator": "k2", "importance_weighted": True}
    ratio, x = (CURRENT - SAMPLER).exp(), CURRENT - REFERENCE
    expected = (ratio.clamp(max=cap) * x.square() / 2).mean().item()
    assert kl_loss_of(objective(objective=config, regularizer={"kl": kl})) == pytest.approx(expected, abs=1e-12)


def test_the_weight_of_the_surrogate_is_capped_at_its_own_number() -> None:
    """pi_old / mu = [.5, 1.2, 1.5, 4] at caps below and between; equal to the cap counts as truncated."""
    old = SAMPLER + torch.tensor([0.5, 1.2, 1.5, 4.0], dtype=torch.float64).log()
    for cap, truncated in ((1.0, 3), (1.5, 2), (3.0, 1), (9.0, 0)):
        subject = objective(objective={"correction_cap": cap})
        new = old.clone().requires_grad_()
        terms = subject.loss(
            rows_of([1] * 4, [1.0] * 4, sampler=SAMPLER, old=old), Outputs(new), Credit(np.ones(4), 4, 4)
        )
        expected = np.minimum([0.5, 1.2, 1.5, 4.0], cap)
        assert (-4 * torch.autograd.grad(terms.loss, new)[0]).tolist() == pytest.approx(expected, abs=1e-12)
        assert terms.sums["importance_weight"] == pytest.approx(expected.mean(), abs=1e-12)
        if cap != 1.5:  # exp(log 1.5) may be a bit less than 1.5
            assert terms.sums["truncated_weight_ratio"] == pytest.approx(truncated / 4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exponents_are_clamped_on_both_sides_of_zero(sign: float) -> None:
    result, outside = regularizers.clamp(sign * torch.tensor([0.0, 19.5, 20.0, 20.5, 300.0]))
    assert result.tolist() == [sign * item for item in (0.0, 19.5, 20.0, 20.0, 20.0)] and outside == 2


@pytest.mark.parametrize(
    ("nats", "exponent"), [(3.0, 0.0), (4.5, 0.5), (5.9, 0.9 + 0.2 / 3), (6.0, 1.0), (6.3, 1.0), (90.0, 1.0)]
)
def test_a_dual_step_multiplies_by_e_at_most(nats: float, exponent: float) -> None:
    """rate (nats / target - 1) at rate 1 and a target of 3 nats."""
    subject = coefficients.coefficient(ControllerSettings(kind="dual", target_nats=3.0, rate=1.0), 0.4, 1.0)
    subject.update(Observation(nats, 4, 0.0, 0.0, 0.0))
    assert subject.value == pytest.approx(0.4 * math.exp(exponent), abs=1e-9)


@pytest.mark.parametrize(("nats", "factor"), [(0.0, -0.2), (1.5, -0.2), (2.4, -0.2), (2.7, -0.1), (3.0, 0.0), (3.3, 0.1), (3.6, 0.2), (9.0, 0.2)])  # fmt: skip
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_proportional_step_is_clipped_on_both_sides(nats: float, factor: float, sign: float) -> None:
    """1 + sign clip(nats / target - 1, -.2, .2) n / horizon, n = 50 of a horizon of 100."""
    settings = ControllerSettings(kind="proportional", target_nats=3.0, horizon_completions=100)
    subject = coefficients.coefficient(settings, 0.4, sign)
    subject.update(Observation(nats, 50, 0.0, 0.0, 0.0))
    assert subject.value == pytest.approx(0.4 * (1 + sign * factor / 2), abs=1e-12)


@pytest.mark.parametrize("kind", ["dual", "proportional"])
def test_a_coefficient_stays_between_its_bounds(kind: str) -> None:
    settings = ControllerSettings(kind=kind, target_nats=3.0, horizon_completions=1, minimum=0.3, maximum=0.5)  # type: ignore[arg-type]
    for nats, bound in ((90.0, 0.5), (0.0, 0.3)):
        subject = coefficients.coefficient(settings, 0.4, 1.0)
        for _ in range(20):
            subject.update(Observation(nats, 4, 0.0, 0.0, 0.0))
        assert subject.value == bound


# ---- columns an objective may see

REWARDS = [
    {"name": "a", "source": "m:a"},
    {"name": "b", "source": "m:b", "weight": 2.0},
    {"name": "gold", "source": "m:c", "role": "monitor"},
    {"name": "length", "source": "m:d", "role": "monitor"},
    {"name": "referee", "source": "m:e", "role": "judge"},
]
SUFFIXES = ("", "_mean", "_std", "_worst")


@pytest.mark.parametrize("kind", ["policy_gradient", "preference", "weighted_likelihood", "logits_convexity"])
def test_no_column_of_a_monitor_is_visible_and_all_others_are(kind: str) -> None:
    settings = loader.parse(
        {"policy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": REWARDS, "objective": {"kind": kind}}
    )
    names = [f"reward_{reward['name']}{suffix}" for reward in REWARDS for suffix in SUFFIXES]
    columns = {"ticket": [0], "reward": [1.0], "completion_logprobs": [[-1.0]], **{name: [0.5] for name in names}}
    seen = registry.build(settings).visible(pa.record_batch(columns)).schema.names
    kept = [name for name in names if not name.startswith(("reward_gold", "reward_length"))]
    assert seen == ["ticket", "reward", "completion_logprobs", *kept]


def test_an_objective_may_read_no_column_but_the_contracts_and_its_rewards() -> None:
    rewards = [{"name": "a", "source": "m:a"}, {"name": "a_std", "source": "m:b", "role": "monitor"}]
    settings = loader.parse({"policy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": rewards})
    columns = {"ticket": [0], "reward_a": [1.0], "reward_a_mean": [1.0], "reward_a_std": [0.5], "gold_text": ["x"]}
    seen = registry.build(settings).visible(pa.record_batch(columns)).schema.names
    assert seen == ["ticket", "reward_a", "reward_a_mean"]


# ---- stages of several steps


@pytest.mark.parametrize("stage_steps", [1, 2, 3, 5])
def test_a_stage_of_rejection_sampling_lasts_its_steps(stage_steps: int) -> None:
    """Versions 0 .. n - 1 are the first stage, n .. 2 n - 1 the second, everything later the last."""
    etas = [4.0, 1.0, 0.25]
    config = {"kind": "weighted_likelihood", "weights": "rejection", "rejection_temperatures": etas}
    rewards = np.linspace(-1.0, 1.0, 16)
    batch = rollout([[-1.0]] * 16, rewards.tolist())
    draws = np.array([np.random.default_rng(1000 + row).random() for row in range(16)])
    subject = objective(objective={**config, "stage_steps": stage_steps})
    changes = []
    for version in range(4 * stage_steps):
        stage = min(version // stage_steps, 2)
        sharper = 1 / etas[stage] - (1 / etas[stage - 1] if stage else 0.0)
        kept = draws < np.exp(sharper * (rewards - 1.0))
        result = subject.weigh(batch, Measured(version=version)).advantages
        assert result == pytest.approx(16 * kept / kept.sum(), abs=1e-12), version
        changes.append(int(kept.sum()))
    assert len(set(changes)) == 3  # the stages really differ on these draws
