"""`keel compare RUN...`: runs side by side on the same held-out prompts, where they are comparable.

A run that was trained longer, on more tokens, or pushed further from its start has an advantage that is not its
method's. So arms are compared where they are equal in one of these:

    matching   level, shared by all arms                            where an arm stands
    steps      the largest step at which all were evaluated         that evaluation
    tokens     the most trained tokens that all have reached        between the two evaluations around the level
    kl         the largest mean KL to the reference all reached     the same, at the first crossing

Between evaluations i and i+1, w of the way, the value of prompt p is (1 - w) v[i, p] + w v[i+1, p]: prompts stay
paired. Runs that differ in their seed alone are one arm; each stands at its own place at the shared level.

Differences are to the first arm, with a 95 % interval: over seeds and prompts (hierarchical_bootstrap.py) where an arm
has several seeds, else a paired BCa bootstrap over prompts. It covers which prompts were drawn and what was sampled, at
equal KL also that the KL is itself estimated (`_with_error_of_kl`), and the seeds of the arms that have several.
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
from keel.analysis.compared_runs import Arm, Evaluation, Run, arms_of, load, named_directory, notes
from keel.analysis.hierarchical_bootstrap import over_seeds_and_prompts
from keel.errors import ConfigError
from keel.observability import evaluations
from keel.observability.diagnostics import Estimate, estimate

_TITLES = {
    "steps": ("equal steps", "{:,.0f}"),
    "tokens": ("equal tokens", "{:,.0f} trained on"),
    "kl": ("equal KL", "{:.3f} nats"),
}


@dataclass(frozen=True)
class Place:
    """Where a run has the level of a matching: at an evaluation (before == after), or between two."""

    before: int
    after: int
    weight: float
    """Of the evaluation at step `after`."""


@dataclass(frozen=True)
class ArmAtLevel:
    """An arm at the level of a matching."""

    places: tuple[Place, ...]
    """One a run."""
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    """This arm minus the first one."""
    paired: Mapping[str, int]
    """Prompts with a value in every run of both."""


@dataclass(frozen=True)
class Matching:
    name: str
    level: float = math.nan
    arms_at_level: tuple[ArmAtLevel, ...] = ()
    """One an arm; none when the arms cannot be matched this way."""
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    arms: tuple[Arm, ...]
    num_prompts: int
    metrics: tuple[str, ...]
    matchings: tuple[Matching, ...]
    notes: tuple[str, ...]
    """Settings in which the runs differ that make a number mean something else."""

    @property
    def names(self) -> list[str]:
        """Arms as tables show them."""
        return [arm.label for arm in self.arms]


def run(arguments: Sequence[str], console: Console, *, as_json: bool, picture: Path | None) -> None:
    """The command: read, compare, draw the picture if a path is given, print tables or one JSON object.

    `arguments`: run directories, each as `RUN` or `ARM=RUN`.
    """
    named = [named_directory(argument) for argument in arguments]
    comparison = compare([load(directory) for _, directory in named], [name for name, _ in named])
    if picture is not None:
        draw(comparison, picture)
    if as_json:
        text = json.dumps(tree_of(comparison), indent=2, allow_nan=False)
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    else:
        show(comparison, console)


def draw(comparison: Comparison, path: Path) -> None:
    """The frontier of every arm; that of an arm of several seeds is their mean."""
    tables = {arm.label: [evaluations.frontier(run.directory) for run in arm.runs] for arm in comparison.arms}
    rows = {name: frontier_plot.mean_over_seeds(frontiers) for name, frontiers in tables.items()}
    has_gold = any(row.get("gold") is not None for table in rows.values() for row in table)
    frontier_plot.draw(rows, path, proxy="proxy", gold="gold" if has_gold else None)


def compare(runs: Sequence[Run], names: Sequence[str | None] = ()) -> Comparison:
    """Every arm at every matching; `names`: the arms of the runs where the user gave them.

    Raises ConfigError for fewer than two runs, or runs with different prompts.
    """
    if len(runs) < 2:
        raise ConfigError(f"compare: {len(runs)} run; expected at least 2 run directories")
    first = runs[0]
    for run in runs[1:]:
        if run.prompts != first.prompts:
            shared = len(set(run.prompts) & set(first.prompts))
            raise ConfigError(
                f"run {run.directory}: evaluated on other held-out prompts than {first.directory} ({shared} of"
                f" {len(first.prompts)} shared); expected the same prompts.source, prompts.held_out and"
                " prompts.held_out_seed, or the same evaluation.source"
            )
    arms = arms_of(runs, names or [None] * len(runs))
    metrics = evaluations.shown(name for run in runs for evaluation in run.evaluations for name in evaluation.values)
    members = [(run, arm.label) for arm in arms for run in arm.runs]
    return Comparison(
        arms=tuple(arms),
        num_prompts=len(first.prompts),
        metrics=tuple(metrics),
        matchings=tuple(_match(name, arms, metrics) for name in _TITLES),
        notes=tuple(notes(*zip(*members, strict=True))),
    )


def _match(matching: str, arms: Sequence[Arm], metrics: Sequence[str]) -> Matching:
    """All runs at the largest level that all have reached, or why there is none."""
    runs = [run for arm in arms for run in arm.runs]
    names = [arm.name if len(arm.runs) == 1 else run.name for arm in arms for run in arm.runs]
    levels = [{evaluation.step: evaluation.level(matching) for evaluation in run.evaluations} for run in runs]
    known = [[level for level in levels_of_run.values() if math.isfinite(level)] for levels_of_run in levels]
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
    places = [_place(run, matching, level) for run in runs]
    values = [
        {name: _between(before, after, weight, name, len(runs[0].prompts)) for name in metrics}
        for before, after, weight in places
    ]
    if matching == "kl":
        anchor = values[next(number for number, reached in enumerate(known) if max(reached) == level)]["kl_nats"]
        values = [
            _with_error_of_kl(place, run_values, anchor) for place, run_values in zip(places, values, strict=True)
        ]
    return Matching(matching, level, _arms_at_level(arms, places, values, metrics))


def _arms_at_level(
    arms: Sequence[Arm],
    places: Sequence[tuple[Evaluation, Evaluation, float]],
    values: Sequence[Mapping[str, np.ndarray]],
    metrics: Sequence[str],
) -> tuple[ArmAtLevel, ...]:
    """Put the runs of every arm together; `places` and `values` have one entry a run, in the order of the arms."""
    ends = np.cumsum([len(arm.runs) for arm in arms])
    members = [slice(end - len(arm.runs), end) for arm, end in zip(arms, ends, strict=True)]
    stacked = [{name: np.stack([run[name] for run in values[part]]) for name in metrics} for part in members]
    return tuple(
        _arm_at_level([Place(before.step, after.step, w) for before, after, w in places[part]], arm_values, stacked[0])
        for part, arm_values in zip(members, stacked, strict=True)
    )


def _place(run: Run, matching: str, level: float) -> tuple[Evaluation, Evaluation, float]:
    """The evaluations around the first crossing of the level, and the weight of the second."""
    known = [evaluation for evaluation in run.evaluations if math.isfinite(evaluation.level(matching))]
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
    places: Sequence[Place], values: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]
) -> ArmAtLevel:
    """`values` and `first` [runs, prompts] by metric: of this arm, and of the first one."""
    known = {name: np.isfinite(values[name]).all(axis=0) & np.isfinite(first[name]).all(axis=0) for name in values}
    return ArmAtLevel(
        places=tuple(places),
        values={name: _estimate([(1, value)]) for name, value in values.items()},
        differences={name: _difference_to(value, first[name]) for name, value in values.items()},
        paired={name: int(both.sum()) for name, both in known.items()},
    )


def _difference_to(values: np.ndarray, first: np.ndarray) -> Estimate:
    """An arm minus the first one, which differs from itself in nothing."""
    if values is first:
        values = np.where(np.isfinite(first).all(axis=0), 0.0, np.nan)[None]
        return estimate(values[0])
    return _estimate([(1, values), (-1, first)])


def _estimate(terms: Sequence[tuple[int, np.ndarray]]) -> Estimate:
    """Of arms that all have one run: a BCa bootstrap over prompts; else over seeds and prompts."""
    if all(len(values) == 1 for _, values in terms):
        return estimate(np.sum([sign * values[0] for sign, values in terms], axis=0))
    return over_seeds_and_prompts(terms)


def _table(comparison: Comparison, matching: Matching) -> Table:
    """Each metric's value in every arm, and its difference to the first one."""
    title, level = _TITLES[matching.name]
    at = "" if math.isnan(matching.level) else f" ({level.format(matching.level)})"
    scope = f"{comparison.num_prompts} held-out prompts, 95 % intervals per metric, not corrected for many metrics"
    table = Table(title=f"{title}{at}: {scope}", caption=_caption(comparison, matching))
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


def _caption(comparison: Comparison, matching: Matching) -> str:
    """What the intervals cover, and how places are written."""
    seeds = {len(arm.runs) for arm in comparison.arms}
    lines = ["1 seed: interval over prompts only"] * (1 in seeds)
    lines += ["several seeds: interval over seeds and prompts"] * (max(seeds) > 1)
    places = [place for arm_at_level in matching.arms_at_level for place in arm_at_level.places]
    if any(place.before != place.after for place in places):
        lines.append("a-b (w): interpolated, w of the way from the evaluation at step a to the one at step b")
    if any(len(set(arm_at_level.places)) > 1 for arm_at_level in matching.arms_at_level):
        lines.append("by seed: every seed at a place of its own between these steps")
    return "\n".join(lines)


def _where(arm_at_level: ArmAtLevel) -> str:
    """A step, or the two whose values were interpolated, or the steps between which the seeds are."""
    places = arm_at_level.places
    if len(set(places)) > 1:
        return f"{min(place.before for place in places)}-{max(place.after for place in places)} by seed"
    if places[0].before == places[0].after:
        return str(places[0].after)
    return f"{places[0].before}-{places[0].after} ({places[0].weight:.2f})"


def _difference(arm_at_level: ArmAtLevel, metric: str, num_prompts: int) -> str:
    paired = arm_at_level.paired[metric]
    return _interval(arm_at_level.differences[metric], "+") + ("" if paired == num_prompts else f" ({paired} prompts)")


def _interval(value: Estimate, sign: str) -> str:
    if math.isnan(value.mean):
        return "-"
    return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def tree_of(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values: NaN is null."""
    return {
        "prompts": comparison.num_prompts,
        "arms": [
            {
                "name": arm.name,
                "runs": [{"directory": str(run.directory), "seed": run.seed} for run in arm.runs],
                "intervals": "prompts" if len(arm.runs) == 1 else "seeds and prompts",
            }
            for arm in comparison.arms
        ],
        "matchings": {matching.name: _matching_as_json(matching, comparison.arms) for matching in comparison.matchings},
        "notes": list(comparison.notes),
    }


def _matching_as_json(matching: Matching, arms: Sequence[Arm]) -> dict[str, Any]:
    return {
        "level": matching.level if math.isfinite(matching.level) else None,
        "why_not": matching.why_not or None,
        "arms": {
            arm.name: {
                "places": [
                    {"steps": [place.before, place.after], "weight": place.weight} for place in arm_at_level.places
                ],
                "values": {metric: value.as_json() for metric, value in arm_at_level.values.items()},
                "differences": {
                    metric: {**value.as_json(), "prompts": arm_at_level.paired[metric]}
                    for metric, value in arm_at_level.differences.items()
                },
            }
            for arm, arm_at_level in zip(arms, matching.arms_at_level, strict=False)
        },
    }


def show(comparison: Comparison, console: Console) -> None:
    """Print a table a matching, and the notes."""
    for matching in comparison.matchings:
        console.print(_table(comparison, matching))
    for note in comparison.notes:
        console.print(f"Note     {note}", soft_wrap=True, markup=False, highlight=False)
