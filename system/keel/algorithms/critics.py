"""Learned values: how heads join, what they regress on, and the scale they work in.

The network is in `networks.py`; here is its mathematics.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss

from keel.algorithms.advantages import ROUNDING, deviation, magnitude


def soft_min(heads: Tensor, temperature: float) -> Tensor:
    """V = -a (logsumexp(-V_h / a) - log H) over the last axis (SAFE, 2602.04651). [..., H] -> [...].

    a -> 0 is the smallest head, a -> infinity their mean; never above the mean, never more than a log H above the
    smallest. Pessimism in the value makes advantages optimistic about nothing.
    """
    return -temperature * (torch.logsumexp(-heads / temperature, dim=-1) - math.log(heads.shape[-1]))


def value_loss(values: Tensor, old: Tensor, targets: Tensor, kind: str, clip: float | None, clipped: str) -> Tensor:
    """Loss of each prediction: half square or Huber (delta 0.5), values clipped around the old. [N] -> [N].

    V_clip = V_old + clip(V - V_old, +-c); `max` of both losses is PPO's (1707.06347, 2403.17031), their `mean` SAFE's.
    """

    def distance(prediction: Tensor) -> Tensor:
        if kind == "huber":
            return huber_loss(prediction, targets, reduction="none", delta=0.5)
        return mse_loss(prediction, targets, reduction="none") / 2

    plain = distance(values)
    if clip is None:
        return plain
    bounded = distance(old + (values - old).clamp(-clip, clip))
    return torch.maximum(plain, bounded) if clipped == "max" else (plain + bounded) / 2


def explained_variance(values: np.ndarray, targets: np.ndarray) -> float:
    """1 - var(target - value) / var(target): 1 predicts all, 0 no better than a constant. [tokens]; 0 if constant."""
    spread = deviation(targets)
    return float(1 - (targets - values).var() / spread**2) if spread else 0.0


@dataclass
class PopArt:
    """PopArt (1602.07714, as EAPO 2407.18143 uses it): a head works on normalized targets and its outputs are kept.

        mu, nu   <- (1 - rate) old + rate * mean of targets, of their squares;   sigma = sqrt(nu - mu^2) in [1e-4, 1e6],
                    and never below the rounding of mu: targets that are all alike are not blown up to unit size
        value    = sigma * (scale * z + shift) + mu,  z what the head's weights give
        on every update: scale' = scale sigma / sigma', shift' = (sigma shift + mu - mu') / sigma'

    The rescaling lies in two numbers beside the head, not in its weights, so optimizer shards need not be touched.
    """

    mean: float = 0.0
    square: float = 1.0
    scale: float = 1.0
    shift: float = 0.0

    @property
    def deviation(self) -> float:
        spread = math.sqrt(max(self.square - self.mean**2, 0.0))
        return min(max(spread, 1e-4, ROUNDING * abs(self.mean)), 1e6)

    def update(self, targets: np.ndarray, rate: float) -> None:
        """Move the moments towards these targets [n]; every output of the head stays what it was."""
        mean, deviation = self.mean, self.deviation
        self.mean += rate * (float(targets.mean()) - self.mean)
        self.square += rate * (float(np.square(targets).mean()) - self.square)
        self.scale *= deviation / self.deviation
        self.shift = (deviation * self.shift + mean - self.mean) / self.deviation

    def value(self, raw: np.ndarray) -> np.ndarray:
        """Outputs of the head in the unit of the targets."""
        return self.deviation * (self.scale * raw + self.shift) + self.mean


@dataclass
class RunningMoments:
    """Mean and deviation of all rewards so far (Welford's sums over batches).

    It starts from nothing, where SAFE's released code starts from 1e-4 rewards of 0 and adds 1e-8 to the variance.
    """

    count: float = 0.0
    mean: float = 0.0
    square_sum: float = 0.0

    @property
    def deviation(self) -> float:
        """Of all rewards so far; 0 before the first."""
        return math.sqrt(self.square_sum / self.count) if self.count else 0.0

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Take the values in, then return them with the mean removed and divided by the deviation. [n] -> [n].

        Exactly 0 where they differ from the mean by rounding alone.
        """
        delta, total = float(values.mean()) - self.mean, self.count + len(values)
        self.square_sum += float(values.var()) * len(values) + delta**2 * self.count * len(values) / total
        self.mean += delta * len(values) / total
        self.count = total
        apart = values - self.mean
        if magnitude(apart) <= ROUNDING * max(abs(self.mean), magnitude(values)):
            return np.zeros(len(values))
        return apart / self.deviation
