"""MaxEnt identities, preference losses, pairs and weighted likelihood against the numbers of the reference."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from keel.algorithms import pair_selection, preferences, reward_ensembles, weighted_likelihood
from keel.algorithms.objective import Objective
from keel.algorithms.pair_selection import Candidates
from keel.algorithms.preferences import PAIR_LOSSES, Sequences, pair_logits, ranking_loss
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config.objective import PreferenceSettings
from keel.config.pairs import PairSettings
from tabular import objective, rollout


def settings(loss: str, **more: Any) -> PreferenceSettings:
    return PreferenceSettings(kind="preference", loss=loss, **more)


def sequences(policy: np.ndarray, lengths: list[int], gamma: list[float] | None = None) -> Sequences:
    size = len(lengths)
    numbers = (policy, np.zeros(size), np.array(lengths), np.array(gamma if gamma is not None else [0.0] * size))
    return Sequences(*(torch.tensor(x, dtype=torch.float64) for x in numbers))


def logit(rows: Sequences, chosen: int, rejected: int, config: PreferenceSettings) -> float:
    return pair_logits(rows, torch.tensor([chosen]), torch.tensor([rejected]), config).item()


def test_maximum_entropy_policy_answers_bradley_terry() -> None:
    """P1a: r = [1, .5, -.2], alpha .5: beta (S_w - S_l) gives the rewards back, log Z cancels."""
    rewards = np.array([1.0, 0.5, -0.2])
    policy = weighted_likelihood.divergence_weights(rewards, "kl", 0.5) / 3
    assert policy == pytest.approx([0.6855901456, 0.2522145196, 0.0621953348], abs=1e-9)
    value = policy @ rewards - 0.5 * policy @ np.log(policy)
    assert value == pytest.approx(1.1887376426, abs=1e-9)
    assert value == pytest.approx(0.5 * 2.3774752852, abs=1e-9)
    rows = sequences(np.log(policy), [3, 1, 7])
    for chosen, rejected in ((0, 1), (1, 2), (0, 2)):
        result = logit(rows, chosen, rejected, settings("cpo", beta=0.5))
        assert result == pytest.approx(rewards[chosen] - rewards[rejected], abs=1e-12)


def test_simpo_is_maximum_entropy_up_to_a_length_term() -> None:
    """P1b: r = [1, .3, -.2], |y| = [2, 4, 5], beta 2: r_1 - r_2 = .7 = SimPO's logit .2 + length term .5."""
    rewards, lengths = np.array([1.0, 0.3, -0.2]), [2, 4, 5]
    temperatures = 2.0 / np.array(lengths)
    policy = np.exp((rewards - 0.4373697355) / temperatures - 1)
    assert policy == pytest.approx([0.645732637, 0.2795037776, 0.0747635854], abs=1e-9)
    assert policy @ (rewards - temperatures * np.log(policy)) == pytest.approx(1.2527596954, abs=1e-9)
    normalized = np.exp(rewards / temperatures) / np.exp(rewards / temperatures).sum()
    assert normalized @ (rewards - temperatures * np.log(normalized)) == pytest.approx(1.2325, abs=5e-5)
    rows = sequences(np.log(policy), lengths)
    assert logit(rows, 0, 1, settings("simpo", beta=2.0)) == pytest.approx(0.2, abs=1e-9)
    for chosen, rejected in ((0, 1), (1, 2), (0, 2)):
        result = logit(rows, chosen, rejected, settings("simpo", beta=2.0, exact_length_margin=True))
        assert result == pytest.approx(rewards[chosen] - rewards[rejected], abs=1e-9)


def test_plackett_luce() -> None:
    """P1c: scores [-.8, -1.8, -1.4], best first; the first two alone are Bradley-Terry."""
    scores = torch.tensor([-0.8, -1.8, -1.4], dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(scores, 0.0)
    assert loss.item() == pytest.approx(1.5636155544, abs=1e-9)
    expected = [-0.4782675143, -0.4067530048, 0.8850205192]
    assert torch.autograd.grad(loss, scores)[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert ranking_loss(scores[:2], 0.0).item() == pytest.approx(0.3132616875, abs=1e-9)


CHOSEN, REJECTED = [-0.5, -1.0, -0.2], [-0.7, -0.3, -1.5, -0.9]
PAIR = rollout([CHOSEN, REJECTED], [1.0, 0.0], reference=[[-0.6, -0.9, -0.4], [-0.5, -0.4, -1.2, -0.8]])
MEASURED = Measured(np.array(CHOSEN + REJECTED))
SIMPO = {"beta": 2.0, "target_margin": 1.0}


def weighed(**config: Any) -> Credit:
    return objective(objective={"kind": "preference", **config}).weigh(PAIR, MEASURED)


PHI = (0.2 + math.exp(0.2), -0.5 + math.exp(-0.5))
WRONG = 1 / (1 + math.exp(0.1 * (PHI[0] - PHI[1])))
CHI_PO = (-math.log(1 - WRONG), -0.1 * WRONG * (1 + math.exp(0.2)), 0.1 * WRONG * (1 + math.exp(-0.5)))
"""2407.13399: h = (.2, -.5), phi = h + exp(h), beta .1; d phi / d S = 1 + exp(h)."""


@pytest.mark.parametrize(
    ("config", "loss", "won", "lost"),
    [
        ({"loss": "simpo", **SIMPO}, 0.9331046878, -0.4044462374, 0.3033346781),
        ({"loss": "simpo_hinge", **SIMPO}, 1.4333333333, -2 / 3, 0.5),
        ({"loss": "dpo"}, 0.6587595555, -0.0482507142, 0.0482507142),
        ({"loss": "chi_po"}, *CHI_PO),
        ({"loss": "dpo", "label_smoothing": 0.1}, 0.6657595555, -0.0382507142, 0.0382507142),
        ({"loss": "ipo_sum"}, 18.49, 2 * (0.7 - 5), -2 * (0.7 - 5)),
        ({"loss": "ipo_average"}, 23.1200694444, 2 * (0.1916666667 - 5) / 3, -2 * (0.1916666667 - 5) / 4),
        ({"loss": "dpo", "likelihood_coefficient": 0.0005}, 0.6596095555, -0.0487507142, 0.0482507142),
        (
            {"loss": "dpo", "likelihood_coefficient": 0.2, "likelihood": "average"},
            0.7720928889,
            -0.0482507142 - 0.2 / 3,
            0.0482507142,
        ),
    ],
    ids=["simpo", "simpo_hinge", "dpo", "chi_po", "cdpo", "ipo_sum", "ipo_average", "rpo", "rpo_average"],
)
def test_losses_of_a_pair(config: dict[str, Any], loss: float, won: float, lost: float) -> None:
    """P2a and P6_rpo: loss, and its derivative by every token's log-prob, which is -advantage / rows."""
    credit = weighed(**config)
    assert credit.metrics["preference_loss"] == pytest.approx(loss, abs=1e-9)
    assert (-credit.advantages / credit.num_rows).tolist() == pytest.approx([won] * 3 + [lost] * 4, abs=1e-9)
    assert credit.metrics["preference_accuracy_ratio"] == 1.0  # which ignores the margin
    assert credit.counts == {"pairs_dropped_total": {}}


def test_logits_of_a_pair() -> None:
    """P2a: SimPO's logit -.4333, DPO's h = .7, IPO's average h = .1917; what is logged beside them."""
    rows = Sequences(
        policy=torch.tensor([-1.7, -3.4], dtype=torch.float64),
        reference=torch.tensor([-1.9, -2.9], dtype=torch.float64),
        lengths=torch.tensor([3.0, 4.0], dtype=torch.float64),
        uncertainty=torch.zeros(2, dtype=torch.float64),
    )
    assert logit(rows, 0, 1, settings("simpo", **SIMPO)) == pytest.approx(-0.4333333333, abs=1e-9)
    assert logit(rows, 0, 1, settings("dpo")) / 0.1 == pytest.approx(0.7, abs=1e-9)
    assert logit(rows, 0, 1, settings("ipo_average")) / 0.1 == pytest.approx(0.1916666667, abs=1e-9)
    simpo = settings("simpo", **SIMPO)
    loss = PAIR_LOSSES["simpo"][1](pair_logits(rows, torch.tensor([0]), torch.tensor([1]), simpo), simpo)
    assert loss.tolist() == pytest.approx([0.9331046878], abs=1e-9)
    seen = weighed(loss="simpo", **SIMPO).metrics
    names = ("chosen_implicit_reward", "rejected_implicit_reward", "implicit_margin", "chosen_log_ratio_nats")
    assert [seen[name] for name in names] == pytest.approx([-1.1333333333, -1.7, 0.5666666667, 0.2], abs=1e-9)
    assert (seen["chosen_logprob_nats"], seen["rejected_log_ratio_nats"]) == pytest.approx((-1.7, -0.5), abs=1e-9)


def test_the_model_is_trained_by_the_derivative() -> None:
    """P2a through weigh and loss: a token's log-prob has the gradient of the preference loss itself."""
    subject, credit = objective(objective={"kind": "preference", "loss": "dpo"}), weighed(loss="dpo")
    logprobs = torch.tensor(CHOSEN + REJECTED, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(trained(subject, credit, logprobs, [3, 4]), logprobs)
    assert gradient.tolist() == pytest.approx([-0.0482507142] * 3 + [0.0482507142] * 4, abs=1e-9)


def trained(subject: Objective, credit: Credit, logprobs: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    rows = Rows(
        advantages=torch.from_numpy(credit.advantages),
        lengths=torch.tensor(lengths, dtype=torch.float64),
        row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        sampler=logprobs.detach(),
    )
    return subject.loss(rows, Outputs(logprobs), credit).loss


def test_pessimistic_dpo() -> None:
    """P7 pess_dpo: h = .7, beta .1, Gamma .05 and .25: logit -.13."""
    config = settings("dpo", pessimism=1.0)
    rows = sequences(np.array([0.7, 0.0]), [1, 1], gamma=[0.05, 0.25])
    assert logit(rows, 0, 1, config) == pytest.approx(-0.13, abs=1e-12)
    loss = preferences.sigmoid_loss(torch.tensor([logit(rows, 0, 1, config)], dtype=torch.float64), config)
    assert loss.item() == pytest.approx(0.7602581947, abs=1e-9)


def test_pessimism_reads_the_deviation_of_the_centered_ensemble() -> None:
    """Three completions: members centered per prompt are [-1, 0, 1] and [-2, 0, 2]; deviations .5, 0, .5."""
    members = {"reward_a": [9.0, 10.0, 11.0], "reward_b": [1.0, 3.0, 5.0]}
    batch = rollout([[-1.0], [-2.0], [-1.5]], [10.0, 13.0, 16.0], reference=[[-1.0]] * 3, **members)
    config = {"kind": "preference", "loss": "dpo", "pessimism": 0.4, "pairs": {"selection": "max_max"}}
    credit = objective(objective=config).weigh(batch, Measured(np.array([-1.0, -2.0, -1.5])))
    logit_ = 0.1 * (-0.5 + 1.0) + 0.4 * 0.5
    assert credit.metrics["preference_loss"] == pytest.approx(np.log1p(np.exp(-logit_)), abs=1e-12)


PI0, REWARDS = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])


def test_rejection_sampling_reaches_the_gibbs_policy() -> None:
    """P7 gibbs: pi_0 exp(r) in one stage or two; acceptance .378, or .566 and .668; the rate gives J back."""
    gibbs = [0.1790000206, 0.2919435019, 0.5290564775]
    kept = PI0 * pair_selection.acceptance(REWARDS, 1.0, None)
    assert kept.sum() == pytest.approx(0.378031474, abs=1e-9)
    assert kept / kept.sum() == pytest.approx(gibbs, abs=1e-9)
    assert 2.0 + np.log(kept.sum()) == pytest.approx(1.0272221776, abs=1e-9)
    first = PI0 * pair_selection.acceptance(REWARDS, 2.0, None)
    second = first / first.sum() * pair_selection.acceptance(REWARDS, 1.0, 2.0)
    assert (first.sum(), second.sum()) == pytest.approx((0.5658989185, 0.6680194318), abs=1e-9)
    assert second / second.sum() == pytest.approx(gibbs, abs=1e-9)
    pessimistic = PI0 * pair_selection.acceptance(REWARDS - [0.0, 0.1, 0.9], 1.0, None)
    assert pessimistic / pessimistic.sum() == pytest.approx([0.2719291649, 0.4013026919, 0.3267681432], abs=1e-9)


def test_best_of_n_kl() -> None:
    """P7 bon: log n - (n-1)/n for n = 2, 4, 8, 16, 64."""
    expected = [0.1931471806, 0.6362943611, 1.2044415417, 1.8350887222, 3.1745080834]
    assert [pair_selection.best_of_n_kl(n) for n in (2, 4, 8, 16, 64)] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("penalty", "chosen"), [(0.0, 1), (0.01, 4)])
def test_pairs_of_best_and_worst(penalty: float, chosen: int) -> None:
    """P7 pairs: the first of two equal best, or the shorter one when tokens cost .01; worst 6, margin 1.6."""
    rewards = np.array([0.1, 0.9, -0.4, 0.3, 0.9, 0.0, -0.7, 0.5])
    lengths = np.array([10, 60, 20, 30, 15, 12, 40, 33])
    seen = Candidates(np.zeros(8), np.arange(8), rewards, rewards, lengths, np.ones(8, bool), rewards[None])
    pairs = pair_selection.select(PairSettings(length_penalty=penalty), seen)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([chosen], [6])
    assert pair_selection.select(PairSettings(length_penalty=penalty, min_margin=1.59), seen).metrics["pairs"] == 1
    assert pair_selection.select(PairSettings(length_penalty=penalty, min_margin=1.61), seen).dropped == {"tie": 1}


ENSEMBLE = np.array([[0.6, 0.3, 0.5, -2.0], [0.55, 0.9, 0.4, 0.2], [0.5, 0.1, 1.6, -1.0]])


def test_ensemble_of_rewards() -> None:
    """P8_simoprl: mean, lower bound and deviation over members; pessimism chooses 0, the mean 2."""
    mean = reward_ensembles.combine(ENSEMBLE, np.ones(3), "mean", 1.0)
    assert mean == pytest.approx([0.55, 0.4333333333, 0.8333333333, -0.9333333333], abs=1e-9)
    lower = reward_ensembles.combine(ENSEMBLE, np.ones(3), "lower_bound", 1.0)
    assert lower == pytest.approx([0.509175171, 0.0933986991, 0.289683119, -1.8327158375], abs=1e-9)
    assert mean - lower == pytest.approx([0.040824829, 0.3399346342, 0.5436502143, 0.8993825042], abs=1e-9)
    assert (lower.argmax(), mean.argmax()) == (0, 2)


def test_most_disagreeing_pair_of_the_plausible_set() -> None:
    """P8_simoprl: (1, 2) at 2.0 among the plausible; among all it would be the garbage of (2, 3) at 2.4."""
    assert pair_selection.plausible(ENSEMBLE).tolist() == [0, 1, 2]
    result = pair_selection.most_disagreeing(ENSEMBLE, pair_selection.plausible(ENSEMBLE))
    assert result == (1, 2, pytest.approx(2.0, abs=1e-12))
    assert pair_selection.most_disagreeing(ENSEMBLE, np.arange(4)) == (2, 3, pytest.approx(2.4, abs=1e-12))
    rewards = ENSEMBLE.mean(0)
    seen = Candidates(np.zeros(4), np.arange(4), rewards, rewards, np.ones(4), np.ones(4, bool), ENSEMBLE)
    pairs = pair_selection.select(PairSettings(selection="most_disagreeing"), seen)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([2], [1])
    assert pairs.metrics["pair_disagreement"] == pytest.approx(2.0, abs=1e-12)
    assert pairs.metrics["plausible_completions"] == 3


OPTIDICE = {
    "kl": [2.6289320913, 0.3557872692, 0.0481505708, 0.9671300686],
    "chi2": [2.3333333333, 0.3333333333, 0.0, 1.3333333333],
    "soft_chi2": [2.235668372, 0.4656450511, 0.0630182049, 1.235668372],
}


@pytest.mark.parametrize("form", list(OPTIDICE))
def test_optidice_weights(form: str) -> None:
    """P9_optidice: r = [1, 0, -1, .5], alpha .5."""
    rewards = np.array([1.0, 0.0, -1.0, 0.5])
    result = weighted_likelihood.divergence_weights(rewards, form, 0.5)
    assert result == pytest.approx(OPTIDICE[form], abs=1e-9)
    assert weighted_likelihood.divergence_weights(rewards + 7.0, form, 0.5) == pytest.approx(OPTIDICE[form], abs=1e-9)


def test_optidice_normalizers() -> None:
    """P9_optidice: nu = .0167111426 where w = exp(e / alpha - 1), 1/3 where w = e / alpha + 1."""
    result = {
        form: weighted_likelihood.divergence_weights(np.array([1.0, 0.0, -1.0, 0.5]), form, 0.5)[0] for form in OPTIDICE
    }
    assert 1 - 0.5 * (np.log(result["kl"]) + 1) == pytest.approx(0.0167111426, abs=1e-9)
    assert 1 - 0.5 * (result["chi2"] - 1) == pytest.approx(1 / 3, abs=1e-9)


@pytest.mark.parametrize(("weights", "loss", "samples"), [("chi2", 3.25, 2.1818), ("uniform", 2.625, 4.0)])
def test_weighted_likelihood(weights: str, loss: float, samples: float) -> None:
    """P9_optidice: log pi = [-3, -2, -1.5, -4], weighted 3.25, plain 2.625."""
    logprobs = [[-1.0, -2.0], [-2.0], [-0.5, -0.5, -0.5], [-4.0]]
    config = {"kind": "weighted_likelihood", "weights": weights, "temperature": 0.5, "likelihood": "sum"}
    subject = objective(objective=config)
    credit = subject.weigh(rollout(logprobs, [1.0, 0.0, -1.0, 0.5]), Measured())
    flat = torch.from_numpy(np.concatenate(logprobs))
    assert trained(subject, credit, flat, [2, 1, 3, 1]).item() == pytest.approx(loss, abs=1e-9)
    assert credit.metrics["effective_samples"] == pytest.approx(samples, abs=5e-5)
    assert credit.metrics["best_reward"] == 1.0
    assert credit.metrics["best_of_n_kl_nats"] == pytest.approx(0.6362943611, abs=1e-9)
