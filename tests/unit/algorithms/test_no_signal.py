"""A step that says nothing has no gradient: what differs by rounding alone is the same, whatever its size."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel import schema
from keel.algorithms import advantages, critics, pair_selection, reward_ensembles, weighted_likelihood
from keel.algorithms.objective import Objective
from keel.algorithms.types import Measured
from keel.config.pairs import PairSettings
from keel.rollout import buffer
from rollouts import generated, prompts, scored
from tabular import objective, rollout

LENGTHS = [3, 1, 2, 4, 1, 2, 3, 4]
TICKETS = [0, 0, 0, 1, 1, 1, 2, 2]
EQUAL = [0.0, -0.1, 0.1 + 0.2, 1 / 3, 1e-7, -123.456, 1e6 + 0.1, -1e12, 3e38]
"""Rewards that all completions of a step have; most of them have no exact mean."""


def nearly(value: float) -> np.ndarray:
    """The same number many times over, and as float32 may round it: one unit in the last place up and down."""
    exact = np.float32(value)
    around = [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    return np.array(around * 3, np.float64)[:8]


SAME = {f"{value:g}": np.full(8, value) for value in EQUAL}
SAME |= {f"{value:g} rounded": nearly(value) for value in EQUAL if 0 < abs(value) < 1e38}


@pytest.mark.parametrize("rewards", SAME.values(), ids=SAME)
@pytest.mark.parametrize("name", list(advantages.GROUP))
def test_a_group_of_equal_rewards_has_no_advantage(name: str, rewards: np.ndarray) -> None:
    assert advantages.GROUP[name](rewards).tolist() == [0.0] * 8


@pytest.mark.parametrize("rewards", SAME.values(), ids=SAME)
@pytest.mark.parametrize("ddof", [0, 1])
def test_equal_values_are_whitened_to_nothing(ddof: int, rewards: np.ndarray) -> None:
    assert advantages.whiten(rewards, ddof).tolist() == [0.0] * 8
    assert advantages.deviation(rewards, ddof) == 0.0


@pytest.mark.parametrize("offset", [0.0, 1.0, -1e3, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-30])
def test_a_signal_far_from_zero_or_of_any_size_stays_one(offset: float, scale: float) -> None:
    """Rewards of 1e6 and 1e6 + 1 are two rewards, and so are 1e-30 and 2e-30."""
    values = scale * (offset + np.array([0.0, 1.0, 3.0, 0.0]))
    white = advantages.whiten(values, 0)
    assert white == pytest.approx(np.array([-1, 0, 2, -1]) / np.sqrt(1.5), abs=1e-6)
    assert advantages.rloo(values) == pytest.approx(scale * np.array([-4, 0, 8, -4]) / 3, rel=1e-6, abs=1e-36)


def test_a_difference_keeps_the_rounding_of_what_it_was_taken_of() -> None:
    noise = np.array([1e-12, -1e-12, 2e-12])
    assert np.abs(advantages.whiten(noise, 0)).max() > 1
    assert advantages.whiten(noise, 0, size=1.0).tolist() == [0.0] * 3


def cut(rewards: Any, lengths: list[int] = LENGTHS) -> pa.RecordBatch:
    """Completions that all ran into the budget."""
    logprobs = [[-1.0 - 0.1 * t for t in range(n)] for n in lengths]
    return rollout(logprobs, list(rewards), TICKETS, logprobs, finish_reason=pa.array(["length"] * 8))


KINDS: dict[str, dict[str, Any]] = {
    **{name: {"advantage": name} for name in advantages.GROUP},
    "rloo whitened": {"advantage": "rloo", "whiten": "population"},
    "reinforce": {"advantage": "none", "whiten": "population"},
    "reinforce sample": {"advantage": "none", "whiten": "sample"},
    "reinforce normalized": {"advantage": "none", "normalize_reward": True},
    "reinforce_pp": {"advantage": "reinforce_pp"},
    "reinforce_pp sample": {"advantage": "reinforce_pp", "whiten": "sample"},
    "reinforce_pp normalized": {"advantage": "reinforce_pp", "normalize_reward": True, "whiten": "none"},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline"},
    "lco": {"kind": "logits_convexity"},
    "lco grpo": {"kind": "logits_convexity", "advantage": "grpo", "normalize_advantage": True},
    "lco ratio": {"kind": "logits_convexity", "target": "ratio"},
}


@pytest.mark.parametrize("penalty", [0.1, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("blocks", KINDS.values(), ids=KINDS)
def test_completions_that_are_all_cut_and_score_alike_teach_nothing(blocks: dict[str, Any], penalty: float) -> None:
    """Reward 0, a penalty for the missing end: -0.1 throughout has a deviation of 1e-17, and every advantage was +-1."""
    built = objective(objective=blocks, shaping={"missing_end_penalty": penalty})
    for _ in range(3):  # running moments have seen such steps before
        credit = built.weigh(cut([0.0] * 8), Measured())
        assert credit.advantages.tolist() == [0.0] * sum(LENGTHS)
    assert credit.metrics["uniform_groups"] == 3


@pytest.mark.parametrize("rewards", SAME.values(), ids=SAME)
@pytest.mark.parametrize("advantage", ["reinforce_pp", "reinforce_pp_baseline", "none", "grpo"])
def test_equal_rewards_of_any_size_teach_nothing(advantage: str, rewards: np.ndarray) -> None:
    built = objective(objective={"advantage": advantage, "whiten": "population"})
    assert built.weigh(cut(rewards), Measured()).advantages.tolist() == [0.0] * sum(LENGTHS)


@pytest.mark.parametrize("blocks", [{"advantage": "gae", "gae_lambda": 1.0}, {"advantage": "value_baseline"}])
@pytest.mark.parametrize("reward", [-0.1, 1e6 + 0.1])
def test_a_critic_that_is_right_up_to_rounding_leaves_nothing_to_whiten(blocks: dict[str, Any], reward: float) -> None:
    """Values come in float32: next to the reward, they miss it by 1e-8 of its size."""
    built = objective(objective={**blocks, "critic": {}})
    values = np.resize(nearly(reward), sum(LENGTHS))[:, None]
    credit = built.weigh(cut([reward] * 8), Measured(values=values))
    assert credit.advantages.tolist() == [0.0] * sum(LENGTHS)
    assert credit.metrics["explained_variance"] == {"value": 0.0}


def test_kl_of_a_policy_that_is_still_the_reference_is_not_blown_up() -> None:
    """log pi - log ref of two programs that agree to float32: 1e-7 of log-probs of size 5."""
    noise = np.random.default_rng(0).choice([-4e-7, 0.0, 4e-7], size=sum(LENGTHS))
    logprobs = np.full(sum(LENGTHS), -5.0)
    cuts = np.cumsum(LENGTHS)[:-1]
    rows = [part.tolist() for part in np.split(logprobs + noise, cuts)]
    batch = rollout(rows, [0.5] * 8, TICKETS, [part.tolist() for part in np.split(logprobs, cuts)])
    built = objective(
        objective={"advantage": "none", "whiten": "population"}, regularizer={"kl": {"coefficient": 0.05}}
    )
    assert built.weigh(batch, Measured()).advantages.tolist() == [0.0] * sum(LENGTHS)


def test_running_moments_of_equal_rewards_are_no_scale() -> None:
    for value in (-0.1, 1e6 + 0.1, 0.0):
        moments = critics.RunningMoments()
        for _ in range(50):
            assert moments.normalize(np.full(16, value)).tolist() == [0.0] * 16
        assert moments.deviation <= 1e-9 * abs(value)
        result = moments.normalize(value + np.array([0.0, 1.0]))
        assert result[1] - result[0] == pytest.approx(1 / moments.deviation, rel=1e-6)  # a first difference is one


@pytest.mark.parametrize("size", [1.0, 1e4, 1e8])
def test_popart_does_not_blow_up_the_rounding_of_targets_that_are_alike(size: float) -> None:
    """After many steps of one target the running variance is the rounding of its square."""
    art = critics.PopArt()
    for _ in range(2000):
        art.update(np.full(8, size / 3), 0.03)
    off = np.float64(np.nextafter(np.float32(size / 3), np.float32(np.inf))) - art.mean
    assert abs(off) / art.deviation < 2
    value = art.value(np.array([0.25]))[0]
    art.update(np.array([size, 2 * size]), 0.03)
    assert art.value(np.array([0.25]))[0] == pytest.approx(value, rel=1e-6)  # outputs are kept
    assert art.deviation > min(0.1 * size, 0.99e6)  # 1e6 is its published bound


def test_explained_variance_of_constant_targets_is_zero() -> None:
    for value in EQUAL[:-1]:
        targets = np.full(9, value)
        assert critics.explained_variance(targets + np.arange(9.0), targets) == 0.0
    assert critics.explained_variance(np.zeros(2), np.array([1e6, 1e6 + 1.0])) == 0.0  # predicts no difference
    assert critics.explained_variance(np.array([1e6, 1e6 + 1.0]), np.array([1e6, 1e6 + 1.0])) == 1.0


@pytest.mark.parametrize("form", ["kl", "chi2", "soft_chi2"])
@pytest.mark.parametrize("rewards", SAME.values(), ids=SAME)
def test_equal_rewards_have_equal_weights(form: str, rewards: np.ndarray) -> None:
    """Also at a temperature that would make much of the rounding."""
    assert weighted_likelihood.divergence_weights(rewards, form, 1e-9).tolist() == [1.0] * 8


@pytest.mark.parametrize("weights", ["kl", "chi2", "soft_chi2", "rejection", "uniform"])
def test_likelihood_weights_of_equal_rewards_are_those_of_supervised_training(weights: str) -> None:
    blocks = {"kind": "weighted_likelihood", "weights": weights, "temperature": 1e-9, "rejection_temperatures": [1e-9]}
    result = objective(objective=blocks).weigh(cut(nearly(0.3)), Measured()).advantages
    assert result == pytest.approx(1 / np.repeat(LENGTHS, LENGTHS), rel=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "simpo_plackett_luce", "kto"])
@pytest.mark.parametrize("rewards", SAME.values(), ids=SAME)
def test_rewards_that_differ_by_rounding_are_ties(loss: str, rewards: np.ndarray) -> None:
    blocks = {"kind": "preference", "loss": loss}
    batch = cut(rewards)
    credit = objective(objective=blocks).weigh(batch, Measured(np.full(sum(LENGTHS), -1.0)))
    assert credit.advantages.tolist() == [0.0] * sum(LENGTHS)
    assert credit.counts == {"pairs_dropped_total": {"tie": 3.0}}


def test_a_ranking_leaves_out_what_differs_by_rounding() -> None:
    """0.3 and 0.1 + 0.2 are one place of the ranking; 0.5 is another."""
    blocks = {"kind": "preference", "loss": "simpo_plackett_luce", "beta": 2.0}
    result = objective(objective=blocks).weigh(rollout([[-1.0]] * 3, [0.3, 0.1 + 0.2, 0.5]), Measured(np.full(3, -1.0)))
    assert result.metrics["preference_loss"] == pytest.approx(np.log(2), abs=1e-12)


def test_members_without_an_opinion_are_centered_to_nothing() -> None:
    members = np.array([nearly(1 / 3)[:4], [1.0, np.nan, 3.0, 2.0], [np.nan] * 4])
    result = reward_ensembles.center(members, np.zeros(4))
    assert result[0].tolist() == [0.0] * 4
    assert result[1] == pytest.approx([-1.0, np.nan, 1.0, 0.0], nan_ok=True)
    assert np.isnan(result[2]).all()


def test_dynamic_sampling_replaces_groups_that_differ_by_rounding() -> None:
    built = object.__new__(buffer.RolloutBuffer)
    built.min_samples, built.refills, built._refilled = 2, 1, 0
    scored_rows = np.ones(3, bool)
    one, up, down = nearly(1 / 3)[:3].tolist()

    def reason(rewards: list[float]) -> str:
        return built._reason_to_drop(scored(generated(prompts([0], samples=3)), rewards), scored_rows)

    assert reason([one, up, down]) == reason([one, one, one]) == "uniform_rewards"
    assert reason([one, one, one * 1.001]) == ""


def test_groups_of_one_are_not_uniform() -> None:
    tickets = np.array([0, 1, 1, 2, 3, 3])
    assert advantages.num_uniform_groups(np.array([1.0, 0.1 + 0.2, 0.3, 5.0, 1.0, 2.0]), tickets) == 1
    built = objective(objective={"advantage": "reinforce_pp"}, sampling={"samples_per_prompt": 1})
    credit = built.weigh(rollout([[-1.0]] * 4, [1.0, 2.0, 3.0, 3.0], tickets=[0, 1, 2, 3]), Measured())
    assert credit.metrics["uniform_groups"] == 0


# ---- whitening is over what an advantage belongs to


@pytest.mark.parametrize("whiten", ["population", "sample"])
@pytest.mark.parametrize("advantage", ["none", "rloo", "value_baseline"])
def test_advantages_of_completions_are_whitened_over_completions(advantage: str, whiten: str) -> None:
    """One action, one vote: a completion of four tokens weighs no more in mean and deviation than one of one."""
    rewards = np.array([1.0, 4.0, -2.0, 0.5, 0.0, 3.0, 7.0, -1.0])
    blocks: dict[str, Any] = {"advantage": advantage, "whiten": whiten}
    values = np.zeros((sum(LENGTHS), 1))
    if advantage == "value_baseline":
        blocks["critic"] = {}
    raw = advantages.by_ticket(advantages.rloo, rewards, np.array(TICKETS)) if advantage == "rloo" else rewards
    expected = (raw - raw.mean()) / raw.std(ddof=int(whiten == "sample"))
    result = objective(objective=blocks).weigh(cut(rewards), Measured(values=values))
    assert result.advantages == pytest.approx(np.repeat(expected, LENGTHS), abs=1e-12)


@pytest.mark.parametrize("coefficient", [0.0, 0.02])
def test_with_an_entropy_advantage_that_weighs_something_tokens_are_whitened(coefficient: float) -> None:
    rewards = [1.0, 4.0, -2.0, 0.5, 0.0, 3.0, 7.0, -1.0]
    blocks = {"advantage": "none", "whiten": "population"}
    entropy = {"entropy_advantage": {"critic": False, "coefficient": coefficient}}
    plain, result = (
        objective(objective=block).weigh(cut(rewards), Measured()) for block in (blocks, {**blocks, **entropy})
    )
    if coefficient == 0:
        assert result.advantages.tobytes() == plain.advantages.tobytes()
    else:
        assert (result.advantages.mean(), result.advantages.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1))


# ---- a term of the loss is reduced as what it regularizes


def value_of_kl(built: Objective, lengths: list[int]) -> float:
    """kl_loss_nats at x = log pi - log ref = 1 for every token of the first completion, 2 for the others."""
    from keel.algorithms.types import Credit, Outputs, Rows

    log_ratios = torch.repeat_interleave(
        torch.tensor([1.0, *[2.0] * (len(lengths) - 1)]), torch.tensor(lengths)
    ).double()
    rows = Rows(
        advantages=torch.zeros_like(log_ratios),
        lengths=torch.tensor(lengths).double(),
        row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        sampler=torch.zeros_like(log_ratios),
        reference=-log_ratios,
    )
    credit = Credit(np.zeros(len(log_ratios)), len(lengths), len(log_ratios))
    return built.loss(
        rows, Outputs(torch.zeros_like(log_ratios), vocabulary=torch.zeros_like(log_ratios)), credit
    ).sums["kl_loss_nats"]


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [("sum", (5 * 0.5 + 1 * 2.0) / 2), ("average", (0.5 + 2.0) / 2), ("token_mean", (5 * 0.5 + 1 * 2.0) / 6)],
)
def test_kl_in_the_loss_is_reduced_like_the_likelihood(likelihood: str, expected: float) -> None:
    """k2 is 1/2 and 2 nats^2 a token, on completions of 5 tokens and 1; the likelihood's own weights say the same."""
    kl = {"kl": {"coefficient": 0.1, "placement": "loss", "estimator": "k2"}}
    blocks = {"kind": "weighted_likelihood", "weights": "uniform", "likelihood": likelihood}
    built = objective(objective=blocks, regularizer=kl)
    assert value_of_kl(built, [5, 1]) == pytest.approx(expected, abs=1e-12)
    batch = rollout([[-1.0] * 5, [-1.0]], [0.0, 0.0])
    credit = built.weigh(batch, Measured())
    terms = np.repeat([0.5, 2.0], [5, 1])
    assert (credit.advantages * terms).sum() / credit.num_rows == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({"kind": "preference", "loss": "dpo"}, (5 * 0.5 + 2.0) / 2),
        ({"kind": "preference", "loss": "cpo"}, (5 * 0.5 + 2.0) / 2),
        *[
            ({"kind": "preference", "loss": loss}, (0.5 + 2.0) / 2)
            for loss in ("simpo", "simpo_hinge", "simpo_plackett_luce", "ipo_average", "orpo")
        ],
        ({"level": "sequence", "correction": "none"}, (5 * 0.5 + 2.0) / 2),
        ({"level": "sequence_mean", "correction": "none"}, (0.5 + 2.0) / 2),
        ({"kind": "logits_convexity"}, (5 * 0.5 + 2.0) / 6),
    ],
)
def test_kl_in_the_loss_weighs_a_token_as_the_objective_does(blocks: dict[str, Any], expected: float) -> None:
    """Summed beside sums of log-probs, averaged beside averages; GSPO's ratio is such an average."""
    built = objective(
        objective=blocks, regularizer={"kl": {"coefficient": 0.1, "placement": "loss", "estimator": "k2"}}
    )
    assert built.reduction in ("sequence_sum", "sequence_mean", "token_mean")
    assert value_of_kl(built, [5, 1]) == pytest.approx(expected, abs=1e-12)


def test_pairs_of_one_prompt_know_their_margin() -> None:
    """What differs by more than rounding is a pair, however small the difference."""
    rewards = np.array([1e-6, 2e-6])
    seen = pair_selection.Candidates(
        tickets=np.zeros(2), seeds=np.zeros(2, int), rewards=rewards, judged=rewards, lengths=np.ones(2),
        finished=np.ones(2, bool), members=rewards[None],
    )  # fmt: skip
    assert pair_selection.select(PairSettings(), seen).chosen.tolist() == [1]


def test_stored_and_given_completions_are_not_sampled() -> None:
    batch = generated(prompts([0, 1]))
    assert schema.sampled(batch).tolist() == [True] * 4
    place = batch.schema.get_field_index("generator")
    marked = batch.set_column(place, batch.schema.field(place), pa.array(["generator-1", "stored", "given", "x"]))
    assert schema.sampled(marked).tolist() == [True, False, False, True]
    assert schema.sampled(batch.drop_columns(["completion_logprobs"])).tolist() == [False] * 4
