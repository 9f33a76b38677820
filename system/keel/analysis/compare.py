"""`keel compare RUN...`: runs side by side on the same held-out prompts, where they are comparable.

A run that was trained longer, on more tokens, or pushed further from its start has an advantage that is not its
method's. So arms are compared where they are equal in one of these:

    matching   level, shared by all arms                            where an arm stands
    steps      the largest step at which all were evaluated         that evaluation
    tokens     the most trained tokens that all have reached        between the two evaluations around the level
    kl         the largest mean KL to the reference all reached     the same, at the first crossing

Between evaluations i and i+1, w of the way, the value of prompt p is (1 - w) v[i, p] + w v[i+1, p]: prompts stay
paired. Differences are to the first arm, mean over prompts with a paired BCa bootstrap interval (95 %). It covers which
prompts were drawn and what was sampled, at equal KL also that the KL is itself estimated (`_with_error_of_kl`); it does
not cover another seed of training.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from keel.analysis import frontier_plot
from keel.analysis.compared_runs import Arm, Evaluation, load, notes
from keel.errors import ConfigError
from keel.observability import evaluations
from keel.observability.diagnostics import Estimate, estimate

_TITLES = {
    "steps": ("equal steps", "{:,.0f}"),
    "tokens": ("equal tokens", "{:,.0f} trained on"),
    "kl": ("equal KL", "{:.3f} nats"),
}


@dataclass(frozen=True)
class ArmAtLevel:
    """An arm at the level of a matching: at an evaluation (before == after), or between two."""

    before: int
    after: int
    weight: float
    """Of the evaluation at step `after`."""
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    """This arm minus the first one."""
    paired: Mapping[str, int]
    """Prompts with a value in both."""


@dataclass(frozen=True)
class Matching:
    name: str
    level: float = math.nan
    arms_at_level: tuple[ArmAtLevel, ...] = ()
    """One an arm; none when the arms cannot be matched this way."""
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    names: tuple[str, ...]
    directories: tuple[Path, ...]
    num_prompts: int
    metrics: tuple[str, ...]
    matchings: tuple[Matching, ...]
    notes: tuple[str, ...]
    """Settings in which the runs differ that make a number mean something else."""


def run(directories: list[Path], console: Console, *, as_json: bool, picture: Path | None) -> None:
    """The command: read, compare, draw the picture if a path is given, print tables or one JSON object."""
    comparison = compare([load(directory) for directory in directories])
    if picture is not None:
        rows = {name: evaluations.frontier(path) for name, path in zip(comparison.names, directories, strict=True)}
        has_gold = any(row.get("gold") is not None for table in rows.values() for row in table)
        frontier_plot.draw(rows, picture, proxy="proxy", gold="gold" if has_gold else None)
    if as_json:
        text = json.dumps(tree_of(comparison), indent=2, allow_nan=False)
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    else:
        _print_tables(console, comparison)


def compare(arms: Sequence[Arm]) -> Comparison:
    """Every arm at every matching. Raises ConfigError for fewer than two arms, or arms with different prompts."""
    if len(arms) < 2:
        raise ConfigError(f"compare: {len(arms)} run; expected at least 2 run directories")
    first = arms[0]
    for arm in arms[1:]:
        if arm.prompts != first.prompts:
            shared = len(set(arm.prompts) & set(first.prompts))
            raise ConfigError(
                f"run {arm.directory}: evaluated on other held-out prompts than {first.directory} ({shared} of"
                f" {len(first.prompts)} shared); expected the same prompts.source,"
                " prompts.held_out and prompts.held_out_seed, or the same evaluation.source"
            )
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        names = [f"{arm.directory} (run {number})" for number, arm in enumerate(arms, start=1)]
    metrics = evaluations.shown(name for arm in arms for evaluation in arm.evaluations for name in evaluation.values)
    return Comparison(
        names=tuple(names),
        directories=tuple(arm.directory for arm in arms),
        num_prompts=len(first.prompts),
        metrics=tuple(metrics),
        matchings=tuple(_match(name, arms, names, metrics) for name in _TITLES),
        notes=tuple(notes(arms, names)),
    )


def _match(matching: str, arms: Sequence[Arm], names: Sequence[str], metrics: Sequence[str]) -> Matching:
    """All arms at the largest level that all have reached, or why there is none."""
    levels = [{evaluation.step: evaluation.level(matching) for evaluation in arm.evaluations} for arm in arms]
    known = [[level for level in levels_of_arm.values() if math.isfinite(level)] for levels_of_arm in levels]
    for name, reached in zip(names, known, strict=True):
        if not reached:
            missing = "no reference log-probs" if matching == "kl" else "no trained_tokens_total in metrics.jsonl"
            return Matching(matching, why_not=f"{name} has {missing}")
    if matching == "steps":
        common = set.intersection(*map(set, known))
        if not common:
            return Matching(matching, why_not="there is no step at which all runs were evaluated")
        level = max(common)
    else:
        level = min(max(reached) for reached in known)
    for name, reached in zip(names, known, strict=True):
        if reached[0] > level:
            return Matching(
                matching, level, why_not=f"{name} is beyond that from its first evaluation on: {reached[0]:g}"
            )
    places = [_place(arm, matching, level) for arm in arms]
    values = [
        {name: _between(before, after, weight, name, len(arms[0].prompts)) for name in metrics}
        for before, after, weight in places
    ]
    if matching == "kl":
        anchor = values[next(number for number, reached in enumerate(known) if max(reached) == level)]["kl_nats"]
        values = [
            _with_error_of_kl(place, arm_values, anchor) for place, arm_values in zip(places, values, strict=True)
        ]
    arms_at_level = [
        _arm_at_level(place, arm_values, values[0]) for place, arm_values in zip(places, values, strict=True)
    ]
    return Matching(matching, level, tuple(arms_at_level))


def _place(arm: Arm, matching: str, level: float) -> tuple[Evaluation, Evaluation, float]:
    """The evaluations around the first crossing of the level, and the weight of the second."""
    known = [evaluation for evaluation in arm.evaluations if math.isfinite(evaluation.level(matching))]
    after = next(number for number, evaluation in enumerate(known) if evaluation.level(matching) >= level)
    high = known[after].level(matching)
    if high == level:
        return known[after], known[after], 1.0
    low = known[after - 1].level(matching)
    return known[after - 1], known[after], (level - low) / (high - low)


def _between(before: Evaluation, after: Evaluation, weight: float, name: str, num_prompts: int) -> np.ndarray:
    """[prompts] values of a metric, NaN where either evaluation has none."""
    unknown = np.full(num_prompts, np.nan)
    if before is after:  # no arithmetic: a value stays the number that was measured
        return after.values.get(name, unknown)
    return (1 - weight) * before.values.get(name, unknown) + weight * after.values.get(name, unknown)


def _with_error_of_kl(
    place: tuple[Evaluation, Evaluation, float], values: Mapping[str, np.ndarray], anchor: np.ndarray
) -> dict[str, np.ndarray]:
    """Interpolated values [prompts] with the error of the KL in their spread; the mean over all prompts stays.

    Level and w come from mean KLs over the same prompts, so an arm is read off at an estimated place of its curve. To
    first order (delta method) prompt p adds v_p - s (kl_p - anchor_p) to the mean: s the slope of the arm's mean per
    nat between its two evaluations, kl_p its interpolated KL, anchor_p the KL of the arm that set the level. Both have
    the level as their mean. Held fixed instead, 95 % intervals covered 56 to 94 % (benchmarks/equal_kl_coverage.py).
    """
    before, after, _ = place
    if before is after:
        return dict(values)
    nats = after.level("kl") - before.level("kl")
    corrected = {}
    for name, value in values.items():
        rise = _mean(after.values.get(name, value)) - _mean(before.values.get(name, value))
        corrected[name] = value - rise / nats * (values["kl_nats"] - anchor)
    return corrected | {"kl_nats": anchor}  # what the formula gives, without its rounding


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _arm_at_level(
    place: tuple[Evaluation, Evaluation, float], values: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]
) -> ArmAtLevel:
    differences = {name: values[name] - first[name] for name in values}
    return ArmAtLevel(
        before=place[0].step,
        after=place[1].step,
        weight=place[2],
        values={name: estimate(value) for name, value in values.items()},
        differences={name: estimate(value) for name, value in differences.items()},
        paired={name: int(np.isfinite(value).sum()) for name, value in differences.items()},
    )


def _table(comparison: Comparison, matching: Matching) -> Table:
    """Each metric's value in every arm, and its difference to the first one."""
    title, level = _TITLES[matching.name]
    at = "" if math.isnan(matching.level) else f" ({level.format(matching.level)})"
    scope = f"{comparison.num_prompts} held-out prompts, 95 % intervals per metric, not corrected for many metrics"
    interpolated = any(arm_at_level.before != arm_at_level.after for arm_at_level in matching.arms_at_level)
    caption = "a-b (w): interpolated, w of the way from the evaluation at step a to the one at step b"
    table = Table(title=f"{title}{at}: {scope}", caption=caption if interpolated else None)
    if not matching.arms_at_level:
        table.add_column("not comparable this way")
        table.add_row(matching.why_not)
        return table
    for name in ("", "run", "at step", "mean", f"minus {comparison.names[0]} (paired)"):
        table.add_column(name, justify="left" if name in ("", "run") else "right")
    for metric in comparison.metrics:
        for number, (name, arm_at_level) in enumerate(zip(comparison.names, matching.arms_at_level, strict=True)):
            last = number == len(comparison.names) - 1
            table.add_row(
                metric if number == 0 else "",
                name,
                _where(arm_at_level),
                _interval(arm_at_level.values[metric], ""),
                _difference(arm_at_level, metric, comparison.num_prompts) if number else "",
                end_section=last,
            )
    return table


def _where(arm_at_level: ArmAtLevel) -> str:
    """A step, or the two whose values were interpolated."""
    if arm_at_level.before == arm_at_level.after:
        return str(arm_at_level.after)
    return f"{arm_at_level.before}-{arm_at_level.after} ({arm_at_level.weight:.2f})"


def _difference(arm_at_level: ArmAtLevel, metric: str, num_prompts: int) -> str:
    paired = arm_at_level.paired[metric]
    return _interval(arm_at_level.differences[metric], "+") + ("" if paired == num_prompts else f" ({paired} prompts)")


def _interval(value: Estimate, sign: str) -> str:
    if math.isnan(value.mean):
        return "-"
    return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def tree_of(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values: NaN is null."""
    arms = zip(comparison.names, comparison.directories, strict=True)
    return {
        "prompts": comparison.num_prompts,
        "arms": [{"name": name, "directory": str(directory)} for name, directory in arms],
        "matchings": {matching.name: _matching_as_json(matching, comparison) for matching in comparison.matchings},
        "notes": list(comparison.notes),
    }


def _matching_as_json(matching: Matching, comparison: Comparison) -> dict[str, Any]:
    return {
        "level": matching.level if math.isfinite(matching.level) else None,
        "why_not": matching.why_not or None,
        "arms": {
            name: {
                "steps": [arm_at_level.before, arm_at_level.after],
                "weight": arm_at_level.weight,
                "values": {metric: value.as_json() for metric, value in arm_at_level.values.items()},
                "differences": {
                    metric: {**value.as_json(), "prompts": arm_at_level.paired[metric]}
                    for metric, value in arm_at_level.differences.items()
                },
            }
            for name, arm_at_level in zip(comparison.names, matching.arms_at_level, strict=False)
        },
    }


def _print_tables(console: Console, comparison: Comparison) -> None:
    for matching in comparison.matchings:
        console.print(_table(comparison, matching))
    for note in comparison.notes:
        console.print(f"Note     {note}", soft_wrap=True, markup=False, highlight=False)
