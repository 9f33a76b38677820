"""Arms of the experiment as arrays, read from the Parquet files of collect.py.

An arm has a learning rate: the same settings at another one are another arm. Every quantity of it is an array
[seeds, evaluations, prompts]; a prompt with several completions counts with their mean.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TABLES = ("runs", "evaluations", "steps", "guard_events")
QUANTITIES = ("proxy", "gold", "kl_nats", "entropy", "length_tokens")
ENTROPY_FAMILIES = ("entropy_sum", "entropy_mean_exact", "entropy_mean_naive", "token_bonus")
FAMILIES = ("none", "kl", *ENTROPY_FAMILIES)
"""What the experiment compares online; an arm is of the family that its name begins with."""
OFFLINE = ("simpo", "dpo", "rpo")

Key = tuple[str, float | None]
"""Name and learning rate of an arm; an offline arm has none here."""


@dataclass(frozen=True)
class Firing:
    """One firing of a detector of the guard."""

    seed: int
    step: int
    detector: str


@dataclass(frozen=True)
class ArmCurves:
    """An arm at one learning rate."""

    name: str
    learning_rate: float | None
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    """Of the evaluations, those that all seeds have."""
    values: dict[str, np.ndarray]
    """[seeds, evaluations, prompts] of each quantity."""
    kl_by_step: tuple[np.ndarray, ...]
    """KL (nats) of the training completions at every step, an array a seed."""
    firings: tuple[Firing, ...]
    settings: dict[str, Any]
    """The row of runs.parquet of the first seed."""

    @property
    def family(self) -> str:
        if self.settings["offline"]:
            return "offline"
        if self.guarded:
            return "guard"
        if self.name == "none" or re.fullmatch(r"kl-[\d.e-]+", self.name):
            return self.name.split("-")[0]
        return next((family for family in ENTROPY_FAMILIES if self.name.startswith(f"{family}-")), "other")

    @property
    def guarded(self) -> bool:
        return self.name.endswith("-guard")

    @property
    def label(self) -> str:
        return self.name if self.learning_rate is None else f"{self.name}, {self.learning_rate:g}"

    def end(self, quantity: str) -> np.ndarray:
        """[seeds, prompts] at the last evaluation."""
        return self.values[quantity][:, -1]

    def start(self, quantity: str) -> np.ndarray:
        """[seeds, prompts] before training."""
        return self.values[quantity][:, 0]

    def at_peak(self, quantity: str) -> np.ndarray:
        """[seeds, prompts] at the evaluation at which the other half of the prompts has its largest mean gold."""
        seeds, prompts = np.indices(self.end(quantity).shape)
        return self.values[quantity][seeds, peak_places(self.values["gold"]), prompts]

    def since_peak(self, quantity: str) -> np.ndarray:
        """[seeds, prompts]: the last evaluation minus that at the peak of gold."""
        return self.end(quantity) - self.at_peak(quantity)


@dataclass(frozen=True)
class Experiment:
    """All arms with a finished run, and the runs that are not finished."""

    arms: tuple[ArmCurves, ...]
    unfinished: tuple[str, ...]

    @property
    def learning_rates(self) -> list[float]:
        """Of the online arms, the largest first."""
        return sorted({arm.learning_rate for arm in self.arms if arm.learning_rate is not None}, reverse=True)

    def family(self, names: Sequence[str], learning_rate: float | None) -> list[ArmCurves]:
        """The arms of these families at a learning rate."""
        return [arm for arm in self.arms if arm.family in names and arm.learning_rate == learning_rate]

    def named(self, name: str, learning_rate: float | None) -> ArmCurves | None:
        return next((arm for arm in self.arms if (arm.name, arm.learning_rate) == (name, learning_rate)), None)

    def spread(self, quantity: str) -> float:
        """Standard deviation over the held-out prompts before training."""
        online = [arm for arm in self.arms if not arm.settings["offline"]]
        return float(np.nanstd(online[0].start(quantity)[0], ddof=1)) if online else math.nan

    @property
    def proxy_range(self) -> float:
        """From the 1st to the 99th percentile of the proxy in all evaluations of the arms that pay no entropy."""
        values = [arm.values["proxy"].ravel() for arm in self.arms if arm.family in ("none", "kl")]
        return float(np.ptp(np.nanquantile(np.concatenate(values), [0.01, 0.99]))) if values else math.nan


def peak_places(gold: np.ndarray) -> np.ndarray:
    """[seeds, prompts]: the place of the peak of mean gold [seeds, evaluations, prompts] for every prompt.

    The peak of the prompts at even places is that of the others' mean, and the other way round. The largest of several
    means is too high by chance, but only for the prompts that chose it: of the other half its mean is unbiased.
    """
    places = np.zeros((gold.shape[0], gold.shape[2]), dtype=np.int64)
    for half in (0, 1):
        places[:, half::2] = np.nanmean(gold[:, :, 1 - half :: 2], axis=2).argmax(axis=1)[:, None]
    return places


def payment(settings: dict[str, Any]) -> float:
    """Most that the entropy term can pay for one completion, reward units: every token drawn evenly from all ids.

    The sum over a completion pays coefficient * max_tokens * ln(vocabulary). The means and the token bonus, which the
    loss has as a mean over tokens, lack the factor max_tokens. NaN where the size of the vocabulary is not known.
    """
    if not settings["entropy_coefficient"]:
        return 0.0
    tokens = settings["max_tokens"] if settings["entropy_form"] == "sequence_sum" else 1
    return settings["entropy_coefficient"] * tokens * math.log(settings["vocabulary"] or math.nan)


def load(folder: Path) -> Experiment:
    tables = {name: pq.read_table(folder / f"{name}.parquet") for name in TABLES}
    runs = tables["runs"].to_pylist()
    values = _evaluations(tables["evaluations"])
    steps: dict[tuple[Key, int], list[float]] = defaultdict(list)
    for row in tables["steps"].sort_by("step").to_pylist():
        steps[_key(row), row["seed"]].append(math.nan if row["kl_nats"] is None else row["kl_nats"])
    firings: dict[Key, list[Firing]] = defaultdict(list)
    for row in tables["guard_events"].to_pylist():
        firings[_key(row)].append(Firing(row["seed"], row["step"], row["detector"]))
    members: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["finished"]:
            members[_key(run)].append(run)
    arms = []
    for key in sorted(members, key=_order):
        rows = sorted(members[key], key=lambda run: run["seed"])
        seeds = tuple(run["seed"] for run in rows)
        grid, arrays = _aligned([values[key, seed] for seed in seeds], [run["planned_steps"] or 0 for run in rows])
        kl_by_step = tuple(np.array(steps[key, seed]) for seed in seeds)
        arms.append(ArmCurves(*key, seeds, grid, arrays, kl_by_step, tuple(firings[key]), rows[0]))
    unfinished = [f"{run['arm']}, {run['learning_rate']:g}, seed {run['seed']}" for run in runs if not run["finished"]]
    return Experiment(tuple(arms), tuple(sorted(unfinished)))


def _key(row: dict[str, Any]) -> Key:
    return row["arm"], row["learning_rate"]


def _order(key: Key) -> tuple[Any, ...]:
    """Larger learning rates first, families in their order, coefficients as numbers; offline arms last."""
    name, learning_rate = key
    family, _, coefficient = name.removesuffix("-guard").partition("-")
    place = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
    number = float(coefficient) if re.fullmatch(r"[\d.]+(e-?\d+)?", coefficient) else 0.0
    return learning_rate is None, -(learning_rate or 0.0), name.endswith("-guard"), place, number, name


def _evaluations(table: pa.Table) -> dict[tuple[Key, int], dict[int, dict[str, np.ndarray]]]:
    """By run and step: every quantity [prompts], prompts in ascending order."""
    columns = {name: table[name].to_pylist() for name in ("arm", "learning_rate", "seed", "step", "prompt_id")}
    numbers = {name: table[name].to_numpy().astype(np.float64) for name in QUANTITIES}
    places = {prompt: place for place, prompt in enumerate(sorted(set(columns["prompt_id"])))}
    rows: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for row, (*run, _prompt) in enumerate(zip(*columns.values(), strict=True)):
        rows[tuple(run)].append(row)
    result: dict[tuple[Key, int], dict[int, dict[str, np.ndarray]]] = defaultdict(dict)
    for (arm, learning_rate, seed, step), members in rows.items():
        group = np.array([places[columns["prompt_id"][row]] for row in members])
        means = {name: _means(column[members], group, len(places)) for name, column in numbers.items()}
        result[(arm, learning_rate), seed][step] = means
    return result


def _means(values: np.ndarray, group: np.ndarray, size: int) -> np.ndarray:
    """[size] mean of the known values of every group; NaN where it has none."""
    known = np.isfinite(values)
    count = np.bincount(group[known], minlength=size)
    total = np.bincount(group[known], values[known], minlength=size)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _aligned(
    runs: Sequence[dict[int, dict[str, np.ndarray]]], planned: Sequence[int]
) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """Evaluations that all seeds have, up to the fewest planned steps; arrays [seeds, evaluations, prompts].

    A run that its guard ended before stays where it ended: it has its last evaluation at every later one.
    """
    last = min(planned)
    reached = [sorted(step for step in run if step <= last) for run in runs]
    whole = [steps for steps in reached if steps[-1] == max(steps[-1] for steps in reached)]
    grid = tuple(sorted(set.intersection(*map(set, whole))))
    taken = [[max(step for step in steps if step <= wanted) for wanted in grid] for steps in reached]
    arrays = {
        name: np.array([[run[step][name] for step in steps] for run, steps in zip(runs, taken, strict=True)])
        for name in QUANTITIES
    }
    return grid, arrays
