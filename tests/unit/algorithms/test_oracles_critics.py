"""Critics, entropy advantages and controllers (SAFE, EAPO) against the numbers of the algorithm reference."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from keel.algorithms import advantages, coefficients, critics
from keel.algorithms.coefficients import Observation, Safe
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config.regularizer import ControllerSettings
from tabular import objective, rollout


@pytest.mark.parametrize(
    ("heads", "expected"), [([1.0, 1.0], 1.0), ([1.0, 0.0], 0.1974284293), ([0.2, 0.8], 0.3698657509)]
)
def test_soft_minimum(heads: list[float], expected: float) -> None:
    """P4 softmin: temperature .3."""
    result = critics.soft_min(torch.tensor(heads, dtype=torch.float64), 0.3).item()
    assert result == pytest.approx(expected, abs=1e-9)
    assert min(heads) <= result <= min(np.mean(heads), min(heads) + 0.3 * np.log(2)) + 1e-12


def test_weight_of_the_larger_head() -> None:
    """P4 softmin: V1 = 1 has the weight .0344451957 beside V2 = 0."""
    heads = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    (weights,) = torch.autograd.grad(critics.soft_min(heads, 0.3), heads)
    assert weights.tolist() == pytest.approx([0.0344451957, 1 - 0.0344451957], abs=1e-9)
    assert critics.soft_min(heads, 1e-3).item() == pytest.approx(0.0, abs=1e-3)
    assert critics.soft_min(heads, 1e4).item() == pytest.approx(0.5, abs=1e-4)


def test_value_loss() -> None:
    """P4 value loss: V .9, V_old .5, target 1.6: Huber .225 plain, .325 clipped, mean .275."""
    numbers = (torch.tensor([x], dtype=torch.float64) for x in (0.9, 0.5, 1.6))
    value, old, target = numbers
    result = [
        critics.value_loss(value, old, target, "huber", clip, form) for clip, form in ((0.2, "mean"), (0.2, "max"))
    ]
    assert [x.item() for x in result] == pytest.approx([0.275, 0.325], abs=1e-12)
    assert critics.value_loss(value, old, target, "huber", None, "max").item() == pytest.approx(0.225, abs=1e-12)
    assert critics.value_loss(value, old, target, "mse", 0.2, "max").item() == pytest.approx(0.5 * 0.9**2, abs=1e-12)


TRACE = [
    # KL and entropy per token, reward -> kl, PID, tau, gate, penalty
    ((0.5, 3.0, 0.5), (0.05, 0.0, 0.45, 1.0, 0.0)),
    ((2.0, 3.0, 0.6), (0.245, 0.00144, 0.45216, 1.0, 0.0)),
    ((4.0, 1.5, 0.7), (0.6205, 0.00299, 0.454485, 1.25, 0.0034451225)),
    ((6.0, 1.0, 0.4), (1.15845, -0.0027355, 0.44589675, 1.8181818182, 0.0923149335)),
    ((6.0, 0.5, 0.3), (1.642605, -0.003725225, 0.4444121625, 3.3333333333, 0.4785553586)),
]


def test_safe_controller() -> None:
    """P4 controller trace from zero, s = .1; the coefficient is the derivative of the penalty by the KL."""
    subject = Safe(ControllerSettings(kind="safe"), 0.1, 1.0)
    assert subject.value == 0.0
    for (kl, entropy, reward), (smooth, pid, threshold, gate, penalty) in TRACE:
        subject.update(Observation(0.0, 4, kl, entropy, reward))
        assert subject.memory["kl"] == pytest.approx(smooth, abs=1e-9)
        assert subject.seen["threshold_nats"] == pytest.approx(threshold, abs=1e-9)
        assert subject.seen["threshold_nats"] / 1.5 - 0.3 == pytest.approx(pid, abs=1e-9)
        assert subject.seen["gate"] == pytest.approx(gate, abs=1e-9)
        assert subject.seen["penalty"] == pytest.approx(penalty, abs=1e-9)
        assert subject.value == pytest.approx(0.2 * max(0.0, smooth - threshold) * gate, abs=1e-9)
    resumed = Safe(ControllerSettings(kind="safe"), 0.1, 1.0)
    resumed.restore(subject.state())
    for item in (subject, resumed):
        item.update(Observation(0.0, 4, 1.0, 1.0, 0.2))
    assert (resumed.value, resumed.memory, resumed.seen) == (subject.value, subject.memory, subject.seen)


@pytest.mark.parametrize(
    ("rewards", "phase"),
    [
        ([0.5] * 49, 1.5),
        ([0.5] * 60, 0.8),
        ([0.5] * 49 + [0.8, 1.0] * 25, 0.8),  # 99: the window before is not whole yet
        ([0.5] * 50 + [0.8, 1.0] * 25, 1.2),
        ([0.8] * 60, 1.0),
        ([0.7, 0.9] * 40, 0.8),
        ([0.9] * 50 + [0.5] * 50, 0.8),
    ],
)
def test_phases_of_the_safe_threshold(rewards: list[float], phase: float) -> None:
    """The threshold .3 + PID times 1.5 warming up, 1.2 climbing, 1 converged, .8 on a plateau."""
    subject = Safe(ControllerSettings(kind="safe"), 0.1, 1.0)
    for reward in rewards:
        subject.update(Observation(0.0, 4, 0.0, 1.0, reward))
    assert subject.seen["threshold_nats"] / phase == pytest.approx(0.3, abs=0.02)


def test_a_target_that_is_a_share_of_the_start_is_that_number_from_the_second_step_on() -> None:
    """Start 4 nats, share 0.75: target 3, factor exp(0.1 (1 - nats / 3)); the first step, or one of 0 nats, moves nothing."""
    settings = ControllerSettings(kind="dual", target_share_of_start=0.75)
    subject = coefficients.coefficient(settings, 0.4, -1.0)
    for nats, value in ((0.0, 0.4), (4.0, 0.4), (1.5, 0.4 * math.exp(0.05)), (6.0, 0.4 * math.exp(-0.05))):
        subject.update(Observation(nats, 64, 0.0, 0.0, 0.0))
        assert subject.value == pytest.approx(value, abs=1e-12)
    resumed = coefficients.coefficient(settings, 0.4, -1.0)
    resumed.restore(json.loads(json.dumps(subject.state())))
    for controller in (subject, resumed):
        controller.update(Observation(2.0, 64, 0.0, 0.0, 0.0))
    assert resumed.value == subject.value
    old = coefficients.coefficient(ControllerSettings(kind="dual", target_nats=3.0), 0.4, -1.0)
    old.restore({"value": 0.7})  # as earlier versions wrote it
    old.update(Observation(3.0, 64, 0.0, 0.0, 0.0))
    assert old.value == 0.7


def test_dual_and_proportional_controllers() -> None:
    """Dual: factor exp(rate (nats / target - 1)), for entropy the other way; Ziegler: clipped at .2, n / horizon."""
    seen = Observation(6.0, 500, 0.0, 0.0, 0.0)
    for sign, expected in ((1.0, np.exp(0.1)), (-1.0, np.exp(-0.1))):
        subject = coefficients.coefficient(ControllerSettings(kind="dual", target_nats=3.0), 0.4, sign)
        subject.update(seen)
        assert subject.value == pytest.approx(0.4 * expected, abs=1e-12)
    subject = coefficients.coefficient(ControllerSettings(kind="proportional", target_nats=3.0), 0.4, 1.0)
    subject.update(seen)
    assert subject.value == pytest.approx(0.4 * (1 + 0.2 * 500 / 10_000), abs=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("nats", [-1e9, -40.0, 0.0, 2.9, 3.0, 3.1, 40.0, 1e9])
@pytest.mark.parametrize("rate", [0.1, 5.0])
def test_the_dual_controller_is_bounded_alike_in_both_directions(nats: float, sign: float, rate: float) -> None:
    """A factor e at most, up as down, for a budget as for a floor; what one step does the opposite one undoes."""
    settings = ControllerSettings(kind="dual", target_nats=3.0, rate=rate, minimum=1e-30, maximum=1e30)

    def factor(seen: float, direction: float) -> float:
        controller = coefficients.coefficient(settings, 0.4, direction)
        controller.update(Observation(seen, 500, 0.0, 0.0, 0.0))
        return float(controller.value / 0.4)

    expected = np.exp(sign * np.clip(rate * (nats / 3 - 1), -1, 1))
    assert factor(nats, sign) == pytest.approx(expected, rel=1e-12)
    assert np.exp(-1) - 1e-12 <= factor(nats, sign) <= np.exp(1) + 1e-12
    assert factor(nats, sign) * factor(nats, -sign) == pytest.approx(1.0, rel=1e-12)
    assert factor(nats, sign) * factor(6.0 - nats, sign) == pytest.approx(1.0, rel=1e-9)  # as far on the other side


@pytest.mark.parametrize("completions", [1, 500, 10_000, 10**6])
def test_zieglers_controller_moves_by_a_fifth_at_most(completions: int) -> None:
    """Also when a step has more completions than the horizon, which would turn the coefficient's sign."""
    for nats, step in ((1e9, 0.2), (-1e9, -0.2), (3.3, 0.1)):
        controller = coefficients.coefficient(ControllerSettings(kind="proportional", target_nats=3.0), 0.4, 1.0)
        controller.update(Observation(nats, completions, 0.0, 0.0, 0.0))
        assert controller.value == pytest.approx(0.4 * (1 + step * min(1.0, completions / 10_000)), rel=1e-9)


def safe_after(updates: int) -> Objective:
    """k2 in the loss under SAFE's controller after a number of steps with 2 nats of KL and 1 of entropy per token."""
    controlled = {"coefficient": 0.1, "placement": "loss", "estimator": "k2", "controller": {"kind": "safe"}}
    subject = objective(regularizer={"kl": controlled}, objective={"correction": "none"})
    batch = rollout([[-1.0, -1.0], [-1.0, -1.0]], [0.5, 0.5], reference=[[-3.0, -3.0], [-3.0, -3.0]])
    for _ in range(updates):
        subject.adapt(batch)
    return subject


def step(subject: Objective, penalty: float = 0.0) -> tuple[float, list[float]]:
    """Loss plus penalty and gradient at x = log pi - log ref = [2, -1]; A = 0, so nothing but the KL pulls."""
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    rows = Rows(
        advantages=torch.zeros(2, dtype=torch.float64),
        lengths=torch.tensor([2.0], dtype=torch.float64),
        row_of_item=torch.zeros(2, dtype=torch.int64),
        sampler=torch.tensor([-1.0, -2.0], dtype=torch.float64),
        reference=torch.tensor([-3.0, -1.0], dtype=torch.float64),
    )
    loss = subject.loss(rows, Outputs(logprobs), Credit(np.zeros(2), 1, 2)).loss + penalty
    return loss.item(), torch.autograd.grad(loss, logprobs)[0].tolist()


def test_safe_penalty_as_a_number_has_no_gradient_and_the_coefficient_has() -> None:
    """The released code adds the penalty itself, a Python number: the loss moves, the gradient does not."""
    idle, acting = safe_after(0), safe_after(4)
    assert step(idle) == (0.0, [0.0, 0.0])
    penalty = acting.coefficients()["safe_penalty"]
    # kl = 2 (1 - .9^4) = .6878; the reward does not move: e = -.001 three times, I = -.003
    excess, gate = 0.6878 - (0.3 + 0.3 * -0.001 + 0.01 * -0.003) * 1.5, 2.0 / 1.1
    assert penalty == pytest.approx(0.1 * excess**2 * gate, abs=1e-12)
    assert step(idle, penalty) == (penalty, [0.0, 0.0])
    value = 0.2 * excess * gate
    assert acting.coefficients()["kl_coefficient"] == pytest.approx(value, abs=1e-12)
    loss, gradient = step(acting)
    assert loss == pytest.approx(value * (2.0 + 0.5), abs=1e-12)
    assert gradient == pytest.approx([2 * value, -value], abs=1e-12)


EAPO_BATCH = rollout([[-0.5, -1.2, -0.3]], [1.0])
EAPO_VALUES = np.array([[0.2, 1.5], [0.4, 1.0], [0.7, 0.4]])
EAPO: dict[str, Any] = {"advantage": "gae", "discount": 0.99, "gae_lambda": 0.95, "critic": {}}


def eapo(trace: float, **more: Any) -> Credit:
    subject = objective(objective={**EAPO, "entropy_advantage": {"coefficient": 0.02, "gae_lambda": trace}, **more})
    return subject.weigh(EAPO_BATCH, Measured(values=EAPO_VALUES))


def test_entropy_advantage() -> None:
    """P5_eapo: lambda_H 0 is a value like any other, not the other advantage's trace."""
    surprise, entropy_values, lengths = np.array([0.5, 1.2, 0.3]), EAPO_VALUES[:, 1], np.array([3])
    plain = objective(objective={**EAPO, "whiten": "none"}).weigh(EAPO_BATCH, Measured(values=EAPO_VALUES[:, :1]))
    assert plain.advantages == pytest.approx([0.736928575, 0.57515, 0.3], abs=1e-9)
    for trace, expected in ((0.0, [-0.1, 0.56, -0.1]), (0.95, [0.3056975, 0.4745, -0.1])):
        result = advantages.gae(surprise, entropy_values, lengths, 0.9, trace)
        assert result == pytest.approx(expected, abs=1e-9)
        whole = eapo(trace, whiten="none")
        assert whole.advantages == pytest.approx(plain.advantages + 0.02 * np.array(expected), abs=1e-9)
    result = eapo(0.0, whiten="none")
    assert result.advantages == pytest.approx([0.734928575, 0.58635, 0.298], abs=1e-9)
    assert result.targets is not None
    assert result.targets[:, 1] == pytest.approx([1.4, 1.56, 0.3], abs=1e-9)
    assert result.targets[:, 0] == pytest.approx([0.936928575, 0.97515, 1.0], abs=1e-9)
    whitened = eapo(0.0).advantages  # the oracle adds 1e-8 to the deviation, 4e-8 here
    assert whitened == pytest.approx([0.8785103734, 0.2097167332, -1.0882271066], abs=1e-7)


def test_entropy_advantage_without_a_critic() -> None:
    """Surprise to come [2, 2 | 3] minus the prompt's mean at that place [2.5, 2]; another prompt has its own."""
    batch = rollout([[-1.0, -2.0], [-5.0], [-3.0]], [1.0, 7.0, 0.0], tickets=[4, 1, 4])
    config = {"critic": False, "discount": 0.5, "coefficient": 0.1}
    result = objective(objective={"entropy_advantage": config}).weigh(batch, Measured()).advantages
    assert result == pytest.approx([1.0 - 0.05, 1.0, 0.0, -1.0 + 0.05], abs=1e-12)


def test_each_head_has_its_coefficient() -> None:
    """Both heads miss by 2 at one token of two: .1 * 2 / 2 for the value, three times that for the entropy."""
    config = {"advantage": "gae", "critic": {"entropy_coefficient": 3.0, "clip": None}, "entropy_advantage": {}}
    ones = torch.ones(2, dtype=torch.float64)
    targets = torch.tensor([[1.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    rows = Rows(ones, ones, torch.arange(2), -ones, targets=targets, old_values=torch.ones_like(targets))
    credit = Credit(np.ones(2), 2, 2, targets=targets.numpy())
    sums = objective(objective=config).loss(rows, Outputs(-ones, values=torch.ones_like(targets)), credit).sums
    assert sums["critic_loss/value"] == pytest.approx(0.1, abs=1e-12)
    assert sums["critic_loss/entropy"] == pytest.approx(0.3, abs=1e-12)


def test_equal_discounts_make_one_advantage() -> None:
    """A^V + tau A^H is GAE of r - tau log pi under V + tau V_H where discount and trace agree."""
    draw = np.random.default_rng(0)
    lengths = np.array([3, 1, 4])
    rewards, surprise, value, entropy_value = draw.normal(size=(4, 8))
    parts = [advantages.gae(r, v, lengths, 0.97, 0.9) for r, v in ((rewards, value), (surprise, entropy_value))]
    whole = advantages.gae(rewards + 0.3 * surprise, value + 0.3 * entropy_value, lengths, 0.97, 0.9)
    assert parts[0] + 0.3 * parts[1] == pytest.approx(whole, abs=1e-12)
    assert advantages.gae(rewards, value, lengths, 0.97, 0.8) != pytest.approx(parts[0], abs=1e-3)


def test_popart() -> None:
    """P5_popart: w 2, b .5, mu 1, nu 5, rate .03, targets [3, 5, 10]; the output at x = .7 stays 4.8."""
    art = critics.PopArt(mean=1.0, square=5.0, scale=2.0, shift=0.5)
    assert art.value(np.array([0.7]))[0] == pytest.approx(4.8, abs=1e-12)
    art.update(np.array([3.0, 5.0, 10.0]), 0.03)
    assert (art.mean, art.square) == (pytest.approx(1.15, abs=1e-12), pytest.approx(6.19, abs=1e-12))
    assert art.deviation == pytest.approx(np.sqrt(6.19 - 1.15**2), abs=1e-12)
    oracle = pytest.approx([2.2062411496, 1.8130384345, 0.3852706673], abs=5e-9)  # which adds 1e-8 to the variance
    assert [art.deviation, art.scale, art.shift] == oracle
    assert art.value(np.array([0.7]))[0] == pytest.approx(4.8, abs=1e-12)


def test_popart_in_the_objective() -> None:
    """Targets and old values are in the unit after the update, and the loss reads the head on that scale."""
    subject = objective(objective={"advantage": "value_baseline", "critic": {"popart": True, "clip": None}})
    batch = rollout([[-1.0]] * 3, [3.0, 5.0, 10.0])
    subject.popart["value"] = critics.PopArt(mean=1.0, square=5.0, scale=2.0, shift=0.5)  # type: ignore[attr-defined]
    credit = subject.weigh(batch, Measured(values=np.full((3, 1), 0.7)))
    assert credit.targets is not None and credit.old_values is not None
    deviation = np.sqrt(6.19 - 1.15**2)
    assert credit.targets[:, 0] == pytest.approx((np.array([3, 5, 10]) - 1.15) / deviation, abs=1e-12)
    assert credit.old_values[:, 0] == pytest.approx([(4.8 - 1.15) / deviation] * 3, abs=1e-12)
    raw = torch.full((3, 1), 0.7, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(3, dtype=torch.float64)
    columns = {"targets": torch.from_numpy(credit.targets), "old_values": torch.from_numpy(credit.old_values)}
    rows = Rows(ones, ones, torch.arange(3), -ones, **columns)
    terms = subject.loss(rows, Outputs(-ones, values=raw), credit)
    error = np.array([4.8 - 3, 4.8 - 5, 4.8 - 10]) / deviation
    assert terms.sums["critic_loss/value"] == pytest.approx(0.1 * 0.5 * np.mean(error**2), abs=1e-12)
    (gradient,) = torch.autograd.grad(terms.loss, raw)
    assert gradient[:, 0].tolist() == pytest.approx(0.1 * error * 4 / deviation / 3, abs=1e-12)


def test_rewards_are_normalized_by_all_so_far() -> None:
    """SAFE: running mean and deviation over both steps, the second step's own rewards included."""
    subject = objective(objective={"advantage": "none", "normalize_reward": True})
    steps = [[1.0, 3.0], [10.0, 12.0, 20.0]]
    for upto in (1, 2):
        seen = np.concatenate(steps[:upto])
        batch = rollout([[-1.0]] * len(steps[upto - 1]), steps[upto - 1])
        expected = (np.array(steps[upto - 1]) - seen.mean()) / seen.std()
        assert subject.weigh(batch, Measured()).advantages == pytest.approx(
            expected, abs=2e-4
        )  # starts from 1e-4 rewards
