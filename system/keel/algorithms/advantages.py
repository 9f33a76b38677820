"""Advantages of the samples of one prompt against each other. Pure numpy, float64, whole step at once.

Rows are grouped by ticket, never by position. A group of one has advantage 0: it has no baseline.
"""

from collections.abc import Callable

import numpy as np

GroupAdvantage = Callable[[np.ndarray], np.ndarray]


def rloo(rewards: np.ndarray) -> np.ndarray:
    """REINFORCE leave-one-out (2402.14740): A_i = R_i - mean_{j != i} R_j = k/(k-1) (R_i - mean R).

    Unbiased: the baseline of a sample does not contain its own reward. rewards [k] of one group; returns [k].
    """
    k = len(rewards)
    return group_mean(rewards) * (k / (k - 1)) if k > 1 else np.zeros(1)


def group_mean(rewards: np.ndarray) -> np.ndarray:
    """REINFORCE with the group mean as baseline: A_i = R_i - mean R, (k-1)/k times RLOO's. [k] -> [k].

    With reduction `constant` this is Dr. GRPO (2503.20783): no division by the deviation, no division by length.
    """
    return rewards - rewards.mean()


def grpo(rewards: np.ndarray) -> np.ndarray:
    """GRPO (2402.03300): A_i = (R_i - mean R) / (std R + 1e-4), sample standard deviation (k-1). [k] -> [k].

    Unlike its neighbours it gives every prompt the same weight, however little its samples differ.
    """
    if len(rewards) < 2:
        return np.zeros(1)
    return group_mean(rewards) / (rewards.std(ddof=1) + 1e-4)


ADVANTAGES: dict[str, GroupAdvantage] = {
    "rloo": rloo,
    "group_mean": group_mean,
    "grpo": grpo,
    "dr_grpo": group_mean,
}


def by_ticket(advantage: GroupAdvantage, rewards: np.ndarray, tickets: np.ndarray) -> np.ndarray:
    """Apply a group advantage to every ticket's rows. rewards, tickets [rows]; returns [rows]."""
    result = np.zeros(len(rewards))
    for ticket in np.unique(tickets):
        rows = tickets == ticket
        result[rows] = advantage(rewards[rows].astype(np.float64))
    return result


def num_uniform_groups(rewards: np.ndarray, tickets: np.ndarray) -> int:
    """Groups whose samples all have the same reward: they teach nothing."""
    return sum(float(np.ptp(rewards[tickets == ticket])) == 0.0 for ticket in np.unique(tickets))
