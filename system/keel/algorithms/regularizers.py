"""Regularizers: KL estimators (k1, k2, k3, k3_k2, exact), chi-squared and entropy, in reward (numpy) or loss (torch).

Where a term lives decides its gradient (in the reward: detached, through the advantage; in the loss: differentiated):

    KL, x = log pi - log ref      k1 = x in the reward         expected gradient: that of KL(pi, ref)
                                  k2 = x^2/2 in the loss       the same, token by token
                                  k3 = e^-x - 1 + x, loss      that of the forward KL(ref, pi): GRPO
                                  k3_k2 in the loss            k3's value, k2's gradient
                                  exact in the loss            sum_a pi(a) log pi(a)/ref(a), the same without noise
    chi-squared, rho = pi/ref(y)  2 rho in the reward          that of E_ref[rho^2] - 1 (2403.03185)
                                  rho / sqrt(chi2), reward     that of its root
    answers, c = answer in y      -(share of others with c)    half that of 1 - sum_c pi(c)^2: they agree less often
    entropy                       -log pi(y) in the reward     exact gradient of the sequence entropy
                                  -(log pi(y) + 1) / |y|       the same of E[-log pi(y) / |y|]: where the temperature
                                                               depends on y, the 1 does not cancel
                                  -log pi(y) / |y|             no gradient of an objective: the naive online analogue
                                  mean_t H_t in the loss       its first part: no credit for reaching uncertain states
                                  the same, clamped            of the policy renormalized to its likeliest tokens

Maximum entropy RLHF (2509.20265) is the entropy reward in place of the KL: KL to a uniform reference minus
|y| log V, so every further token is paid and nothing holds the policy near the reference.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from keel.schema import row_sums

MAX_LOG_RATIO = 20.0
"""Exponents of log-ratios are clamped here; how often is a metric (a clamp has no gradient)."""

MAX_WEIGHT = 2.0
"""Upper bound of truncated importance weights where the objective sets none."""

MIN_CHI_SQUARED = 0.01
"""Smallest divergence whose root a penalty is divided by: about the noise of its estimate on a step of 64 rows."""


def clamp(log_ratio: Tensor) -> tuple[Tensor, int]:
    """The log-ratio within +-MAX_LOG_RATIO, and how many entries were outside."""
    clamped = int((log_ratio.detach().abs() > MAX_LOG_RATIO).sum())
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), clamped


def sequence_kl(logprobs: np.ndarray, reference: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """k1 summed over each completion: S - S_ref, nats. Flat [tokens] and lengths [rows]; returns [rows]."""
    return row_sums(logprobs.astype(np.float64) - reference, lengths)


def token_k3(logprobs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """k3 = exp(-x) - 1 + x, x = log pi - log ref: unbiased, never negative. Monitor only. [tokens] -> [tokens].

    The exponent is clamped at 20 so that one token cannot make the mean infinite.
    """
    x = logprobs.astype(np.float64) - reference
    return np.expm1(np.minimum(-x, MAX_LOG_RATIO)) + x


def chi_squared_penalty(log_ratios: np.ndarray, max_ratio: float, root: bool) -> np.ndarray:
    """What the reward of each completion loses for one unit of coefficient (2403.03185). log rho [rows] -> [rows].

    The divergence is D = E_ref[h(rho)] - 1, h = rho^2 up to C = max_ratio and its tangent 2 C rho - C^2 beyond; below C
    it is chi-squared. Without root: 2 min(rho, C), and E_pi[2 min(rho, C) grad S] = grad D exactly, clip included.
    With root: min(rho, C) / sqrt(D), which is grad sqrt(D) where D is known. Here D is the mean over the rows of
    h(rho) / rho, minus 1: consistent in the number of rows, not unbiased. D counts as MIN_CHI_SQUARED below that:
    at rho = 1 the root has no slope.
    """
    log_bound = np.log(max_ratio)
    ratios = np.exp(np.minimum(log_ratios, log_bound))
    if not root:
        return 2 * ratios
    beyond = 2 * max_ratio - max_ratio**2 * np.exp(-np.maximum(log_ratios, log_bound))
    divergence = np.where(log_ratios > log_bound, beyond, ratios).mean() - 1
    return ratios / np.sqrt(max(divergence, MIN_CHI_SQUARED))


def entropy_reward(form: str, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What one nat of coefficient adds to the reward at each token, nats. Flat [tokens] -> [tokens].

    sequence_sum         over a completion -S: MaxEnt RL proper.
    sequence_mean_exact  -(S + 1)/|y|: the gradient of E[R - (beta/|y|) S] is E[(R - (beta/|y|)(S + 1)) grad S], because
                         E[grad S / |y|] = grad E[1/|y|] is not 0. Ends at the maximum-entropy optimum for beta/|y|.
    sequence_mean_naive  -S/|y|, without that term: ends at SimPO's fixed point R - (beta/|y|) S = const.
    Others add nothing. Both means are defined for a whole completion: only their sum over it may be paid, not a share.
    """
    surprise = -logprobs.astype(np.float64)
    long = np.repeat(lengths, lengths)
    return {
        "none": np.zeros(len(surprise)),
        "token_bonus": np.zeros(len(surprise)),
        "sequence_sum": surprise,
        "sequence_mean_exact": (surprise - 1 / long) / long,
        "sequence_mean_naive": surprise / long,
    }[form]


def answer_agreement(answers: Sequence[str], tickets: np.ndarray) -> np.ndarray:
    """Share of the other samples of its prompt that give a row's answer: (n_c - 1) / (k - 1); 0 without others. [rows].

    Without the row's own, so it is an unbiased estimate of pi(c), independent of the row once c is known: paid as a
    reward its expected gradient is half that of sum_c pi(c)^2, the chance that two answers agree. -log of a share
    estimates the entropy with a bias, and is infinite for an answer that no other sample gives.

    EMPO (2504.05812) pays the share with the row's own, n_c / k = ((k - 1) agreement + 1) / k: the same but for a
    constant and the factor (k - 1) / k. Its code (QingyangZhang/EMPO) does so for free text, and pays log(n_c / k) in
    mathematics. A leave-one-out baseline reads the row's own answer through the others' shares, which leaves
    (k - 2) / (k - 1) of the gradient.
    """
    groups = list(zip(tickets.tolist(), answers, strict=True))
    of_answer, of_prompt = Counter(groups), Counter(tickets.tolist())
    return np.array([(of_answer[group] - 1) / max(of_prompt[group[0]] - 1, 1) for group in groups])


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k2 = x^2 / 2 of each token, nats^2; its gradient is x grad log pi. [N] -> [N].

    Token by token it leaves out that early tokens lead to later divergence, which k1 in the reward has.
    """
    return 0.5 * (logprobs - reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k3 = exp(-x) - 1 + x of each token, nats (GRPO, 2402.03300). [N] -> [N].

    On policy its gradient is that of KL(ref, pi), which agrees with KL(pi, ref) to first order near ref only. Below
    x = -MAX_LOG_RATIO it continues as the tangent there, so its slope has the sign of x everywhere: a clamp alone would
    leave the slope 1 of `+ x`, which pushes a token that the policy has lost further away.
    """
    x = logprobs - reference
    exponent = (-x).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(exponent) + exponent.exp() * (-x - exponent) + x


def kl_k3_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k3's value with k2's gradient (straight through): reads like GRPO's KL, pulls like KL(pi, ref). [N] -> [N]."""
    k2 = kl_k2(logprobs, reference)
    return kl_k3(logprobs, reference).detach() + k2 - k2.detach()


KL_LOSSES = {"k2": kl_k2, "k3": kl_k3, "k3_k2": kl_k3_k2}


def weighted_kl(estimator: str, logprobs: Tensor, reference: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """A KL loss on tokens that another policy mu sampled, so that its gradient is that of KL(pi, ref). [N] -> [N].

    k2, k3_k2: times min(pi/mu, cap), detached. k3: times pi/mu itself, differentiated, whole: the expectation is then
    sum_a pi(a) k3(a) = KL(pi, ref) as a function of pi (2510.01555 on why stale samples need a weight). The slope of
    pi/mu k3 = ref/mu - pi/mu + (pi/mu) x is (pi/mu) x, and is written as that, so no clamp can turn its sign.
    """
    ratio = clamp(logprobs - sampler)[0].exp().detach()
    if estimator != "k3":
        return ratio.clamp(max=cap) * KL_LOSSES[estimator](logprobs, reference)
    x = (logprobs - reference).detach()
    near = ratio * (torch.expm1(-x.clamp(min=-MAX_LOG_RATIO)) + x)  # the same without cancellation
    far = clamp(reference - sampler)[0].exp() - ratio + ratio * x
    return torch.where(x > -MAX_LOG_RATIO, near, far) + ratio * x * (logprobs - logprobs.detach())


def token_draws(seeds: np.ndarray, lengths: np.ndarray, version: int, *stream: int) -> np.ndarray:
    """A number in [0, 1) for each token [tokens], a function of its row's seed, the version and the stream alone."""
    rows = zip(seeds, lengths, strict=True)
    return np.concatenate([np.random.default_rng([seed, version, *stream]).random(n) for seed, n in rows])


class ExactKL:
    """KL(pi, ref) = sum_a pi(a) (log pi(a) - log ref(a)) of each selected token: the whole vocabulary, no sampling.

    On a share of the tokens, drawn per row from its seed and the version; divided by the share, so the sum over tokens
    is unbiased. Its gradient is that of the token KL (as k2's, without its noise).
    """

    models = frozenset({"reference"})

    def __init__(self, share: float) -> None:
        self.share = share

    def select(self, seeds: np.ndarray, lengths: np.ndarray, version: int) -> np.ndarray | None:
        """bool [tokens]: which tokens it is computed on; None: all."""
        if self.share == 1:
            return None
        return token_draws(seeds, lengths, version) < self.share

    def __call__(self, logits: Tensor, targets: Tensor, advantages: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """logits, others["reference"] [n, V] at the sampling temperature; returns [n] nats."""
        log_p, log_r = logits.log_softmax(-1), others["reference"].log_softmax(-1)
        return torch.linalg.vecdot(log_p.exp(), log_p - log_r) / self.share


class ClampedEntropy:
    """Entropy of pi renormalized to its likeliest tokens at each place, nats (AEnt, 2509.03493).

        q = pi / pi(K) on K, the ceil(share V) tokens of largest logit;  H = -sum_K q log q
        dH/dz = -q (log q + H) on K, 0 elsewhere: K counts as constant, and nothing is paid for the tail

    The definition, a count of tokens and the mean over the step's tokens are those of the author's implementation in
    AReaL (recipe/AEnt, where `entropy_clamp` = 1 - share is 0.2 to 0.4), with the abstract's "re-normalized policy";
    the paper's own text was not to be had. Tokens that tie with the last one of K stay in it, so the order of equal
    logits in a vocabulary does not matter.
    """

    models: frozenset[str] = frozenset()

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, logits: Tensor, targets: Tensor, advantages: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """logits [n, V] at the sampling temperature; returns [n] nats."""
        size = logits.shape[-1]
        kept = math.ceil(self.share * size - 1e-6)  # 0.7 of 10 tokens are 7, whatever the product's last bit
        last = logits.detach().kthvalue(size - kept + 1, keepdim=True).values
        dropped = logits.detach() < last
        log_q = logits.masked_fill(dropped, -math.inf).log_softmax(-1)
        return -(log_q.exp() * log_q.masked_fill(dropped, 0.0)).sum(-1)
