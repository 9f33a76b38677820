"""The curves of a report: what metrics.jsonl, evaluations/ and evaluations.jsonl say at each step, bands over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from keel import files
from keel.analysis import compared_runs
from keel.observability import bottlenecks, evaluations
from keel.observability.utilization import LEARNER, STAGES

MOST_POINTS = 1000
"""Steps of a curve that are embedded: a screen has no more columns."""
_CONFIDENCE = 0.95

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """What a curve shows, and how its axis is drawn."""

    name: str
    title: str
    unit: str
    start: str = "free"
    """`free`: around the values; `zero`: from 0, which is the quantity's own; `ratio`: from 0 to 1."""


_CHARTS = (
    Chart("kl_nats", "KL to the reference", "nats a completion", "zero"),
    Chart("entropy_nats", "Entropy of the policy", "nats a token", "zero"),
    Chart("length_tokens", "Length of completions", "tokens", "zero"),
    Chart("finished_ratio", "Completions that ended by themselves", "share", "ratio"),
    Chart("template_overlap", "Overlap of answers to different prompts", "share of 3-grams", "zero"),
    Chart("repetition_ratio", "Repeated 3-grams inside an answer", "share", "zero"),
    Chart("reference_nll_nats", "Negative log-likelihood under the reference", "nats a token"),
    Chart("reward_length_correlation", "Correlation of the reward with length", "correlation"),
    Chart("reference_importance_mass", "Mass of the reference that the policy samples", "share", "zero"),
    Chart("loss", "Loss", "loss"),
    Chart("policy_loss", "Loss: surrogate term", "loss"),
    Chart("kl_loss", "Loss: KL term", "loss"),
    Chart("entropy_loss", "Loss: entropy term", "loss"),
    Chart("preference_loss", "Loss: preference term", "loss"),
    Chart("held_out_loss", "Loss on held-out rows", "loss"),
    Chart("held_out_accuracy_ratio", "Held-out pairs in the right order", "share", "ratio"),
    Chart("grad_norm", "Gradient norm before clipping", "norm", "zero"),
    Chart("tokens_per_second", "Throughput of the run", "tokens trained a second", "zero"),
    Chart("generate_tokens_per_second", "Throughput of the generators", "tokens a busy second", "zero"),
    Chart("step_seconds", "Learner step without waiting", "seconds", "zero"),
    Chart("staleness_mean_versions", "Staleness, mean over tokens", "versions", "zero"),
    Chart("staleness_max_versions", "Staleness, largest", "versions", "zero"),
    *(Chart(f"idle_{role}", f"Idle: {role}", "share of worker seconds", "ratio") for role in (*STAGES, LEARNER)),
)


@dataclass(frozen=True)
class Interval:
    """A mean over held-out prompts with its standard error and 95 % interval (Student's t); NaN where n is 1."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Curve:
    """Values over steps; `low` and `high` are an interval or a band, empty where there is none."""

    steps: list[int]
    mean: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation: every shown metric with its interval."""

    step: int
    values: dict[str, Interval]


def interval(values: np.ndarray) -> Interval:
    """Mean of one value a prompt; prompts without a value are left out."""
    known = values[np.isfinite(values)]
    count = len(known)
    if count < 2:
        return Interval(float(known[0]) if count else math.nan, math.nan, math.nan, math.nan, count)
    mean, stderr = float(known.mean()), float(known.std(ddof=1) / math.sqrt(count))
    half_width = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * stderr
    return Interval(mean, stderr, mean - half_width, mean + half_width, count)


def evaluated(directory: Path) -> tuple[list[EvaluationPoint], list[dict[str, np.ndarray]]]:
    """Every evaluation of an online run, and the values [prompts] it comes from. Prompts are in one order."""
    steps = [int(row["step"]) for row in evaluations.frontier(directory)]
    values = [compared_runs.per_prompt(evaluations.load(directory, step))[1] for step in steps]
    points = [
        EvaluationPoint(step, {name: interval(value) for name, value in of_step.items()})
        for step, of_step in zip(steps, values, strict=True)
    ]
    return points, values


def of_evaluations(points: Sequence[EvaluationPoint]) -> dict[str, Curve]:
    """Evaluations as curves with intervals, by metric."""
    names = dict.fromkeys(name for point in points for name in point.values)
    curves = {}
    for name in names:
        known = [point for point in points if name in point.values and math.isfinite(point.values[name].mean)]
        if known:
            values = [point.values[name] for point in known]
            curves[name] = Curve(
                [point.step for point in known],
                [value.mean for value in values],
                [value.low for value in values],
                [value.high for value in values],
            )
    return curves


def of_stage(directory: Path) -> dict[str, Curve]:
    """Held-out numbers of an offline stage, which have no interval."""
    lines, _ = files.sound_lines(directory / "evaluations.jsonl", {"step": int})
    names = {"held_out_loss": "loss", "held_out_accuracy_ratio": "preference_accuracy_ratio"}
    pairs = {chart: [(line["step"], float(line[key])) for line in lines if key in line] for chart, key in names.items()}
    return {chart: Curve([s for s, _ in pair], [v for _, v in pair]) for chart, pair in pairs.items() if pair}


def of_training(lines: Sequence[Line]) -> dict[str, Curve]:
    """Curves of metrics.jsonl: gauges as they are, reward components, and what follows from counters."""
    components = dict.fromkeys(name for line in lines for name in line.get("reward_component", {}))
    readers: dict[str, Callable[[Line], Any]] = {
        "reward": lambda line: line.get("reward"),
        **{f"reward_{name}": _component(name) for name in components},
        **{chart.name: _gauge(chart.name) for chart in _CHARTS if not chart.name.startswith(("held_out", "idle"))},
    }
    points = {name: [(line["step"], reader(line)) for line in lines] for name, reader in readers.items()}
    points |= _of_counters(lines)
    curves = {
        name: _curve([(step, value) for step, value in pair if _is_number(value)]) for name, pair in points.items()
    }
    return {name: curve for name, curve in curves.items() if curve.steps}


def _component(name: str) -> Callable[[Line], Any]:
    return lambda line: line.get("reward_component", {}).get(name)


def _gauge(name: str) -> Callable[[Line], Any]:
    return lambda line: line.get(name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _of_counters(lines: Sequence[Line]) -> dict[str, list[tuple[int, float]]]:
    """Tokens trained a second of the clock, and the idle share of each role, between one line and the next."""
    points: dict[str, list[tuple[int, float]]] = {"tokens_per_second": []}
    for before, line in pairwise(lines):
        seconds = line.get("time", 0.0) - before.get("time", 0.0)
        tokens = line.get("trained_tokens_total", 0.0) - before.get("trained_tokens_total", 0.0)
        if seconds > 0 and tokens > 0:
            points["tokens_per_second"].append((line["step"], tokens / seconds))
        for role in bottlenecks.worked(before, line):
            points.setdefault(f"idle_{role.name}", []).append((line["step"], 1 - role.busy_ratio))
    return points


def _curve(points: Sequence[tuple[int, float]]) -> Curve:
    kept = [points[place] for place in evenly(len(points), MOST_POINTS)]
    return Curve([step for step, _ in kept], [float(value) for _, value in kept])


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the places 0..count-1, as far apart as possible, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)] if most > 1 else [count - 1][:most]


def band(curves: Sequence[Curve]) -> Curve:
    """The mean of several runs at the steps that all of them have, from the lowest to the highest run."""
    if len(curves) == 1:
        return curves[0]
    values = [dict(zip(curve.steps, curve.mean, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, values)))
    table = [[of_run[step] for of_run in values] for step in steps]
    return Curve(
        steps, [sum(row) / len(row) for row in table], [min(row) for row in table], [max(row) for row in table]
    )


def charts(names: Sequence[str], roles: Mapping[str, str]) -> list[Chart]:
    """The charts for these curves, in the order of the page: rewards, the table's, further ones not at all."""
    rewards = [name for name in names if name.startswith("reward_")]
    gold_first = sorted(rewards, key=lambda name: (name != "reward_gold", name))
    titles = {name: f"{name.removeprefix('reward_')} ({roles.get(name, 'monitor')})" for name in rewards}
    return [
        *([Chart("reward", "Proxy: the training reward", "reward")] if "reward" in names else []),
        *(Chart(name, f"Reward: {titles[name]}", "reward") for name in gold_first),
        *(chart for chart in _CHARTS if chart.name in names),
    ]
