"""Advantages: of the samples of one prompt against each other, or of tokens by what follows them.

Pure numpy, float64, whole step at once. Rows are grouped by ticket, never by position. Flat arrays hold the tokens of
all rows, row by row; `lengths` [rows] cuts them.
"""

from collections.abc import Callable

import numpy as np

GroupAdvantage = Callable[[np.ndarray], np.ndarray]

ROUNDING = 2 * float(np.finfo(np.float32).eps)
"""Relative distance of two numbers that are one unit in the last place of float32 to either side of a third.

Rewards, log-probs and values are computed and stored in float32.
"""


def vary(values: np.ndarray, size: float = 0.0) -> bool:
    """Whether values [n] differ by more than the rounding of numbers of their size.

    `size`: the largest number they were computed from, where that is larger: a difference keeps the rounding of what it
    was taken of. Compared with 0 instead, rewards of -0.1 throughout would have a deviation, of 1e-17.
    """
    return len(values) > 1 and float(np.ptp(values)) > ROUNDING * max(size, magnitude(values))


def magnitude(*arrays: np.ndarray) -> float:
    """Largest absolute value of all arrays; 0 without any."""
    return max((float(np.abs(values).max(initial=0.0)) for values in arrays), default=0.0)


def deviation(values: np.ndarray, ddof: int = 0, size: float = 0.0) -> float:
    """Standard deviation of values [n]; exactly 0 where they do not `vary`."""
    return float(values.std(ddof=ddof)) if len(values) > ddof and vary(values, size) else 0.0


def rloo(rewards: np.ndarray) -> np.ndarray:
    """REINFORCE leave-one-out (2402.14740): A_i = R_i - mean_{j != i} R_j = k/(k-1) (R_i - mean R).

    Unbiased: the baseline of a sample does not contain its own reward. rewards [k] of one group; returns [k].
    A group of one has no baseline: its advantage is 0.
    """
    k = len(rewards)
    return group_mean(rewards) * (k / (k - 1)) if k > 1 else np.zeros(1)


def group_mean(rewards: np.ndarray) -> np.ndarray:
    """REINFORCE with the group mean as baseline: A_i = R_i - mean R, (k-1)/k times RLOO's. [k] -> [k].

    With reduction `constant` this is Dr. GRPO (2503.20783): no division by the deviation, no division by length.
    Exactly 0 where the rewards differ by rounding alone, so that nothing behind it can enlarge the rounding.
    """
    return rewards - rewards.mean() if vary(rewards) else np.zeros(len(rewards))


def grpo(rewards: np.ndarray) -> np.ndarray:
    """GRPO (2402.03300): A_i = (R_i - mean R) / (std R + 1e-4), sample standard deviation (k-1). [k] -> [k].

    Unlike its neighbors it gives every prompt the same weight, however little its samples differ.
    """
    if len(rewards) < 2:
        return np.zeros(1)
    return group_mean(rewards) / (rewards.std(ddof=1) + 1e-4)


GROUP: dict[str, GroupAdvantage] = {"rloo": rloo, "group_mean": group_mean, "grpo": grpo, "dr_grpo": group_mean}


def by_ticket(advantage: GroupAdvantage, rewards: np.ndarray, tickets: np.ndarray) -> np.ndarray:
    """Apply a group advantage to every ticket's rows. rewards, tickets [rows]; returns [rows]."""
    result = np.zeros(len(rewards))
    for ticket in np.unique(tickets):
        rows = tickets == ticket
        result[rows] = advantage(rewards[rows].astype(np.float64))
    return result


def num_uniform_groups(rewards: np.ndarray, tickets: np.ndarray) -> int:
    """Groups of two or more samples whose rewards are all the same: they teach nothing.

    A group of one is not counted: an advantage that takes such groups does not compare within them.
    """
    groups = [rewards[tickets == ticket] for ticket in np.unique(tickets)]
    return sum(len(group) > 1 and not vary(group) for group in groups)


def returns(rewards: np.ndarray, lengths: np.ndarray, discount: float) -> np.ndarray:
    """G_t = sum_{t' >= t} discount^(t'-t) r_t' within each row: reward to go. Flat [tokens] -> [tokens]."""
    return gae(rewards, np.zeros_like(rewards), lengths, discount, 1.0)


def gae(rewards: np.ndarray, values: np.ndarray, lengths: np.ndarray, discount: float, trace: float) -> np.ndarray:
    """Generalized advantage estimation (1506.02438) of each row: A_t = delta_t + discount * trace * A_{t+1}.

    delta_t = r_t + discount V_{t+1} - V_t. A completion is over after its last token, also one that was cut at the
    budget: its reward stands there and V behind it is 0. trace 0 is the one-step advantage, 1 is G_t - V_t.
    Flat [tokens]; returns [tokens]; A + V is the target of the value.
    """
    inside = np.arange(lengths.max()) < lengths[:, None]
    r, v = np.zeros(inside.shape), np.zeros((len(lengths), inside.shape[1] + 1))
    r[inside] = rewards
    v[:, :-1][inside] = values
    delta = r + discount * v[:, 1:] - v[:, :-1]
    advantage = np.zeros((len(lengths), inside.shape[1] + 1))
    for t in reversed(range(inside.shape[1])):
        advantage[:, t] = inside[:, t] * (delta[:, t] + discount * trace * advantage[:, t + 1])
    return advantage[:, :-1][inside]


def center_by_position(values: np.ndarray, lengths: np.ndarray, tickets: np.ndarray) -> np.ndarray:
    """Values minus their mean over the group's rows that reach the same position. Flat [tokens] -> [tokens]."""
    position = np.concatenate([np.arange(n) for n in lengths])
    _, place = np.unique(np.stack([np.repeat(tickets, lengths), position]), axis=1, return_inverse=True)
    place = place.reshape(-1)
    return values - (np.bincount(place, values) / np.bincount(place))[place]


def whiten(values: np.ndarray, ddof: int, size: float = 0.0) -> np.ndarray:
    """Zero mean and unit deviation over all values of the step [n]; exactly 0 where they do not `vary`.

    ddof 0: REINFORCE++ (2501.03262); ddof 1: PPO as in 2403.17031.
    """
    spread = deviation(values, ddof, size)
    return (values - values.mean()) / spread if spread else np.zeros(len(values))
