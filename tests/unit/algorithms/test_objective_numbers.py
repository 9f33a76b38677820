"""What an objective says of a step beside its advantages: every metric against its definition, and what it asks for."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel.algorithms import critics, pair_selection
from keel.algorithms.pair_selection import CHOICES, Candidates
from keel.algorithms.regularizers import ExactKL
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config.pairs import PairSettings
from keel.learner.packing import TokenBudget
from tabular import CASES, case, heads, objective, rollout, table, weigh

STEP = table()
REWARDS = STEP.batch.column("reward").to_numpy()
TICKETS = STEP.batch.column("ticket").to_numpy()
LENGTHS = np.bincount(STEP.row_of_item)
SAMPLER = STEP.logprobs(STEP.others["sampler"]).numpy()
REFERENCE = STEP.logprobs(STEP.others["reference"]).numpy()
CURRENT = STEP.logprobs(STEP.logits).numpy()


def by_row(values: np.ndarray) -> np.ndarray:
    return np.bincount(STEP.row_of_item, values)


def of_groups(function: Any, values: np.ndarray) -> list[Any]:
    return [function(values[ticket == TICKETS]) for ticket in (2, 7)]


# ---- what is asked for


ASKS: dict[str, tuple[set[str], bool, bool, list[str], set[str] | None]] = {
    # measured, weighed again every epoch, reads the log-probs it began with, heads, models of the vocabulary term
    "rloo": (set(), False, True, [], None),
    "gae": ({"values"}, False, True, ["value"], None),
    "value_baseline": ({"values"}, False, True, ["value"], None),
    "eapo": ({"values"}, False, True, ["value", "entropy"], None),
    "eapo_rloo": ({"values"}, False, True, ["entropy"], None),
    "eapo_free": (set(), False, True, [], None),
    "exact": (set(), False, True, [], {"reference"}),
    "reward_weighted": ({"logprobs"}, False, True, [], None),
    "k3_weighted": (set(), False, True, [], None),
    "kl_cov": ({"logprobs"}, False, True, [], None),
    "clip_cov": ({"logprobs"}, False, True, [], None),
    "dpo": ({"logprobs"}, True, False, [], None),
    "kto": ({"logprobs"}, True, False, [], None),
    "simpo": ({"logprobs"}, True, False, [], None),
    "kl": (set(), False, False, [], None),
    "rejection": (set(), False, False, [], {"reference"}),
    "lco_mse": (set(), False, False, [], {"old"}),
    "lco_reference": (set(), False, False, [], {"reference"}),
    "lco_dense": (set(), False, False, [], {"old", "reference", "teacher"}),
}


@pytest.mark.parametrize("name", list(ASKS))
def test_what_an_objective_asks_the_learner_for(name: str) -> None:
    measures, every_epoch, reads_old, columns, models = ASKS[name]
    subject = case(name)
    assert (subject.measures, subject.weighs_every_epoch, subject.reads_old) == (measures, every_epoch, reads_old)
    assert list(subject.heads) == columns
    assert (None if subject.vocabulary is None else set(subject.vocabulary.models)) == models


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("which", ["kl", "entropy"])
def test_log_probs_are_measured_for_a_weighted_term_in_the_reward_alone(
    which: str, weighted: bool, active: bool
) -> None:
    form = {"form": "sequence_sum"} if which == "entropy" else {}
    term = {"coefficient": 0.3 * active, "importance_weighted": weighted, **form}
    assert objective(regularizer={which: term}).measures == ({"logprobs"} if weighted and active else set())
    in_loss = {"kl": {"placement": "loss", "estimator": "k2"}, "entropy": {"form": "token_bonus"}}[which]
    assert objective(regularizer={which: {**term, **in_loss, "coefficient": 0.3}}).measures == set()


@pytest.mark.parametrize(("entropy", "needed"), [
    ({}, False),
    ({"monitor": True}, True),
    ({"form": "token_bonus", "coefficient": 0.1}, True),
    ({"form": "token_bonus", "coefficient": 0.0}, False),
    ({"form": "sequence_sum", "coefficient": 0.1}, False),
])  # fmt: skip
def test_the_whole_entropy_is_computed_where_it_is_read(entropy: dict[str, Any], needed: bool) -> None:
    assert objective(regularizer={"entropy": entropy}).needs_entropy == needed


def test_what_is_not_said_has_these_values() -> None:
    """Defaults of what passes between learner and objective, and of moments that no update has moved."""
    measured, credit = Measured(), Credit(np.zeros(2), 1, 2)
    assert (measured.logprobs, measured.values, measured.version) == (None, None, 0)
    assert (credit.targets, credit.old_values, credit.selected, credit.finished) == (None, None, None, False)
    assert dict(credit.metrics) == dict(credit.counts) == {}
    moments, art = critics.RunningMoments(), critics.PopArt()
    assert (moments.count, moments.mean, moments.square_sum) == (0.0, 0.0, 0.0)
    assert (art.mean, art.square, art.scale, art.shift, art.deviation) == (0.0, 1.0, 1.0, 0.0, 1.0)
    outputs = Outputs(torch.zeros(2))
    assert (outputs.entropies, outputs.values, outputs.vocabulary) == (None, None, None)
    assert TokenBudget(8, 4, 2).packed_tokens == 0
    rows = Rows(torch.zeros(2), torch.ones(2), torch.arange(2), None)
    assert (rows.old, rows.reference, rows.targets, rows.old_values) == (None, None, None, None)


@pytest.mark.parametrize("values", [np.zeros((2, 1)), np.zeros(3), np.array([0.0, np.nan]), np.array([np.inf, 0.0])])
def test_a_credit_that_is_none_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"credit: advantages .*; expected 2 finite numbers, one a token"):
        Credit(values, 1, 2).checked(2)
    fine = Credit(np.array([1.0, -1.0]), 1, 2)
    assert fine.checked(2) is fine


# ---- metrics of every kind


@pytest.mark.parametrize("name", ["rloo", "reinforce_pp", "gae", "lco_mse", "sequence_sum", "reward_weighted"])
def test_what_regularizers_did_to_the_reward(name: str) -> None:
    subject, config = case(name), CASES[name][1]
    result = weigh(subject, STEP).metrics
    kl = config.get("kl", {}).get("coefficient", 0.0) * by_row(
        (CURRENT if name == "reward_weighted" else SAMPLER) - REFERENCE
    )
    bonus = config.get("entropy", {}).get("coefficient", 0.0) * by_row(-SAMPLER)
    assert result["reward_kl_term"] == pytest.approx(-kl.mean(), abs=1e-12)
    assert result["reward_entropy_term"] == pytest.approx(bonus.mean(), abs=1e-12)
    assert result["regularized_reward"] == pytest.approx((REWARDS - kl + bonus).mean(), abs=1e-12)
    assert result["uniform_groups"] == 0
    assert abs(kl.mean()) + abs(bonus.mean()) > 1e-3


def test_uniform_groups_are_those_of_the_regularized_reward() -> None:
    """Rewards 1, 1 | 2, 3; a KL that differs within the first group makes it teach something."""
    batch = rollout([[-1.0], [-2.0], [-1.0], [-1.0]], [1.0, 1.0, 2.0, 3.0], [0, 0, 1, 1], [[-1.0]] * 4)
    assert objective().weigh(batch, Measured()).metrics["uniform_groups"] == 1
    kl = {"kl": {"coefficient": 0.1}}
    assert objective(regularizer=kl).weigh(batch, Measured()).metrics["uniform_groups"] == 0


@pytest.mark.parametrize("name", ["gae", "eapo", "value_baseline", "eapo_rloo"])
def test_what_a_critic_explains(name: str) -> None:
    """1 - var(target - value) / var(target) and the mean value, of each head, where it has a target."""
    subject = case(name)
    values = heads(subject, STEP.values)
    assert values is not None
    config = subject.settings.objective
    credit = subject.weigh(STEP.batch, Measured(CURRENT, values.numpy()))
    assert credit.targets is not None
    for column, head in enumerate(subject.heads):
        art = subject.popart[head]  # type: ignore[attr-defined]
        target = credit.targets[:, column]
        if config.critic.popart:  # type: ignore[union-attr]
            target = target * art.deviation + art.mean
        known = np.isfinite(target)
        value = values.numpy()[known, column]
        expected = 1 - (target[known] - value).var() / target[known].var()
        assert credit.metrics["explained_variance"][head] == pytest.approx(expected, abs=1e-9)
        assert credit.metrics["value_mean"][head] == pytest.approx(value.mean(), abs=1e-12)
        assert known.sum() == (8 if name == "value_baseline" else len(CURRENT)) and expected < 1
    assert set(credit.metrics["value_mean"]) == set(subject.heads)


def test_without_a_critic_nothing_is_said_of_one() -> None:
    assert not {"explained_variance", "value_mean"} & set(weigh(case("rloo"), STEP).metrics)
    subject = case("rloo").coefficients()
    assert set(subject) == {"kl_coefficient", "entropy_coefficient"}


def test_explained_variance_by_hand() -> None:
    targets = np.array([1.0, 2.0, 3.0, 6.0])  # variance 3.5
    assert critics.explained_variance(targets, targets) == 1.0
    assert critics.explained_variance(np.full(4, 9.0), targets) == 0.0
    assert critics.explained_variance(targets - [0, 2, 0, 2], targets) == pytest.approx(1 - 1 / 3.5)
    assert critics.explained_variance(-targets, targets) == pytest.approx(1 - 4)
    assert critics.explained_variance(np.arange(4.0), np.full(4, 2.0)) == 0.0


def test_the_spread_of_advantages_is_that_before_whitening_and_shaping_is_told_apart() -> None:
    subject = objective(objective={"advantage": "reinforce_pp"}, shaping={"missing_end_penalty": 0.5})
    ends = pa.array(["stop"] * 6 + ["length"] * 2)
    credit = subject.weigh(STEP.batch.append_column("finish_reason", ends), Measured())
    rewards = REWARDS - 0.5 * (np.arange(8) >= 6)
    flat = rewards[STEP.row_of_item]
    assert credit.metrics["advantage_std"] == pytest.approx(flat.std(), abs=1e-12)
    assert credit.advantages == pytest.approx((flat - flat.mean()) / flat.std(), abs=1e-12)
    assert credit.metrics["shaping_term"] == pytest.approx(-0.125, abs=1e-12)
    assert credit.metrics["regularized_reward"] == pytest.approx(rewards.mean(), abs=1e-12)


def test_what_adapts_is_told_by_its_name() -> None:
    subject = objective(
        objective={
            "advantage": "gae",
            "normalize_reward": True,
            "critic": {"popart": True, "popart_rate": 0.5},
            "entropy_advantage": {},
        },
        regularizer={"kl": {"coefficient": 0.25, "controller": {"kind": "safe"}}},
    )
    assert weigh(subject, STEP) and subject.coefficients()["entropy_coefficient"] == 0.0
    moments, popart = subject.moments, subject.popart  # type: ignore[attr-defined]
    result = subject.coefficients()
    assert result["normalizer_mean"] == moments.mean == pytest.approx(REWARDS.mean(), abs=1e-3)
    assert result["normalizer_std"] == pytest.approx(REWARDS.std(), abs=1e-3) and abs(moments.mean) > 0.01
    assert result["popart_mean"] == {head: art.mean for head, art in popart.items()}
    assert result["popart_std"] == {head: art.deviation for head, art in popart.items()}
    assert (
        set(result["popart_mean"]) == {"value", "entropy"} and result["kl_coefficient"] == subject.kl_coefficient.value
    )
    assert {f"safe_{name}" for name in ("threshold_nats", "gate", "penalty")} < set(result)


def test_the_metrics_of_weighted_likelihood() -> None:
    subject = case("soft_chi2")
    result = weigh(subject, STEP)
    weights = result.advantages[np.cumsum(LENGTHS) - 1] * LENGTHS  # likelihood: average
    assert weights.mean() == pytest.approx(1, abs=1e-12)
    effective = of_groups(lambda w: w.sum() ** 2 / np.square(w).sum(), weights)
    assert result.metrics["effective_samples"] == pytest.approx(np.mean(effective), abs=1e-9)
    assert result.metrics["accepted_ratio"] == 1.0
    assert result.metrics["best_reward"] == pytest.approx(np.mean(of_groups(np.max, REWARDS)), abs=1e-12)
    assert result.metrics["best_of_n_kl_nats"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-12)
    assert (result.num_rows, result.num_tokens) == (8, len(CURRENT))
    best = weigh(case("best_of_n"), STEP)
    assert best.metrics["accepted_ratio"] == 0.25 and best.metrics["effective_samples"] == pytest.approx(1.0)


@pytest.mark.parametrize(("form", "share"), [("sum", 1.0), ("average", None), ("token_mean", 8 / LENGTHS.sum())])
def test_a_weighted_likelihood_is_over_a_completion_its_mean_or_all_tokens(form: str, share: float | None) -> None:
    subject = objective(objective={"kind": "weighted_likelihood", "weights": "uniform", "likelihood": form})
    expected = np.repeat(1 / LENGTHS if share is None else np.full(8, share), LENGTHS)
    assert weigh(subject, STEP).advantages == pytest.approx(expected, abs=1e-12)


# ---- preferences


@pytest.mark.parametrize(("loss", "score"), [
    ("dpo", "ratio"), ("ipo_average", "mean ratio"), ("simpo", "mean"), ("cpo", "sum"), ("kto", "ratio"),
    ("simpo_plackett_luce", "mean"), ("dpo_plackett_luce", "ratio"),
])  # fmt: skip
def test_what_runs_of_preferences_are_watched_by(loss: str, score: str) -> None:
    subject = objective(objective={"kind": "preference", "loss": loss, "beta": 0.4})
    result = weigh(subject, STEP).metrics
    policy, reference = by_row(CURRENT), by_row(REFERENCE)
    scores = {
        "ratio": policy - reference,
        "mean ratio": (policy - reference) / LENGTHS,
        "mean": policy / LENGTHS,
        "sum": policy,
    }[score]
    won = [np.flatnonzero(ticket == TICKETS)[REWARDS[ticket == TICKETS].argmax()] for ticket in (2, 7)]
    lost = [np.flatnonzero(ticket == TICKETS)[REWARDS[ticket == TICKETS].argmin()] for ticket in (2, 7)]
    assert result["pairs"] == 2
    assert result["chosen_implicit_reward"] == pytest.approx(0.4 * scores[won].mean(), abs=1e-12)
    assert result["rejected_implicit_reward"] == pytest.approx(0.4 * scores[lost].mean(), abs=1e-12)
    assert result["implicit_margin"] == pytest.approx(0.4 * (scores[won] - scores[lost]).mean(), abs=1e-12)
    assert result["preference_accuracy_ratio"] == np.mean(scores[won] > scores[lost])
    assert result["chosen_logprob_nats"] == pytest.approx(policy[won].mean(), abs=1e-12)
    assert result["rejected_logprob_nats"] == pytest.approx(policy[lost].mean(), abs=1e-12)
    assert result["chosen_log_ratio_nats"] == pytest.approx((policy - reference)[won].mean(), abs=1e-12)
    assert result["rejected_log_ratio_nats"] == pytest.approx((policy - reference)[lost].mean(), abs=1e-12)


def test_a_tie_of_two_scores_is_no_win() -> None:
    batch = rollout([[-1.0], [-1.0]], [1.0, 0.0])
    subject = objective(objective={"kind": "preference", "loss": "simpo"})
    assert subject.weigh(batch, Measured(np.array([-1.0, -1.0]))).metrics["preference_accuracy_ratio"] == 0.0


@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5, 3.0, -3.0])
def test_the_baseline_of_kto_is_the_mean_ratio_where_that_is_positive(shift: float) -> None:
    """z = max(0, mean h): 0 below, also where the mean lies just below."""
    h = np.array([1.0, -0.4]) + shift
    batch = rollout([[-1.0], [-1.0]], [1.0, 0.0], reference=[[-1.0], [-1.0]])
    subject = objective(objective={"kind": "preference", "loss": "kto", "beta": 0.7})
    result = subject.weigh(batch, Measured(h - 1.0)).metrics["preference_loss"]
    z = max(0.0, h.mean())
    sigmoid = [1 / (1 + math.exp(-0.7 * x)) for x in (h[0] - z, z - h[1])]
    assert result == pytest.approx(1 - np.mean(sigmoid), abs=1e-12)


@pytest.mark.parametrize(("ratio", "finished"), [(None, False), (0.4, True), (0.5, True), (0.6, False), (0.0, True)])
def test_a_run_is_done_when_enough_prompts_are_settled(ratio: float | None, finished: bool) -> None:
    """Of two prompts one has a single plausible answer."""
    pairs: dict[str, Any] = {"selection": "most_disagreeing", "stop_settled_ratio": ratio}
    batch = rollout(
        [[-1.0]] * 6, [0.0] * 6, [0, 0, 0, 1, 1, 1],
        reference=[[-1.0]] * 6,
        reward_a=[3.0, 1.0, 0.0, 3.0, 1.0, 0.0],
        reward_b=[3.0, 0.0, 1.0, 0.0, 3.0, 1.0],
    )  # fmt: skip
    subject = objective(objective={"kind": "preference", "pairs": pairs})
    credit = subject.weigh(batch, Measured(np.full(6, -1.0)))
    assert credit.metrics["settled_ratio"] == 0.5 and credit.finished == finished
    assert credit.counts == {"pairs_dropped_total": {"settled": 1.0, "tie": 1.0}}


def test_a_step_that_says_nothing_of_plausible_sets_ends_no_run() -> None:
    pairs: dict[str, Any] = {"selection": "most_disagreeing", "stop_settled_ratio": 0.5, "finished_only": True}
    cut = STEP.batch.append_column("finish_reason", pa.array(["length"] * 8))
    credit = objective(objective={"kind": "preference", "pairs": pairs}).weigh(cut, Measured(CURRENT))
    assert "settled_ratio" not in credit.metrics and not credit.finished
    assert credit.counts == {"pairs_dropped_total": {"unfinished": 2.0}}


def test_a_selection_without_plausible_sets_never_ends_a_run() -> None:
    credit = weigh(case("dpo"), STEP)
    assert not credit.finished and "settled_ratio" not in credit.metrics


def test_held_out_rows_say_the_loss_of_the_objective() -> None:
    """Of a likelihood -log pi a token; of preferences their own loss."""
    measured = Measured(CURRENT)
    assert case("uniform").assess(STEP.batch, measured) == {"loss": pytest.approx(-CURRENT.mean(), abs=1e-12)}
    subject = case("simpo")
    expected = subject.weigh(STEP.batch, measured).metrics
    assert subject.assess(STEP.batch, measured) == {"loss": expected["preference_loss"], **expected}


# ---- selections

FOUR = np.array([0.5, 2.0, -1.0, 1.0])


def test_selections_by_hand() -> None:
    def pairs(name: str, rewards: np.ndarray, seed: int = 0) -> list[tuple[int, int]]:
        return CHOICES[name](rewards, np.random.default_rng(seed))

    assert pairs("max_min", FOUR) == [(1, 2)]
    assert pairs("max_max", FOUR) == [(1, 3)]
    assert pairs("all", FOUR) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    # sample 0 is the policy's: it takes no part in the best of the others, wherever it stands
    assert pairs("best_of_n_vs_policy", FOUR) == [(1, 0)]
    assert pairs("best_of_n_vs_policy", np.array([9.0, 0.0, 2.0, 1.0])) == [(2, 0)]
    assert pairs("best_of_n_vs_policy", np.array([1.0, 0.0])) == [(1, 0)]
    drawn = {pairs("max_random", FOUR, seed)[0] for seed in range(40)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}
    both = {pairs("random", FOUR, seed)[0] for seed in range(200)}
    assert both == {(a, b) for a in range(4) for b in range(4) if a != b}


def candidates(rewards: list[float], judged: list[float] | None = None, **more: Any) -> Candidates:
    size = len(rewards)
    numbers: dict[str, Any] = {
        "tickets": np.zeros(size, int),
        "seeds": np.arange(size),
        "rewards": np.array(rewards),
        "judged": np.array(judged if judged is not None else rewards),
        "lengths": np.ones(size, int),
        "finished": np.ones(size, bool),
        "members": np.array([rewards]),
    }
    return Candidates(**{**numbers, **more})


@pytest.mark.parametrize(("margin", "kept"), [(0.0, True), (0.5, True), (1.0, False), (2.0, False)])
def test_a_pair_needs_more_than_the_margin(margin: float, kept: bool) -> None:
    """Rewards 1 apart; at the margin itself it is a tie."""
    for rewards in ([1.0, 2.0], [2.0, 1.0]):
        result = pair_selection.select(PairSettings(min_margin=margin), candidates(rewards))
        best = int(np.argmax(rewards))
        assert (result.chosen.tolist(), result.rejected.tolist()) == (([best], [1 - best]) if kept else ([], []))
        assert result.dropped == ({} if kept else {"tie": 1}) and result.metrics == {"pairs": float(kept)}


def test_the_judge_orders_what_the_reward_selected() -> None:
    result = pair_selection.select(PairSettings(), candidates([0.0, 5.0, 1.0], judged=[3.0, 1.0, 2.0]))
    assert (result.chosen.tolist(), result.rejected.tolist()) == ([0], [1])
    lost = pair_selection.select(PairSettings(), candidates([0.0, 5.0, 1.0], judged=[3.0, np.nan, 2.0]))
    assert lost.dropped == {"unjudged": 1} and len(lost.chosen) == 0


def test_the_length_penalty_counts_for_the_selection_alone() -> None:
    """Rewards 3, 2, 0 of 9, 1 and 1 tokens: at .5 a token the long one is the worst, and still wins its pair."""
    result = pair_selection.select(
        PairSettings(length_penalty=0.5), candidates([3.0, 2.0, 0.0], lengths=np.array([9, 1, 1]))
    )
    assert (result.chosen.tolist(), result.rejected.tolist()) == ([0], [1])


def test_completions_that_did_not_end_are_left_out_where_that_is_asked() -> None:
    ends = np.array([False, True, True, False])
    result = pair_selection.select(PairSettings(finished_only=True), candidates([9.0, 1.0, 2.0, -9.0], finished=ends))
    assert (result.chosen.tolist(), result.rejected.tolist()) == ([2], [1])
    every = pair_selection.select(PairSettings(), candidates([9.0, 1.0, 2.0, -9.0], finished=ends))
    assert (every.chosen.tolist(), every.rejected.tolist()) == ([0], [3])
    none = pair_selection.select(
        PairSettings(finished_only=True), candidates([9.0, 1.0], finished=np.array([True, False]))
    )
    assert none.dropped == {"unfinished": 1}


def test_the_members_that_disagree_most_by_hand() -> None:
    """Of the plausible 0, 1 and 3 the margin of 0 and 3 is seen as 4 and as -3: a spread of 7."""
    members = np.array([[4.0, 1.0, -9.0, 0.0], [0.0, 3.5, -9.0, 3.0], [1.0, 1.0, -9.0, 4.0]])
    assert pair_selection.plausible(members).tolist() == [0, 1, 3]
    assert pair_selection.most_disagreeing(members, np.array([0, 1, 3])) == (0, 3, 7.0)
    result = pair_selection.select(
        PairSettings(selection="most_disagreeing"), candidates([4.0, 1.0, -9.0, 0.0], members=members)
    )
    assert (result.chosen.tolist(), result.rejected.tolist()) == ([0], [3])
    assert result.metrics == {
        "pairs": 1.0, "plausible_completions": 3.0, "settled_ratio": 0.0, "pair_disagreement": 7.0
    }  # fmt: skip


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, math.log(2) - 0.5), (8, math.log(8) - 7 / 8)])
def test_the_divergence_of_the_best_of_n(n: int, nats: float) -> None:
    assert pair_selection.best_of_n_kl(n) == pytest.approx(nats, abs=1e-12)


@pytest.mark.parametrize("rewards", [[0.0, 1.0, 2.0], [5.0, 5.0, 1.0]])
def test_acceptance_carries_samples_from_one_temperature_to_the_next(rewards: list[float]) -> None:
    values = np.array(rewards)
    first = pair_selection.acceptance(values, 2.0, None)
    assert first == pytest.approx(np.exp((values - values.max()) / 2.0), abs=1e-12)
    later = pair_selection.acceptance(values, 0.5, 2.0)
    assert later == pytest.approx(np.exp((1 / 0.5 - 1 / 2.0) * (values - values.max())), abs=1e-12)


# ---- terms in the loss, by their share


def test_every_regularizer_in_the_loss_is_told_under_its_own_name() -> None:
    subject = objective(
        objective={"correction": "none"},
        regularizer={
            "kl": {"coefficient": 0.3, "placement": "loss", "estimator": "k2"},
            "entropy": {"form": "token_bonus", "coefficient": 0.2},
        },
    )
    lengths = torch.tensor([2.0, 1.0], dtype=torch.float64)
    rows = Rows(
        torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64), lengths, torch.tensor([0, 0, 1]),
        torch.zeros(3, dtype=torch.float64), reference=torch.tensor([-1.0, -3.0, 0.5], dtype=torch.float64),
    )  # fmt: skip
    logprobs = torch.tensor([-1.5, -2.0, -1.0], dtype=torch.float64)
    entropies = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    result = subject.loss(rows, Outputs(logprobs, entropies), Credit(np.ones(3), 2, 3))
    kl = (0.5**2 + 1.0**2 + 1.5**2) / 2 / 2
    assert result.sums["kl_loss_nats"] == pytest.approx(kl) and result.sums["kl_loss"] == pytest.approx(0.3 * kl)
    assert result.sums["policy_entropy_nats"] == pytest.approx(1.5)
    assert result.sums["entropy_loss"] == pytest.approx(-0.3)
    assert result.sums["policy_loss"] == pytest.approx(-(1 + 1 - 2) / 2)
    assert result.loss.item() == pytest.approx(0.0 + 0.3 * kl - 0.3) == pytest.approx(result.sums["loss"])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_exact_kl_is_drawn_by_seed_and_version(share: float) -> None:
    term, seeds, lengths = ExactKL(share), np.arange(40), np.arange(40) % 5 + 1
    result = term.select(seeds, lengths, 3)
    if share == 1:
        assert result is None
        return
    assert result is not None and result.shape == (lengths.sum(),)
    assert result.mean() == pytest.approx(share, abs=0.15)
    expected = [np.random.default_rng([seed, 3]).random(n) < share for seed, n in zip(seeds, lengths, strict=True)]
    assert result.tolist() == np.concatenate(expected).tolist()
    again, other = term.select(seeds, lengths, 3), term.select(seeds, lengths, 4)
    assert again is not None and other is not None
    assert again.tolist() == result.tolist() != other.tolist()
