"""The guard of a run: it keeps series of what the run measured, asks the detectors, and says what is to be done.

evaluated   held-out rows            -> samples (mean, standard error), the best evaluation
stepped     metrics of a step        -> the last two windows of KL a token and gradient norm
check       after both               -> firings, and of their actions: multipliers, stop, roll back

The state is JSON and lies in every checkpoint, so that a killed and resumed run decides as one that was not. What is
decided is carried out by the controller; the formulas are in algorithms/detectors.py.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from keel.algorithms import detectors
from keel.algorithms.detectors import Pairs, Sample, Verdict
from keel.config.run import Settings
from keel.observability.held_out_statistics import folder_spread, held_out_values, members
from keel.observability.sample_diagnostics import prompt_overlaps

_EMPTY: Mapping[str, Any] = {
    "evaluations": {},
    "band": None,
    "outside": [0, 0],
    "member_means": None,
    "peak": None,
    "steps": {"kl": [], "grad_norm": []},
    "fired": {},
    "best": None,
    "multipliers": {"kl": 1.0, "learning_rate": 1.0},
    "roll_backs": 0,
}
_UNITS = {
    "proxy_gold_divergence": "reward units of {monitor} below its peak, while the training reward rose",
    "ensemble_disagreement": "times the start's spread of the reward ensemble",
    "kl_slope": "nats a token a step of KL",
    "kl_curvature": "nats a token a step and step of KL",
    "entropy": "times the start's entropy",
    "reference_nll": "of the completions outside the start's band under the reference",
    "length": "times the start's length",
    "repetition": "more of the 3-grams repeated than at the start",
    "template_collapse": "more of the 3-grams shared by answers to two prompts than at the start",
    "grad_norm": "times the gradient norm of the window before",
}


@dataclass(frozen=True)
class Firing:
    """A detector whose interval lies behind its threshold."""

    detector: str
    step: int
    verdict: Verdict
    actions: tuple[str, ...]
    unit: str

    @property
    def sentence(self) -> str:
        v = self.verdict
        return (
            f"guard: {self.detector} at step {self.step}: {v.statistic:+.4g} [{v.low:+.4g}, {v.high:+.4g}]"
            f" {self.unit} (threshold {v.threshold:+.4g}); {', '.join(self.actions)}"
        )

    @property
    def fields(self) -> dict[str, Any]:
        """Of the event."""
        v = self.verdict
        numbers = {"statistic": v.statistic, "low": v.low, "high": v.high, "threshold": v.threshold}
        return {"detector": self.detector, "step": self.step, **numbers, "actions": list(self.actions)}


@dataclass(frozen=True)
class Reaction:
    """What the firings of a step ask for."""

    firings: tuple[Firing, ...] = ()
    stop: bool = False
    roll_back_to: int | None = None


class Guard:
    """The detectors of one run over its series."""

    def __init__(self, settings: Settings, state: Mapping[str, Any] | None = None) -> None:
        """`state`: that of the checkpoint from which the run continues."""
        self.settings, self.config = settings, settings.guard
        self.monitor = settings.guard.monitor_of([reward.name for reward in settings.rewards])
        self._state: dict[str, Any] = copy.deepcopy({**_EMPTY, **(state or {})})
        self._evaluated_at: int | None = None
        self._pairs: Pairs | None = None

    def state(self) -> dict[str, Any]:
        """Everything that decides later firings, as JSON."""
        return json.loads(json.dumps(self._state))

    @property
    def multipliers(self) -> dict[str, float]:
        """Factors on the KL coefficient (`kl`) and the learning rate (`learning_rate`) that are in force."""
        return dict(self._state["multipliers"])

    @property
    def carried(self) -> dict[str, Any]:
        """What a roll back does not undo."""
        return {name: copy.deepcopy(self._state[name]) for name in ("multipliers", "roll_backs")}

    @property
    def moves(self) -> bool:
        """Whether any detector may change a multiplier."""
        return any({"raise_kl", "lower_lr"} & set(watch.actions) for watch in self.config.watches().values())

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the largest mean of the monitor so far: step, reward, mean, standard_error, rows."""
        return self._state["best"]

    def evaluated(self, step: int, batch: pa.RecordBatch) -> bool:
        """Take in an evaluation. Whether it is a new best whose checkpoint is to be kept."""
        values = held_out_values(batch, self.settings)
        if (spread := self._spread(batch)) is not None:
            values["spread"] = spread
        if "reference_nll" in values:
            self._place(values["reference_nll"])
        samples = {name: detectors.sample(step, rows) for name, rows in values.items()}
        samples["template_overlap"] = detectors.jackknife(step, *prompt_overlaps(batch))
        for name, sample in samples.items():
            if sample is not None:
                series = self._state["evaluations"].setdefault(name, [])
                series.append([sample.step, sample.mean, sample.standard_error, sample.rows])
        self._evaluated_at = step
        self._pair(step, batch.column("prompt_id").to_pylist(), values)
        return self._judge(step) and step > 0

    def stepped(self, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of a training step."""
        length = metrics.get("sampled_length_tokens", metrics.get("length_tokens"))
        if length and "kl_nats" in metrics:
            self._append("kl", metrics["kl_nats"] / length)
        if "grad_norm" in metrics:
            self._append("grad_norm", metrics["grad_norm"])

    def reference_renewed(self) -> None:
        """Forget what was measured against the reference before: its band, and the series of the KL to it."""
        self._state.update({name: copy.deepcopy(_EMPTY[name]) for name in ("band", "outside")})
        self._state["steps"]["kl"] = []

    def check(self, step: int) -> Reaction:
        """Ask every detector that has something new; multipliers have moved when this returns."""
        firings = []
        for name, watch in self.config.watches().items():
            if step - self._state["fired"].get(name, -self.config.pause_steps) < self.config.pause_steps:
                continue
            verdict = self._ask(name, step)
            if verdict is not None and verdict.fired:
                self._state["fired"][name] = step
                unit = _UNITS[name].format(monitor=self.monitor)
                firings.append(Firing(name, step, verdict, tuple(watch.actions), unit))
        return self._react(tuple(firings), step)

    # ---- series

    def _append(self, name: str, value: float) -> None:
        series = self._state["steps"][name]
        series.append(float(value))
        del series[: -2 * self.config.window_steps]

    def _spread(self, batch: pa.RecordBatch) -> np.ndarray | None:
        """Population standard deviation over ensemble members of each row; each less its mean at the start."""
        rewards = members(batch, self.settings)
        if rewards is None:
            return folder_spread(batch, self.settings)
        if self._state["member_means"] is None:
            if not np.isfinite(rewards).any(1).all():
                return None
            self._state["member_means"] = np.nanmean(rewards, 1).tolist()
        return (rewards - np.array(self._state["member_means"])[:, None]).std(0)

    def _place(self, nll: np.ndarray) -> None:
        """Count the completions outside the band of the start, which the first evaluation of a reference sets."""
        finite = nll[np.isfinite(nll)]
        if len(finite) < self.config.min_rows:
            self._state["outside"] = [0, 0]
            return
        if self._state["band"] is None:
            self._state["band"] = list(detectors.band(finite))
        low, high = self._state["band"]
        self._state["outside"] = [int(((finite < low) | (finite > high)).sum()), len(finite)]

    def _pair(self, step: int, prompts: list[int], values: Mapping[str, np.ndarray]) -> None:
        """Pair the rows with those of gold's peak by prompt, and keep them where this evaluation is the peak."""
        self._pairs, before = None, self._state["peak"]
        rows = {name: values[name] for name in ("proxy", "monitor") if name in values}
        if len(rows) < 2:
            return
        if before is not None and before["prompts"] == prompts:
            proxy, monitor = (now - np.array(before[name], np.float64) for name, now in rows.items())
            both = np.isfinite(proxy) & np.isfinite(monitor)
            if both.sum() >= self.config.min_rows:
                self._pairs = Pairs(before["step"], proxy[both], monitor[both])
        if detectors.peak(self._large("proxy"), self._large("monitor")) == step:
            kept = {name: [float(x) if np.isfinite(x) else None for x in now] for name, now in rows.items()}
            self._state["peak"] = {"step": step, "prompts": prompts, **kept}

    def _judge(self, step: int) -> bool:
        """Whether this evaluation's mean of the monitor is above every earlier one's; it is the best then."""
        series = self._series("monitor")
        if not series or series[-1].step != step or not self.config.keep_best:
            return False
        last = series[-1]
        if self.best is not None and last.mean <= self.best["mean"]:
            return False
        self._state["best"] = {
            "step": step,
            "reward": self.monitor,
            "mean": last.mean,
            "standard_error": last.standard_error,
            "rows": last.rows,
        }
        return True

    def _large(self, name: str) -> list[Sample]:
        """The series of enough completions each; none where that of now is not among them."""
        series = [sample for sample in self._series(name) if sample.rows >= self.config.min_rows]
        return series if series and series[-1].step == self._evaluated_at else []

    def _series(self, name: str) -> list[Sample]:
        return [Sample(*entry) for entry in self._state["evaluations"].get(name, [])]

    # ---- detectors

    def _ask(self, name: str, step: int) -> Verdict | None:
        """The verdict of one detector; None: nothing new, or not enough of it."""
        of_steps: dict[str, Callable[[], Verdict | None]] = {
            "kl_slope": self._kl_slope,
            "kl_curvature": self._kl_curvature,
            "grad_norm": self._grad_norm,
        }
        if name in of_steps:
            return of_steps[name]()
        return self._of_evaluation(name) if self._evaluated_at == step else None

    def _of_evaluation(self, name: str) -> Verdict | None:
        config, level = self.config, self.config.confidence
        watch: Any = config.watches()[name]
        if name == "proxy_gold_divergence":
            proxy, monitor = self._large("proxy"), self._large("monitor")
            return detectors.proxy_gold_divergence(proxy, monitor, watch.min_fall, level, self._pairs)
        if name == "ensemble_disagreement":
            return detectors.ratio(self._large("spread"), None, watch.highest_ratio, level)
        if name == "reference_nll":
            outside, rows = self._state["outside"]
            return detectors.share_outside(outside, rows, watch.max_outside_ratio, level)
        if name == "repetition":
            return detectors.rise(self._large("repetition"), watch.max_rise, level)
        if name == "template_collapse":
            return detectors.rise(self._large("template_overlap"), watch.max_rise, level)
        return detectors.ratio(self._large(name), watch.lowest_ratio, watch.highest_ratio, level)

    def _kl_slope(self) -> Verdict | None:
        window, watch = self.config.window_steps, self.config.kl_slope
        values = self._state["steps"]["kl"][-window:]
        if watch is None or len(values) < window:
            return None
        return detectors.slope(values, watch.max_nats, self.config.confidence)

    def _kl_curvature(self) -> Verdict | None:
        watch, values = self.config.kl_curvature, self._state["steps"]["kl"]
        if watch is None or len(values) < 2 * self.config.window_steps:
            return None
        return detectors.curvature(values, watch.max_nats, self.config.confidence)

    def _grad_norm(self) -> Verdict | None:
        window, watch, values = self.config.window_steps, self.config.grad_norm, self._state["steps"]["grad_norm"]
        if watch is None or len(values) < 2 * window:
            return None
        early, late = values[:window], values[window:]
        return detectors.log_ratio_of_windows(early, late, watch.highest_ratio, self.config.confidence)

    # ---- actions

    def _react(self, firings: tuple[Firing, ...], step: int) -> Reaction:
        """Move the multipliers, once a step however many firings ask for it, and say what else is to be done."""
        actions = {action for firing in firings for action in firing.actions}
        before, moved = self.multipliers, self._state["multipliers"]
        if "raise_kl" in actions:
            moved["kl"] = min(moved["kl"] * self.config.raise_kl.factor, self.config.raise_kl.cap)
        if "lower_lr" in actions:
            lower = self.config.lower_lr
            moved["learning_rate"] = max(moved["learning_rate"] * lower.factor, lower.floor)
        best = self.best["step"] if self.best else step
        if "stop" in actions or "roll_back" not in actions or best >= step:
            return Reaction(firings, stop="stop" in actions)
        if moved == before or self._state["roll_backs"] == self.config.max_roll_backs:
            return Reaction(firings, stop=True)  # the same steps once more
        self._state["roll_backs"] += 1
        return Reaction(firings, roll_back_to=best)
