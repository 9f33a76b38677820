"""Regularisers: KL to the reference and entropy, as reward terms (numpy) or loss terms (torch).

Where a term lives decides its gradient (in the reward: detached, through the advantage; in the loss: differentiated):

    KL, x = log pi - log ref      k1 = x in the reward        expected gradient: that of KL(pi, ref)
                                  k2 = x^2/2 in the loss      the same, token by token
    entropy                       -log pi(y) in the reward    exact gradient of the sequence entropy
                                  mean_t H_t in the loss      its first part: no credit for reaching uncertain states

Maximum entropy RLHF (2509.20265) is the entropy reward in place of the KL: KL to a uniform reference minus
|y| log V, so every further token is paid and nothing holds the policy near the reference.
"""

import numpy as np
from torch import Tensor

from keel.objective_settings import EntropySettings
from keel.schema import row_sums


def sequence_kl(logprobs: np.ndarray, reference: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """k1 summed over each completion: S - S_ref, nats. Flat [tokens] and lengths [rows]; returns [rows]."""
    return row_sums(logprobs.astype(np.float64) - reference, lengths)


def token_k3(logprobs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """k3 = exp(-x) - 1 + x, x = log pi - log ref: unbiased, never negative. Monitor only. [tokens] -> [tokens].

    The exponent is clamped at 20 so that one token cannot make the mean infinite.
    """
    x = logprobs.astype(np.float64) - reference
    return np.expm1(np.minimum(-x, 20.0)) + x


def entropy_reward(form: str, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What one nat of coefficient adds to the reward of each completion, nats. [tokens], [rows] -> [rows].

    sequence_sum: -S = -sum_t log pi (MaxEnt RL proper). sequence_mean: -S/|y| (SimPO's temperature beta/|y|, online).
    """
    surprise = -row_sums(logprobs, lengths)
    return {
        "none": np.zeros(len(lengths)),
        "token_bonus": np.zeros(len(lengths)),
        "sequence_sum": surprise,
        "sequence_mean": surprise / lengths,
    }[form]


def kl_loss(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k2 = (log pi - log ref)^2 / 2 of each token, nats^2; its gradient is x grad log pi. [N] -> [N].

    Token by token it leaves out that early tokens lead to later divergence, which k1 in the reward has.
    """
    return 0.5 * (logprobs - reference).square()


def token_bonus_coefficient(entropy: EntropySettings) -> float:
    """c of -c mean_t H_t in the loss; 0 when entropy is a reward term or absent: then it needs no gradient."""
    return entropy.coefficient if entropy.form == "token_bonus" else 0.0
