"""Coefficients that adapt: the weight of one regularizer at this step, moved after every step by what it measured.

Every rank sees the same step and so holds the same coefficient; it is in metrics.jsonl and in state.json.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.config.regularizer import ControllerSettings


@dataclass(frozen=True)
class Observation:
    """What the controllers read of a step: means over its completions or tokens."""

    nats: float
    """Of the regularized quantity: sequence KL, or entropy in the unit of its form."""
    completions: int
    kl_per_token_nats: float
    entropy_per_token_nats: float
    reward: float


class Fixed:
    """The coefficient of the configuration, and the interface of those that move."""

    def __init__(self, settings: ControllerSettings, start: float, sign: float) -> None:
        """Take the sign +1 where raising the coefficient lowers the nats (KL), -1 where it raises them (entropy)."""
        self.settings, self.value, self.sign = settings, start, sign

    def update(self, seen: Observation) -> None:
        """Set the `value` in force at the next step."""

    def state(self) -> dict[str, Any]:
        """JSON numbers and lists that `restore` takes."""
        return {"value": self.value}

    def restore(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Proportional(Fixed):
    """Ziegler's controller (1909.08593): c *= 1 + clip(nats/target - 1, -0.2, 0.2) min(n / horizon, 1).

    n completions of the step. Linear in the error and slow by design: a step changes c by a fifth at most.
    """

    def __init__(self, settings: ControllerSettings, start: float, sign: float) -> None:
        super().__init__(settings, start, sign)
        self.target_nats = settings.target_nats

    def update(self, seen: Observation) -> None:
        error = float(np.clip(self._error(seen), -0.2, 0.2))
        self._move(1 + self.sign * error * min(seen.completions / self.settings.horizon_completions, 1.0))

    def _error(self, seen: Observation) -> float:
        assert self.target_nats is not None
        return seen.nats / self.target_nats - 1

    def _move(self, factor: float) -> None:
        self.value = min(max(self.value * factor, self.settings.minimum), self.settings.maximum)


class Dual(Proportional):
    """Dual ascent on the log of the coefficient: c *= exp(clip(rate (nats/target - 1), -1, 1)), so c stays positive.

    A step changes c by a factor e at most, up or down: one step of wild samples cannot remove a term.

    sign +1: a budget, the coefficient grows while nats are above it (target KL; FLAC's divergence budget, 2602.12829).
    sign -1: a floor, it grows while nats are below it (target entropy, as SAC's temperature, 1812.05905).

    The target may be a share of what the first step measured (above 0), the idea of AER (2510.10959); known from its
    abstract alone, so the rule that moves the coefficient is this one and not theirs.
    """

    def update(self, seen: Observation) -> None:
        if self.target_nats is None:
            assert self.settings.target_share_of_start is not None
            if seen.nats > 0:
                self.target_nats = self.settings.target_share_of_start * seen.nats
            return
        self._move(math.exp(self.sign * float(np.clip(self.settings.rate * self._error(seen), -1.0, 1.0))))

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "target_nats": self.target_nats}

    def restore(self, state: dict[str, Any]) -> None:
        self.value, self.target_nats = state["value"], state.get("target_nats", self.settings.target_nats)


class Band(Fixed):
    """AEnt's coefficient (2509.03493): c -= rate (min(0, nats - low) + max(0, nats - high)), within its bounds.

    Nothing moves inside the band. The rule is that of the author's implementation in AReaL (recipe/AEnt); its warm-up,
    steps without a move, is not here. The sign is the entropy's: the coefficient rises where nats are short.
    """

    def update(self, seen: Observation) -> None:
        low, high = self.settings.low_nats, self.settings.high_nats
        assert low is not None and high is not None
        outside = min(0.0, seen.nats - low) + max(0.0, seen.nats - high)
        moved = self.value + self.sign * self.settings.rate * outside
        self.value = min(max(moved, self.settings.minimum), self.settings.maximum)


class Safe(Fixed):
    """SAFE's controller (2602.04651), made to act: its penalty P = s relu(kl - tau)^2 gate as a coefficient on the KL.

        kl     <- .9 kl + .1 KL per token
        ema    <- .95 ema + .05 reward;  e = change of ema - .001;  I <- clip(I + e, -1, 1)
        tau    = clip((threshold + .3 e + .01 I + .05 (e - e_before)) phase, .1, .6)       nats per token
        gate   = max(.5, floor / (entropy + .1))                                            low entropy costs more
        value  = dP/dkl = 2 s relu(kl - tau) gate

    The released code adds P, a plain number, to the loss: its gradient is zero (tested). phase: 1.5 before the 50th
    step, then 1.2 while the mean reward climbs, 1.0 when it has converged, 0.8 on a plateau. s is kl.coefficient.
    """

    GAINS = (0.3, 0.01, 0.05)

    def __init__(self, settings: ControllerSettings, start: float, sign: float) -> None:
        super().__init__(settings, 0.0, sign)
        self.scale = start
        self.memory: dict[str, Any] = {"kl": 0.0, "ema": None, "integral": 0.0, "error": 0.0, "rewards": []}
        self.seen: dict[str, float] = {"threshold_nats": settings.threshold_nats, "gate": 1.0, "penalty": 0.0}

    def update(self, seen: Observation) -> None:
        memory = self.memory
        memory["kl"] = 0.9 * memory["kl"] + 0.1 * seen.kl_per_token_nats
        correction = self._pid(seen.reward)
        memory["rewards"] = [*memory["rewards"][-99:], seen.reward]
        threshold = float(np.clip((self.settings.threshold_nats + correction) * self._phase(), 0.1, 0.6))
        excess = max(0.0, memory["kl"] - threshold)
        gate = max(0.5, self.settings.entropy_floor_nats / (seen.entropy_per_token_nats + 0.1)) if excess else 1.0
        self.value = 2 * self.scale * excess * gate
        self.seen = {"threshold_nats": threshold, "gate": gate, "penalty": self.scale * excess**2 * gate}

    def _pid(self, reward: float) -> float:
        memory = self.memory
        if memory["ema"] is None:
            memory["ema"] = reward
            return 0.0
        change = 0.05 * (reward - memory["ema"])
        memory["ema"] += change
        error = change - 0.001
        memory["integral"] = float(np.clip(memory["integral"] + error, -1, 1))
        before, memory["error"] = memory["error"], error
        parts = (error, memory["integral"], error - before)
        return sum(gain * part for gain, part in zip(self.GAINS, parts, strict=True))

    def _phase(self) -> float:
        rewards = self.memory["rewards"]
        if len(rewards) < 50:
            return 1.5
        last = np.array(rewards[-50:])
        if len(rewards) == 100 and last.mean() > np.mean(rewards[:50]) + 0.01:
            return 1.2
        return 1.0 if last.std() < 0.02 and last.mean() > 0.7 else 0.8

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "memory": dict(self.memory), "seen": dict(self.seen)}

    def restore(self, state: dict[str, Any]) -> None:
        self.value, self.memory, self.seen = state["value"], dict(state["memory"]), dict(state["seen"])


def coefficient(settings: ControllerSettings, start: float, sign: float) -> Fixed:
    """Build the controller of the configured kind."""
    kinds = {"fixed": Fixed, "proportional": Proportional, "dual": Dual, "band": Band, "safe": Safe}
    return kinds[settings.kind](settings, start, sign)
