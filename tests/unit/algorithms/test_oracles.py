"""Policy gradients, KL estimators, LCO, critics and controllers against the numbers of the algorithm reference."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keel.algorithms import logits_convexity, regularizers, reward_ensembles
from keel.algorithms.logits_convexity import ConvexTerm
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config.objective import LogitsConvexitySettings
from keel.learner.networks import TokenLogprobs
from keel.schema import row_sums
from tabular import objective, rollout

GAE_BATCH = rollout([[-1.0, -1.0, -1.0]], [1.5], reference=[[-1.2, -0.9, -1.4]])
GAE_VALUES = np.array([[0.3], [0.6], [0.9]])


def test_gae() -> None:
    """P2b_gae: token KL [.2, -.1, .4] at .05, score 1.5 at the end, V = [.3, .6, .9], discount 1, lambda .95."""
    config: dict[str, Any] = {"advantage": "gae", "critic": {}}
    kl = {"kl": {"coefficient": 0.05}}
    plain = objective(objective={**config, "whiten": "none"}, regularizer=kl).weigh(
        GAE_BATCH, Measured(values=GAE_VALUES)
    )
    assert plain.advantages == pytest.approx([1.1032, 0.856, 0.58], abs=1e-9)
    assert plain.targets is not None and plain.old_values is not None
    assert plain.targets[:, 0] == pytest.approx([1.4032, 1.456, 1.48], abs=1e-9)
    assert plain.old_values[:, 0] == pytest.approx([0.3, 0.6, 0.9], abs=1e-12)
    whitened = objective(objective=config, regularizer=kl).weigh(GAE_BATCH, Measured(values=GAE_VALUES))
    # the oracle has TRL's 1e-8 under the root, which is 7e-8 here
    assert whitened.advantages == pytest.approx([0.981155938, 0.0366787267, -1.0178346646], abs=1e-7)
    assert whitened.targets is not None
    assert whitened.targets[:, 0] == pytest.approx([1.4032, 1.456, 1.48], abs=1e-9)  # never whitened


def test_reinforce_pp() -> None:
    """P2b_reinforcepp: rewards [-.01, .02, .97 | .005, -.51]; whitened over all tokens, population deviation."""
    x = [[0.01, -0.02, 0.03], [-0.005, 0.01]]
    batch = rollout(x, [1.0, -0.5], tickets=[0, 1], reference=[[0.0] * 3, [0.0] * 2])
    kl = {"kl": {"coefficient": 1.0}}
    to_go = objective(objective={"advantage": "reinforce_pp", "whiten": "none"}, regularizer=kl)
    assert to_go.weigh(batch, Measured()).advantages == pytest.approx([0.98, 0.99, 0.97, -0.505, -0.51], abs=1e-9)
    whitened = objective(objective={"advantage": "reinforce_pp"}, regularizer=kl).weigh(batch, Measured()).advantages
    expected = [0.81646391, 0.8301859925, 0.8027418274, -1.2212653443, -1.2281263856]
    assert whitened == pytest.approx(expected, abs=1e-9)


LOG_P = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64).log_softmax(-1)
LOG_R = torch.tensor([0.0, 0.3, 0.5], dtype=torch.float64).log_softmax(-1)
OF_KL = [-0.0123483624, -0.139546433, 0.1518947954]
OF_K3 = [0.0185748682, -0.2041701201, 0.1855952519]


def sampled_gradient(loss: Any, weights: Tensor = LOG_P) -> list[float]:
    """Gradient by the logits of sum_a w(a) loss(a), the expectation of a loss under the sampler."""
    logits = LOG_P.clone().requires_grad_()
    total = (weights.exp() * loss(logits.log_softmax(-1))).sum()
    return torch.autograd.grad(total, logits)[0].tolist()


def in_the_reward(estimate: Any) -> Any:
    """The surrogate of a penalty in the reward: detached, times the log-prob."""
    return lambda log_p: estimate(log_p.detach(), LOG_R) * log_p


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (in_the_reward(lambda p, r: p - r), OF_KL),
        (lambda log_p: log_p - LOG_R, [0.0, 0.0, 0.0]),
        (lambda log_p: regularizers.kl_k2(log_p, LOG_R), OF_KL),
        (lambda log_p: regularizers.kl_k3_k2(log_p, LOG_R), OF_KL),
        (lambda log_p: regularizers.kl_k3(log_p, LOG_R), OF_K3),
        (in_the_reward(regularizers.kl_k2), [-0.0260352859, 0.0442200933, -0.0181848074]),
        (in_the_reward(regularizers.kl_k3), [-0.0309232306, 0.0646236872, -0.0337004566]),
    ],
    ids=["k1 reward", "k1 loss", "k2 loss", "k3_k2 loss", "k3 loss", "k2 reward", "k3 reward"],
)
def test_gradients_of_kl_estimators(loss: Any, expected: list[float]) -> None:
    """P2c_kl: where an estimator lives decides its gradient."""
    assert sampled_gradient(loss) == pytest.approx(expected, abs=1e-9)


def test_moments_of_kl_estimators() -> None:
    """P2c_kl: expectations and variances of k1, k2, k3."""
    p = LOG_P.exp()
    k1, k2, k3 = LOG_P - LOG_R, regularizers.kl_k2(LOG_P, LOG_R), regularizers.kl_k3(LOG_P, LOG_R)
    means = [float(p @ k) for k in (k1, k2, k3)]
    assert means == pytest.approx([0.1176064084, 0.0994730694, 0.1176064084], abs=1e-9)
    variances = [float(p @ (k - p @ k).square()) for k in (k1, k3)]
    assert variances == pytest.approx([0.1851148716, 0.0367613365], abs=1e-9)
    assert regularizers.kl_k3_k2(LOG_P, LOG_R).tolist() == pytest.approx(k3.tolist(), abs=1e-12)


def test_exact_kl() -> None:
    """P2c_kl: the sum over the vocabulary, and its gradient without sampling; halved tokens count twice."""
    logits = LOG_P.clone().requires_grad_()
    term = regularizers.ExactKL(share=0.5)
    (value,) = term(logits[None], torch.tensor([0]), torch.zeros(1), {"reference": LOG_R[None]})
    assert value.item() == pytest.approx(2 * 0.1176064084, abs=1e-9)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.tolist() == pytest.approx([2 * x for x in OF_KL], abs=1e-9)


@pytest.mark.parametrize(("estimator", "expected"), [("k2", OF_KL), ("k3_k2", OF_KL), ("k3", OF_KL)])
def test_importance_weighted_kl_of_stale_samples(estimator: str, expected: list[float]) -> None:
    """Sampled from another policy, every weighted loss has the gradient of KL(pi, ref), that of P2c_kl."""
    sampler = torch.tensor([0.6, 0.1, 0.4], dtype=torch.float64).log_softmax(-1)

    def loss(log_p: Tensor) -> Tensor:
        return regularizers.weighted_kl(estimator, log_p, LOG_R, sampler, cap=10.0)

    assert sampled_gradient(loss, sampler) == pytest.approx(expected, abs=1e-9)
    unweighted = sampled_gradient(lambda log_p: regularizers.KL_LOSSES[estimator](log_p, LOG_R), sampler)
    assert unweighted != pytest.approx(expected, abs=1e-2)


APART = torch.linspace(-100.0, 100.0, 401, dtype=torch.float64)
"""x = log pi - log ref."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", list(regularizers.KL_LOSSES))
def test_no_estimator_pulls_away_from_the_reference(estimator: str, dtype: torch.dtype) -> None:
    """The slope has the sign of x wherever x is, and values are finite, not negative and fall towards x = 0."""
    x = APART.clone().to(dtype).requires_grad_()
    values = regularizers.KL_LOSSES[estimator](x, torch.zeros_like(x))
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert torch.isfinite(values).all() and torch.isfinite(slope).all()
    assert (slope.sign() == x.sign()).all()
    assert (values >= 0).all() and values[200] == 0
    assert (values[:200].diff() < 0).all() and (values[200:].diff() > 0).all()


def test_k3_continues_as_its_tangent() -> None:
    """exp(-x) - 1 + x down to x = -20; below, the tangent there, so gradients neither jump nor vanish."""
    x = APART.clone().requires_grad_()
    values = regularizers.kl_k3(x, torch.zeros_like(x))
    (slope,) = torch.autograd.grad(values.sum(), x)
    values, near = values.detach(), APART >= -20
    assert values[near].tolist() == pytest.approx((torch.expm1(-APART) + APART)[near].tolist(), rel=1e-12, abs=1e-12)
    assert slope[near].tolist() == pytest.approx((1 - torch.exp(-APART))[near].tolist(), rel=1e-12, abs=1e-12)
    top = np.exp(20.0)
    assert slope[~near].tolist() == pytest.approx([1 - top] * int((~near).sum()), rel=1e-12)
    tangent = top - 1 - 20 + (1 - top) * (APART[~near].numpy() + 20)
    assert values[~near].tolist() == pytest.approx(tangent.tolist(), rel=1e-12)


@pytest.mark.parametrize("sampler", [0.0, -3.0, -40.0, 30.0, "policy"])
@pytest.mark.parametrize("estimator", list(regularizers.KL_LOSSES))
def test_no_weighted_estimator_pulls_away_from_the_reference(estimator: str, sampler: float | str) -> None:
    """Under any sampler, also where weights are cut: its log-probs are relative to the reference's 0."""
    x = APART.clone().requires_grad_()
    mu = APART if sampler == "policy" else torch.full_like(APART, float(sampler))
    values = regularizers.weighted_kl(estimator, x, torch.zeros_like(x), mu, cap=2.0)
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert torch.isfinite(values).all() and (slope.sign() == x.sign()).all()


@pytest.mark.parametrize("ratio", [-0.3, 0.0, 0.4])
def test_the_slope_of_weighted_k3_is_that_of_its_value(ratio: float) -> None:
    """pi/mu k3 differentiated as a whole: (pi/mu) x, at x on both sides of -20."""
    for x in (-60.0, -19.0, -1.0, 1e-4, 3.0):
        at = torch.tensor([x], dtype=torch.float64)

        def value(log_p: Tensor, at: Tensor = at) -> Tensor:
            return regularizers.weighted_kl("k3", log_p, torch.zeros(1), at - ratio, cap=2.0)

        numeric = (value(at + 1e-6) - value(at - 1e-6)).item() / 2e-6
        probe = at.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(probe).sum(), probe)
        assert slope.item() == pytest.approx(np.exp(ratio) * x, rel=1e-12)
        assert numeric == pytest.approx(slope.item(), rel=1e-6, abs=1e-9 * abs(value(at).item()) / 1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3_k2"])
@pytest.mark.parametrize(
    ("blocks", "cap"),
    [({"correction_cap": 3.0}, 3.0), ({}, 2.0), ({"kind": "preference"}, regularizers.MAX_WEIGHT)],
)
def test_the_weight_of_the_kl_is_cut_at_the_cap_of_the_objective(
    estimator: str, blocks: dict[str, Any], cap: float
) -> None:
    """pi / sampler = e^-1, e^.5 and e^5, of which the last is above every cap; slope and value x = 2 times the weight."""
    kl = {"placement": "loss", "estimator": estimator, "coefficient": 1.0, "importance_weighted": True}
    built = objective(objective=blocks, regularizer={"kl": kl})
    logprobs = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    sampler = logprobs.detach() - torch.tensor([-1.0, 0.5, 5.0], dtype=torch.float64)
    rows = Rows(
        advantages=torch.zeros(3, dtype=torch.float64),
        lengths=torch.ones(3, dtype=torch.float64),
        row_of_item=torch.arange(3),
        sampler=sampler,
        reference=logprobs.detach() - 2.0,
    )
    tokens = built._kl_tokens(rows, Outputs(logprobs))
    weights = np.minimum(np.exp([-1.0, 0.5, 5.0]), cap)
    value = 2.0 if estimator == "k2" else np.exp(-2.0) - 1 + 2
    assert tokens.tolist() == pytest.approx((weights * value).tolist(), rel=1e-12)
    (slope,) = torch.autograd.grad(tokens.sum(), logprobs)
    assert slope.tolist() == pytest.approx((weights * 2.0).tolist(), rel=1e-12)


LENGTHS = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
SCORES = torch.tensor([1.0, 0.3, -0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("form", "policy", "reached", "mean_length"),
    [
        ("sequence_mean_naive", [0.731, 0.265, 0.004], 1.628, 1.29),
        ("sequence_mean_exact", [0.530, 0.380, 0.090], 1.739, 1.83),
    ],
)
def test_where_the_two_forms_of_a_mean_entropy_end(
    form: str, policy: list[float], reached: float, mean_length: float
) -> None:
    """Answers of 1, 2 and 6 tokens, scores 1, .3, -.2, beta 2: there, and there alone, the reward is constant."""
    p = torch.tensor(policy, dtype=torch.float64)
    p = p / p.sum()
    totals = p.log()
    flat = np.repeat((totals / LENGTHS).numpy(), LENGTHS.int().numpy())
    lengths = LENGTHS.int().numpy().astype(np.int64)
    paid = SCORES.numpy() + 2 * row_sums(regularizers.entropy_reward(form, flat, lengths), lengths)
    assert np.ptp(paid[:2]) < 0.02 and np.ptp(paid) < 0.1  # to the three digits of these probabilities
    assert float(p @ (SCORES - 2 / LENGTHS * totals)) == pytest.approx(reached, abs=2e-3)
    assert float(p @ LENGTHS) == pytest.approx(mean_length, abs=0.01)
    other = {"sequence_mean_naive": "sequence_mean_exact", "sequence_mean_exact": "sequence_mean_naive"}[form]
    assert np.ptp(SCORES.numpy() + 2 * row_sums(regularizers.entropy_reward(other, flat, lengths), lengths)) > 1


def test_sequence_kl_needs_the_reward() -> None:
    """P2c_seqkl: two choices; k2 token by token leaves out that the first leads to the divergence of the second."""
    subject = torch.tensor([-1.0, 3.0], dtype=torch.float64, requires_grad=True)

    def paths(theta: Tensor, phi: Tensor, after_b: Tensor) -> Tensor:
        """[4, 2] log-probs: a then its two answers, b then its two."""
        zero = torch.zeros_like(theta)
        first = torch.stack([zero, theta]).log_softmax(0).repeat_interleave(2)
        return torch.stack([first, torch.cat([torch.stack([phi, zero]).log_softmax(0), after_b.log()])], dim=1)

    pi = paths(*subject, torch.tensor([0.5, 0.5], dtype=torch.float64))
    ref = paths(*torch.tensor([0.5, 0.2], dtype=torch.float64), torch.tensor([0.8, 0.2], dtype=torch.float64))
    totals, weights = pi.sum(1), pi.sum(1).exp().detach()
    flat = (pi.detach().numpy().ravel(), ref.numpy().ravel(), np.full(4, 2))
    losses = [
        torch.from_numpy(regularizers.sequence_kl(*flat)) * totals,
        regularizers.kl_k2(totals, ref.sum(1)),
        regularizers.kl_k2(pi, ref).sum(1),
    ]
    result = [torch.autograd.grad((weights * loss).sum(), subject, retain_graph=True)[0].tolist() for loss in losses]
    exact, by_token = [-0.3329850219, 0.0924749969], [-0.2949178999, 0.0924749969]
    assert result == [pytest.approx(exact, abs=1e-9), pytest.approx(exact, abs=1e-9), pytest.approx(by_token, abs=1e-9)]


OLD = torch.tensor([[1.0, 0.5, 0.0, -1.0]], dtype=torch.float64)
TARGET = torch.tensor([[1.0, 2.1, 0.0, -1.0]], dtype=torch.float64)
TOKEN_1 = torch.tensor([0, 1, 0, 0], dtype=torch.float64)
KLD = [0.2521325086, -0.3790092994, 0.0927543664, 0.0341224245]


@pytest.mark.parametrize(
    ("form", "value", "gradient"),
    [
        ("mse", 1.28, [0.0, -1.6, 0.0, 0.0]),
        ("log_cosh", 0.9468061526, [0.0, -0.9216685544, 0.0, 0.0]),
        ("kl", 0.3072498979, KLD),
    ],
)
def test_lco_distances(form: str, value: float, gradient: list[float]) -> None:
    """P3_lco: z_old = [1, .5, 0, -1], token 1 with A / eta = 1.6."""
    logits = OLD.clone().requires_grad_()
    (result,) = logits_convexity.distance(logits, TARGET, form)
    assert result.item() == pytest.approx(value, abs=1e-9)
    assert torch.autograd.grad(result, logits)[0][0].tolist() == pytest.approx(gradient, abs=1e-9)
    expected = [0.2218583377, 0.6664992801, 0.0816171213, 0.030025261]
    assert TARGET.softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-9)


def lco(advantage: float, other: Tensor = OLD, **settings: Any) -> tuple[float, list[float]]:
    """Loss and gradient at z_old through the term as the learner calls it."""
    term = ConvexTerm(LogitsConvexitySettings(kind="logits_convexity", **settings))
    logits = OLD.clone().requires_grad_()
    others = dict.fromkeys(term.models, other)
    (result,) = term(logits, torch.tensor([1]), torch.tensor([advantage], dtype=torch.float64), others)
    return result.item(), torch.autograd.grad(result, logits)[0][0].tolist()


def test_lco_term() -> None:
    """P3_lco through ConvexTerm; mse and log_cosh see the error without its mean: 1.6 (onehot - 1/4)."""
    value, gradient = lco(0.8, form="kl", temperature=0.5)
    assert value == pytest.approx(0.3072498979, abs=1e-9)
    assert gradient == pytest.approx(KLD, abs=1e-9)
    kept = lco(0.8, form="kl", temperature=0.5, epochs=2)  # the anchor kept from the beginning of the step
    assert kept == (pytest.approx(value, abs=1e-12), pytest.approx(gradient, abs=1e-12))
    value, gradient = lco(0.8, form="mse", temperature=0.5)
    assert value == pytest.approx(0.96, abs=1e-12)
    assert gradient == pytest.approx([0.4, -1.2, 0.4, 0.4], abs=1e-12)
    value, gradient = lco(0.8, form="log_cosh", temperature=0.5)
    pull = np.tanh([0.4, -1.2, 0.4, 0.4])
    assert value == pytest.approx(np.log(np.cosh([0.4, -1.2, 0.4, 0.4])).sum(), abs=1e-12)
    assert gradient == pytest.approx(pull - pull.mean(), abs=1e-12)
    shifted = lco(0.0, OLD + 3.0, form="mse", anchor="reference")  # logits are defined up to a constant
    assert shifted == (pytest.approx(0.0, abs=1e-12), pytest.approx([0.0] * 4, abs=1e-12))


def test_lco_compared_with_reinforce() -> None:
    """P3_lco: -A grad log p(1) at the same place."""
    logits = OLD.clone().requires_grad_()
    logprob, _ = TokenLogprobs.apply(logits, torch.tensor([1]), 1.0, False)
    (gradient,) = torch.autograd.grad(-0.8 * logprob.sum(), logits)
    expected = [0.379192677, -0.5700080155, 0.1394971901, 0.0513181483]
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_lco_first_version() -> None:
    """P3_lco_v0: the sampled token's probability times 1.8 or 0.9, capped so that it stays below 1 - 1e-3."""
    p = OLD.softmax(-1)[0, 1]
    up, down = logits_convexity.ratio_shift(p.expand(2).log(), torch.tensor([1.8, 0.9], dtype=torch.float64)).tolist()
    assert (up, down) == (pytest.approx(0.9775623413, abs=1e-9), pytest.approx(-0.1449166568, abs=1e-9))
    moved = (OLD + up * TOKEN_1).softmax(-1)[0, 1].item()
    assert moved == pytest.approx(0.5174819652, abs=1e-9)
    assert lco(0.8, target="ratio")[0] == pytest.approx(0.0928761641, abs=1e-9)  # |A| weighs the loss alone
    assert lco(1.6, target="ratio")[0] == pytest.approx(2 * 0.0928761641, abs=1e-9)
    lower = (OLD + down * TOKEN_1).softmax(-1)
    assert lco(-1.0, target="ratio")[0] == pytest.approx((lower * (lower / OLD.softmax(-1)).log()).sum().item())
    assert lower[0, 1].item() == pytest.approx(0.9 * p.item(), abs=1e-12)
    (capped,) = logits_convexity.ratio_shift(
        torch.tensor([0.8], dtype=torch.float64).log(), torch.tensor([1.8], dtype=torch.float64)
    )
    assert torch.sigmoid(torch.logit(torch.tensor(0.8, dtype=torch.float64)) + capped).item() == pytest.approx(0.999)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_lco_first_version_of_a_token_that_is_sure(advantage: float) -> None:
    """A probability that float32 rounds to 1 has a ratio like any other: a finite loss."""
    term = ConvexTerm(LogitsConvexitySettings(kind="logits_convexity", target="ratio"))
    logits = torch.tensor([[20.0, 0.0, 0.0, 0.0]], requires_grad=True)
    (result,) = term(logits, torch.tensor([0]), torch.tensor([advantage]), {})
    assert np.isfinite(result.item()) and result.item() >= 0
    (gradient,) = torch.autograd.grad(result, logits)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("advantage", "form", "expected"), [(0.8, "kl", 0.374), (0.8, "ratio", -0.43), (-0.8, "ratio", 0.43)]
)
def test_curvature(advantage: float, form: str, expected: float) -> None:
    """P3_curvature: second derivative along [.3, -1, .5, .2] at z_old; the policy gradient's is not convex."""
    direction = torch.tensor([0.3, -1.0, 0.5, 0.2], dtype=torch.float64)
    subject = objective(objective={"correction": "none"})

    def loss(step: Tensor) -> Tensor:
        logits = OLD + step * direction
        if form == "kl":
            return logits_convexity.distance(logits, TARGET, "kl").sum()
        rows = Rows(
            advantages=torch.tensor([advantage], dtype=torch.float64),
            lengths=torch.ones(1, dtype=torch.float64),
            row_of_item=torch.zeros(1, dtype=torch.int64),
            sampler=torch.zeros(1, dtype=torch.float64),
            old=OLD.log_softmax(-1)[:, 1],
        )
        return subject.loss(rows, Outputs(logits.log_softmax(-1)[:, 1]), Credit(np.zeros(1), 1, 1)).loss

    curvature = torch.autograd.functional.hessian(loss, torch.zeros((), dtype=torch.float64))
    assert curvature.item() == pytest.approx(expected, abs=5e-4)


def test_ensemble_forms() -> None:
    """P11 ensemble: scores [1.2, .8, 1, .2, 1.3]."""
    members = np.array([[1.2], [0.8], [1.0], [0.2], [1.3]])
    forms = [("mean", 1.0, 0.9), ("worst", 1.0, 0.2), ("variance", 0.5, 0.824), ("lower_bound", 1.0, 0.5101282262)]
    for form, coefficient, expected in forms:
        result = reward_ensembles.combine(members, np.ones(5), form, coefficient)
        assert result.tolist() == [pytest.approx(expected, abs=1e-9)], form


def test_kl_dro_is_the_dual_of_a_kl_ball_and_lies_between_worst_and_mean() -> None:
    """2606.09073: min over member weights q of sum q r + c KL(q, uniform), solved by q ~ exp(-r / c)."""
    members = np.array([[1.2], [0.8], [1.0], [0.2], [1.3]])
    for temperature in (0.1, 0.5, 2.0):
        weights = np.exp(-members[:, 0] / temperature)
        weights /= weights.sum()
        primal = weights @ members[:, 0] + temperature * (weights * np.log(5 * weights)).sum()
        (value,) = reward_ensembles.combine(members, np.ones(5), "kl_dro", temperature)
        assert value == pytest.approx(primal, abs=1e-12) and 0.2 < value < 0.9
    limits = [reward_ensembles.combine(members, np.ones(5), "kl_dro", c)[0] for c in (1e-4, 1e6)]
    assert limits == pytest.approx([0.2, 0.9], abs=1e-3)
