"""Rates of runs, from what they wrote: rollouts and evaluations for single batches, metrics.jsonl for the rest.

stages    busy_seconds_total a batch, so the way through Ray is in it; how batches differ, from the Arrow columns
learner   phase_seconds_total of its steps
driver    progress_timestamp_seconds: when each stage last finished something
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, schema
from keel.analysis.rates import ASSUMED_FIXED_RATIO, Rates, waves
from keel.config import loader
from keel.config.run import Settings
from keel.errors import ConfigError
from keel.observability import evaluations
from keel.observability.utilization import LEARNER, STAGES, STEPPING

_MOST_KEPT = 200  # relative durations


@dataclass
class _Seen:
    """Measurements of the runs. Points: waves and sequences a worker (learner: a rank) had, and seconds."""

    points: dict[str, list[tuple[float, float, float]]] = field(default_factory=lambda: defaultdict(list))
    relative: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    driver: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    late_loads: list[float] = field(default_factory=list)
    """Seconds of late loads, which include the wait for a busy generator."""
    tokens: list[float] = field(default_factory=list)


def measured(runs: Sequence[Path]) -> Rates:
    """Rates of one or more runs of the same model on the same machine.

    First steps, steps with an evaluation and those in which the run began again are left out. On cores that stages
    share, the runs should be synchronous (max_staleness 0) with one generator batch a step: else what is measured has
    waited for cores. The load of weights is that of synchronous runs. In late ones a generator may be busy when it is
    its turn: only the shortest is taken, and only if there is no synchronous run. Raises ConfigError for a directory
    that holds no run, or too few steps.
    """
    seen = _Seen()
    for directory in runs:
        _see(directory, seen)
    roles = [role for role in (*STAGES, LEARNER) if role in seen.points]
    lines = {role: _line(seen.points[role], ASSUMED_FIXED_RATIO[role]) for role in roles}
    stages = {
        role: {
            "fixed_seconds": fixed,
            "sequence_seconds": slope,
            "relative_seconds": [round(ratio, 4) for ratio in _thinned(seen.relative[role])],
        }
        for role, (fixed, slope) in lines.items()
    }
    if "load" not in seen.driver:
        seen.driver["load"] = [min(seen.late_loads)]  # of the step without a busy generator, if there was one
    driver = {what: statistics.median(seconds) for what, seconds in seen.driver.items()}
    weights = {f"{what}_seconds": driver.pop(what) for what in ("publish", "load")}
    named = ", ".join(str(directory) for directory in runs)
    tree = {"source": f"measured on {named}", "tokens_per_sequence": statistics.mean(seen.tokens), **stages}
    rates = {f"{what}_seconds": seconds for what, seconds in driver.items()}
    return Rates.model_validate(tree | {"weights": weights, "driver": rates})


def _see(directory: Path, seen: _Seen) -> None:
    settings = loader.load(loader.stored_config(directory, f"--from {directory}", kind="an online run"))
    lines = files.read_json_lines(directory / "metrics.jsonl")
    pairs = [pair for pair in pairwise(lines) if not _evaluates(settings, pair[1]["step"]) and not _begins(pair)]
    if not pairs:
        raise ConfigError(
            f"--from {directory}: {len(lines)} steps, none without an evaluation after the first; expected at least 3"
        )
    batches = [batch for _, line in pairs for batch in _batches(_rows(directory, line["step"]))]
    for role in STAGES:
        if busy := sum(_change(pair, "busy_seconds_total", role) for pair in pairs):
            size = statistics.mean(batch.sequences for batch in batches)
            passes = statistics.mean(_waves(role, batch, settings) for batch in batches)
            seen.points[role].append((passes, size, busy / len(batches)))
    _see_evaluations(directory, settings, batches, seen)
    rows = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt
    ranks = pairs[0][1]["workers"]["learner"]
    steps = [_change(pair, "phase_seconds_total", STEPPING) for pair in pairs]
    seen.points[LEARNER].append((1.0, rows / ranks, statistics.mean(steps)))
    seen.relative[LEARNER] += [seconds / statistics.mean(steps) for seconds in steps]
    seen.tokens += [batch.tokens / batch.sequences for batch in batches]
    for pair in pairs:
        _see_driver(pair, seen)


def _evaluates(settings: Settings, step: int) -> bool:
    every = settings.evaluation.every_steps
    return step == settings.run.steps or bool(every and step % every == 0)


def _begins(pair: tuple[dict[str, Any], dict[str, Any]]) -> bool:
    """The run was resumed or built again between the two: steps were made again, and all of it was counted."""
    return _change(pair, "phase_seconds_total", "start") > 0


def _see_driver(pair: tuple[dict[str, Any], dict[str, Any]], seen: _Seen) -> None:
    """The small times between stages, from when each last finished something."""
    _, line = pair
    at = line["progress_timestamp_seconds"]
    seen.driver["publish"].append(at["publish"] - at["step"])
    seen.driver["advance"].append(
        max(_change(pair, "phase_seconds_total", "weight_sync") - line["weight_sync_seconds"], 0.0)
    )
    load = at["load"] - at["publish"]
    if line["max_staleness_versions"] > 0:  # a generator loads after its call, and other batches come in between
        seen.late_loads.append(load)
    else:
        seen.driver["load"].append(load)
        seen.driver["add"].append(max(at["accept"] - at["score"], 0.0))
        seen.driver["take"].append(max(at["take"] - at["accept"], 0.0))
    if checkpoint := _change(pair, "phase_seconds_total", "checkpoint"):
        seen.driver["checkpoint"].append(checkpoint)


def _see_evaluations(directory: Path, settings: Settings, batches: "list[_Batch]", seen: _Seen) -> None:
    """Held-out batches as further sizes; what the way through Ray costs is taken from the other batches."""
    steps = [int(row["step"]) for row in evaluations.frontier(directory)]
    held_out = [_batches(evaluations.load(directory, step))[0] for step in steps[1:]]  # the first one warms up
    for role in ("generator", "scorer"):
        seconds_of_batches = [batch.seconds[role] for batch in batches]
        mean = statistics.mean(seconds_of_batches)
        way = max(seen.points[role][-1][-1] - mean, 0.0)
        seen.points[role] += [
            (_waves(role, batch, settings), batch.sequences, batch.seconds[role] + way) for batch in held_out
        ]
        if mean:
            seen.relative[role] += [(seconds + way) / (mean + way) for seconds in seconds_of_batches]


def _change(pair: tuple[dict[str, Any], dict[str, Any]], name: str, label: str) -> float:
    before, line = pair
    return line[name].get(label, 0.0) - before[name].get(label, 0.0)


def _rows(directory: Path, step: int) -> pa.RecordBatch:
    path = directory / "rollouts" / f"step-{step:06d}.arrow"
    if not path.is_file():
        raise ConfigError(f"--from {directory}: no {path.name} in its rollouts/; expected the rows of every step")
    return schema.from_bytes(path.read_bytes())


@dataclass(frozen=True)
class _Batch:
    """One generator batch, as its rows tell."""

    sequences: int
    tokens: int
    seconds: dict[str, float]


def _batches(rows: pa.RecordBatch) -> list[_Batch]:
    """Rows next to each other that came from one call of one generator."""
    marks = list(zip(*(rows.column(name).to_pylist() for name in ("generator", "generate_seconds")), strict=True))
    lengths = schema.lengths(rows, "completion_tokens")
    starts = [place for place, mark in enumerate(marks) if not place or mark != marks[place - 1]]
    scores = rows.column("score_seconds").to_pylist()
    return [
        _Batch(end - start, int(lengths[start:end].sum()), {"generator": marks[start][1], "scorer": scores[start]})
        for start, end in pairwise([*starts, len(marks)])
    ]


def _waves(role: str, batch: _Batch, settings: Settings) -> float:
    return waves(batch.sequences, settings.generators.max_sequences) if role == "generator" else 1.0


def _thinned(values: Sequence[float]) -> list[float]:
    """Keep at most _MOST_KEPT values, every n-th by size, scaled to the mean of all."""
    stride = math.ceil(len(values) / _MOST_KEPT)
    if stride <= 1:
        return list(values)
    kept = sorted(values)[stride // 2 :: stride]
    return [value * statistics.mean(values) / statistics.mean(kept) for value in kept]


def _line(points: Iterable[tuple[float, float, float]], assumed: float) -> tuple[float, float]:
    """(seconds of a wave of none, seconds of each sequence), neither below 0, by least squares.

    Where all waves are of one size, nothing tells the two apart: a share `assumed` of the time is fixed.
    """
    passes, sizes, seconds = np.array(list(points)).T
    of_size = float(sizes @ seconds / (sizes @ sizes))
    together = sizes / passes
    if np.allclose(together, together[0]):
        return assumed * of_size * float(together[0]), (1 - assumed) * of_size
    fixed, slope = np.linalg.lstsq(np.stack([passes, sizes], axis=1), seconds)[0]
    if slope < 0:
        return float(passes @ seconds / (passes @ passes)), 0.0
    return (float(fixed), float(slope)) if fixed >= 0 else (0.0, of_size)
