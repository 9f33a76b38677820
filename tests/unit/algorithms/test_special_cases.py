"""Special cases that must equal the general one: settings at their neutral value, and kinds that coincide."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from keel.algorithms import advantages, reward_ensembles
from keel.algorithms.objective import Objective
from keel.algorithms.preferences import ranking_loss
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from tabular import Table, case, heads, loss, objective, rollout, table, token_kl, weigh

STEP = table()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Handing such small tensors to other threads takes ten times as long as the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}


def trained(subject: Objective, step: Table = STEP) -> tuple[np.ndarray, float, torch.Tensor]:
    """Advantages, loss and gradient by the logits."""
    credit = weigh(subject, step)
    logits = step.logits.clone().requires_grad_()
    terms = loss(subject, step, credit, logits, step.values)
    return credit.advantages, terms.loss.item(), torch.autograd.grad(terms.loss, logits)[0]


def preference(loss_: str, **config: Any) -> dict[str, Any]:
    return {"objective": {"kind": "preference", "loss": loss_, **config}}


def policy_gradient(**config: Any) -> dict[str, Any]:
    return {"objective": config}


@pytest.mark.parametrize(
    ("general", "special"),
    [
        (preference("dpo", label_smoothing=0.0), preference("dpo")),
        (preference("dpo", likelihood_coefficient=0.0, likelihood="average"), preference("dpo")),
        (preference("dpo", target_margin=0.0, pessimism=0.0), preference("dpo")),
        (preference("simpo", exact_length_margin=False), preference("simpo")),
        (preference("dpo", pairs={"length_penalty": 0.0, "min_margin": 0.0}), preference("dpo")),
        (preference("dpo", pairs={"finished_only": True}), preference("dpo")),  # all are
        ({"regularizer": {"entropy": {"form": "sequence_sum", "coefficient": 0.0}}}, {}),
        ({"regularizer": {"entropy": {"form": "sequence_mean_exact", "coefficient": 0.0}}}, {}),
        ({"regularizer": {"entropy": {"form": "sequence_mean_naive", "coefficient": 0.0}}}, {}),
        ({"regularizer": {"entropy": {"form": "token_bonus", "coefficient": 0.0}}}, {}),
        ({"regularizer": {"entropy": {"monitor": True}}}, {}),
        ({"regularizer": {"kl": {"coefficient": 0.0}}}, {}),
        ({"regularizer": token_kl("k2") | {"kl": token_kl("k2")["kl"] | {"coefficient": 0.0}}}, {}),
        (policy_gradient(**CLIP), policy_gradient(clip_low=0.2, clip_high=0.28, correction_cap=2.0)),
        (policy_gradient(advantage="dr_grpo"), policy_gradient(advantage="group_mean")),
        (policy_gradient(advantage="none", discount=0.5), policy_gradient(advantage="none", gae_lambda=0.5)),
    ],
)  # fmt: skip
def test_neutral_settings_change_no_bit(general: dict[str, Any], special: dict[str, Any]) -> None:
    one, two = trained(objective(**general)), trained(objective(**special))
    assert one[0].tobytes() == two[0].tobytes()
    assert one[1] == two[1]
    assert torch.equal(one[2], two[2]) and one[2].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("general", "special"),
    [
        (policy_gradient(advantage="reinforce_pp", whiten="none"), policy_gradient(advantage="none")),
        (policy_gradient(advantage="reinforce_pp_baseline", whiten="none"), policy_gradient(advantage="group_mean")),
        (policy_gradient(clip_low=0.999, clip_high=1e6), policy_gradient()),
        (policy_gradient(correction_cap=1e9), policy_gradient(correction_cap=1e6)),
        (policy_gradient(normalize_reward=False, advantage="grpo"), policy_gradient(advantage="grpo")),
        (
            {"objective": {"kind": "weighted_likelihood", "temperature": 1e-3}},
            {"objective": {"kind": "weighted_likelihood", "weights": "best_of_n"}},
        ),
        *[
            (
                {"objective": {"kind": "weighted_likelihood", "weights": weights, "temperature": 1e9}},
                {"objective": {"kind": "weighted_likelihood", "weights": "uniform"}},
            )
            for weights in ("kl", "chi2", "soft_chi2")
        ],
        (
            {"objective": {"kind": "weighted_likelihood", "weights": "rejection", "rejection_temperatures": [1e9]}},
            {"objective": {"kind": "weighted_likelihood", "weights": "uniform"}},
        ),
        (preference("dpo", beta=1e-6, label_smoothing=0.1), preference("dpo", beta=0.8e-6)),
    ],
)
def test_limits(general: dict[str, Any], special: dict[str, Any]) -> None:
    one, two = trained(objective(**general)), trained(objective(**special))
    scale = np.abs(one[0]).max()
    assert one[0] / scale == pytest.approx(two[0] / scale, abs=1e-5)
    assert (one[2] / scale - two[2] / scale).abs().max() < 1e-5


def test_rloo_is_dr_grpo_but_for_a_factor() -> None:
    """k / (k - 1) with k = 4."""
    one, two = (trained(objective(objective={"advantage": name})) for name in ("rloo", "dr_grpo"))
    assert one[0] == pytest.approx(4 / 3 * two[0], abs=1e-12)
    assert one[2].flatten().tolist() == pytest.approx((4 / 3 * two[2]).flatten().tolist(), abs=1e-12)


def test_generalized_advantages_in_their_limits() -> None:
    """Trace 1: reward to go minus value; trace 0: one step; values 0 and trace 1: REINFORCE++."""
    rewards, values, lengths = np.array([1.0, 2.0, 4.0, -3.0]), np.array([0.5, 0.25, 1.0, 2.0]), np.array([3, 1])
    to_go = np.array([1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4, -3])
    assert advantages.returns(rewards, lengths, 0.5) == pytest.approx(to_go, abs=1e-12)
    assert advantages.gae(rewards, values, lengths, 0.5, 1.0) == pytest.approx(to_go - values, abs=1e-12)
    one_step = np.array([1 + 0.125 - 0.5, 2 + 0.5 - 0.25, 4 - 1, -3 - 2])
    assert advantages.gae(rewards, values, lengths, 0.5, 0.0) == pytest.approx(one_step, abs=1e-12)


def test_sequence_ratios_of_single_tokens_are_token_ratios() -> None:
    """Completions of one token: three levels, one number."""
    batch = rollout([[-1.0], [-0.7], [-2.0]], [1.0, 0.0, 3.0])
    short = Table(
        batch,
        np.arange(3),
        torch.tensor([0, 3, 1]),
        STEP.logits[:3],
        STEP.values[:3],
        {name: logits[:3] for name, logits in STEP.others.items()},
    )
    levels = [{"level": level, "correction": "sequence", **CLIP} for level in ("token", "sequence", "sequence_mean")]
    result = [trained(objective(objective=config), short) for config in levels]
    for other in result[1:]:
        assert other[1] == pytest.approx(result[0][1], abs=1e-12)
        assert torch.allclose(other[2], result[0][2], atol=1e-12)
    assert result[0][2].abs().max() > 1e-2


def test_the_ratio_of_a_completion_is_a_mean_or_a_sum() -> None:
    """Log-ratios [.1, .1, .1 | -.2]: GSPO e^.1 and e^-.2, sequence e^.3; every token of a row has its slope."""
    old = torch.full((4,), -1.0, dtype=torch.float64)
    lengths = torch.tensor([3.0, 1.0], dtype=torch.float64)
    made = Rows(torch.ones(4), lengths, torch.tensor([0, 0, 0, 1]), old, old)
    for level, first, slope in (
        ("sequence_mean", np.exp(0.1), np.exp(0.1) / 3),
        ("sequence", np.exp(0.3), np.exp(0.3)),
    ):
        subject = objective(objective={"level": level, "correction": "none"})
        new = torch.tensor([-0.9, -0.9, -0.9, -1.2], dtype=torch.float64, requires_grad=True)
        result = subject.loss(made, Outputs(new), Credit(np.ones(4), 2, 4)).loss
        assert result.item() == pytest.approx(-(first + np.exp(-0.2)) / 2, abs=1e-12)
        gradient = torch.autograd.grad(result, new)[0].tolist()
        assert gradient == pytest.approx([-slope / 2] * 3 + [-np.exp(-0.2) / 2], abs=1e-12)


PAIRS = rollout(
    [[-0.5, -1.0], [-0.7], [-0.2, -0.1, -3.0], [-2.0]],
    [1.0, 0.0, -1.0, 2.0],
    tickets=[0, 0, 1, 1],
    reference=[[-0.6, -0.9], [-0.3], [-0.2, -0.2, -2.0], [-1.0]],
)
MEASURED = Measured(np.array([-0.5, -1.0, -0.7, -0.2, -0.1, -3.0, -2.0]))


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize(("ranking", "pair"), [("dpo_plackett_luce", "dpo"), ("simpo_plackett_luce", "simpo")])
def test_a_ranking_of_two_is_a_pair(ranking: str, pair: str, margin: float) -> None:
    """Plackett-Luce with K = 2 is Bradley-Terry; with a margin and averages SimPO."""
    result = [
        objective(**preference(name, beta=1.3, target_margin=margin)).weigh(PAIRS, MEASURED) for name in (ranking, pair)
    ]
    assert result[0].metrics["preference_loss"] == pytest.approx(result[1].metrics["preference_loss"], abs=1e-12)
    assert result[0].advantages == pytest.approx(result[1].advantages, abs=1e-12)
    assert np.abs(result[0].advantages).max() > 1e-2


def test_a_margin_of_a_ranking_is_subtracted_from_the_better_one() -> None:
    """Three scores by hand: log sums of (u_k - margin) against all that rank lower."""
    u, margin = np.array([0.3, -0.2, 0.5]), 0.4
    first = np.log(np.exp(u[0] - margin) + np.exp(u[1]) + np.exp(u[2])) - (u[0] - margin)
    second = np.log(np.exp(u[1] - margin) + np.exp(u[2])) - (u[1] - margin)
    assert ranking_loss(torch.from_numpy(u), margin).item() == pytest.approx(first + second, abs=1e-12)


def test_a_ranking_with_pessimism_adds_it_to_every_score() -> None:
    """Deviations of the centered ensemble .5, 0, .5; the best is row 2."""
    members = {"reward_a": [9.0, 10.0, 11.0], "reward_b": [1.0, 3.0, 5.0]}
    batch = rollout([[-1.0], [-2.0], [-1.5]], [10.0, 13.0, 16.0], **members)
    subject = objective(**preference("simpo_plackett_luce", beta=2.0, pessimism=0.4))
    result = subject.weigh(batch, Measured(np.array([-1.0, -2.0, -1.5]))).metrics["preference_loss"]
    scores = torch.tensor([-3.0 + 0.2, -4.0, -2.0 + 0.2], dtype=torch.float64)
    assert result == pytest.approx(ranking_loss(scores, 0.0).item(), abs=1e-12)


def test_equal_lengths_have_no_length_margin() -> None:
    lengths_apart = objective(**preference("simpo", exact_length_margin=True)).weigh(PAIRS, MEASURED)
    assert lengths_apart.metrics["preference_loss"] != objective(**preference("simpo")).weigh(PAIRS, MEASURED).metrics["preference_loss"]  # fmt: skip
    batch = rollout([[-1.0, -2.0], [-0.5, -0.5]], [0.0, 1.0])
    measured = Measured(np.array([-1.0, -2.0, -0.5, -0.5]))
    result = [objective(**preference("simpo", exact_length_margin=on)).weigh(batch, measured) for on in (False, True)]
    assert result[0].advantages.tobytes() == result[1].advantages.tobytes()
    assert np.abs(result[0].advantages).max() > 1e-3


def test_kl_weights_are_reward_weighted_regression() -> None:
    """-sum_x sum_i softmax_i(r / alpha) S_i / prompts: the gradient of a log-prob is minus its softmax weight."""
    subject = objective(objective={"kind": "weighted_likelihood", "temperature": 0.8, "likelihood": "sum"})
    credit: Credit = weigh(subject, STEP)
    rewards, tickets = (STEP.batch.column(name).to_numpy() for name in ("reward", "ticket"))
    weights = np.exp(rewards / 0.8)
    weights /= np.array([weights[tickets == ticket].sum() for ticket in tickets])
    assert credit.advantages / credit.num_rows == pytest.approx(weights[STEP.row_of_item] / 2, abs=1e-12)


def test_a_lower_bound_without_a_coefficient_is_the_mean() -> None:
    members, weights = np.random.default_rng(0).normal(size=(3, 6)), np.array([1.0, 2.0, 0.5])
    mean = reward_ensembles.combine(members, weights, "mean", 1.0)
    for form in ("lower_bound", "variance"):
        assert reward_ensembles.combine(members, weights, form, 0.0).tobytes() == mean.tobytes()
    assert reward_ensembles.combine(members, weights, "sum", 1.0) == pytest.approx(3 * mean, abs=1e-12)
    assert mean == pytest.approx((members * weights[:, None]).sum(0) / 3, abs=1e-12)


def test_twin_heads_that_agree_are_one_head() -> None:
    twin = torch.stack([STEP.values[:, 0], STEP.values[:, 0], STEP.values[:, 2]], dim=1)
    one = objective(objective={"advantage": "gae", "critic": {}})
    two = objective(objective={"advantage": "gae", "critic": {"softmin_temperature": 0.3}})
    columns = [heads(subject, twin) for subject in (one, two)]
    assert columns[0] is not None and columns[1] is not None
    assert torch.allclose(columns[0], columns[1], atol=1e-12)
    result = [
        subject.weigh(STEP.batch, Measured(values=values.numpy()))
        for subject, values in zip((one, two), columns, strict=True)
    ]
    assert result[0].advantages == pytest.approx(result[1].advantages, abs=1e-12)
    assert (one.heads, two.heads) == (["value"], ["value"])


def test_stages_of_rejection_sampling() -> None:
    """Stage by version: one step each, the last for ever; every stage keeps the best, chances from the seed."""
    config = {"kind": "weighted_likelihood", "weights": "rejection", "rejection_temperatures": [4.0, 1.0, 0.25]}
    rewards = np.linspace(-1.0, 1.0, 8)
    batch = rollout([[-1.0]] * 8, rewards.tolist())
    draws = np.array([np.random.default_rng(1000 + row).random() for row in range(8)])
    for version, sharper in ((0, 0.25), (1, 0.75), (2, 3.0), (9, 3.0)):
        kept = draws < np.exp(sharper * (rewards - 1.0))
        result = objective(objective=config).weigh(batch, Measured(version=version)).advantages
        assert result == pytest.approx(8 * kept / kept.sum(), abs=1e-12)
    assert case("rejection").settings.objective.min_samples == 2
