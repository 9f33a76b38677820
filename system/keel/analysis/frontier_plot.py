"""The frontier as a picture: training reward and gold against the square root of the KL (arXiv 2210.10760).

Gao et al. fit gold as d (alpha - beta d) for best-of-n and d (alpha - beta log d) for RL, d = sqrt(KL): on this axis
the proxy keeps rising where over-optimization makes gold turn down.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keel import files
from keel.errors import ConfigError
from keel.text import printable


@dataclass(frozen=True)
class Curves:
    """Evaluations of one run with a finite KL, in the order of training; NaN where there is no value. All [k]."""

    steps: np.ndarray
    root_kl: np.ndarray
    """sqrt(nats)"""
    proxy: np.ndarray
    stderr: np.ndarray
    """Standard error of proxy; known for the column `proxy` alone."""
    gold: np.ndarray
    gold_stderr: np.ndarray
    """Standard error of gold; known for the column `gold` alone."""


def curves(rows: Sequence[Mapping[str, Any]], proxy: str = "proxy", gold: str | None = "gold") -> Curves:
    """Extract the curves from rows of a frontier.arrow; `proxy` and `gold` are names of its columns.

    The KL is a sampled estimate and can be slightly negative, as at step 0, where it is 0 in truth: it is clipped at 0.
    """
    names = ("step", "kl_nats", "stderr", "gold_stderr", proxy, *([gold] if gold else []))
    table = {name: _column(rows, name) for name in names}
    known = np.isfinite(table["kl_nats"])
    nothing = np.full(int(known.sum()), np.nan)
    return Curves(
        steps=table["step"][known],
        root_kl=np.sqrt(np.maximum(table["kl_nats"][known], 0)),
        proxy=table[proxy][known],
        stderr=table["stderr"][known] if proxy == "proxy" else nothing,
        gold=table[gold][known] if gold else nothing,
        gold_stderr=table["gold_stderr"][known] if gold == "gold" else nothing,
    )


def mean_over_seeds(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Frontier rows of an arm: those of its run, or their means over several runs at the steps that all evaluated.

    The standard errors are then those over seeds.
    """
    if len(tables) == 1:
        return [dict(row) for row in tables[0]]
    rows = [{row["step"]: row for row in table} for table in tables]
    means = []
    for step in sorted(set.intersection(*map(set, rows))):
        at_step = [table[step] for table in rows]
        values = {name: _column(at_step, name) for name in at_step[0]}
        row: dict[str, Any] = {name: float(column.mean()) for name, column in values.items()}
        for error, name in (("stderr", "proxy"), ("gold_stderr", "gold")):
            row[error] = float(values[name].std(ddof=1) / np.sqrt(len(rows)))
        means.append({name: value if np.isfinite(value) else None for name, value in row.items()})
    return means


def draw(
    arms: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, proxy: str = "proxy", gold: str | None = "gold"
) -> None:
    """Write a PNG or SVG, by suffix: a color a run, proxy solid, gold dashed, a point an evaluation.

    Bars are one standard error over held-out prompts, or over seeds (`mean_over_seeds`). `arms` holds frontier rows by
    name of the run; proxy and gold are columns of these, gold None where no run has one. Raises ConfigError, one line,
    for another suffix, where no run has an evaluation with a finite KL, and where matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"picture {path}: expected a name that ends in .png or .svg")
    drawn = {name: curves(rows, proxy, gold) for name, rows in arms.items()}
    drawn = {name: points for name, points in drawn.items() if len(points.steps)}
    if not drawn:
        raise ConfigError(
            f"picture {path}: no evaluation of {', '.join(arms)} has a KL; expected runs with a reference"
        )
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no display, no global figure; Agg draws PNG
    except ModuleNotFoundError:
        raise ConfigError(f"picture {path}: matplotlib is not installed; expected `pip install matplotlib`") from None
    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    for number, (name, points) in enumerate(drawn.items()):
        _plot(axis, points, printable(name, limit=60).replace("$", r"\$"), f"C{number % 10}", proxy, gold)
    counts = {row["n"] for rows in arms.values() for row in rows if row.get("n") is not None}
    prompts = f"{min(counts):.0f} held-out prompts" if len(counts) == 1 else "held-out prompts"
    axis.set_title(f"Reward against distance from the reference, {prompts}")
    axis.set_xlabel("square root of the KL to the reference (nats$^{1/2}$)")
    axis.set_ylabel("reward (mean, bars: standard error)")
    axis.margins(x=0.1)  # room for the label of the last step
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    content = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "keel"}):  # the same picture for the same numbers
        figure.savefig(content, format=path.suffix[1:], metadata=metadata)
    files.write(path, content.getvalue())


def _plot(axis: Any, points: Curves, name: str, color: str, proxy: str, gold: str | None) -> None:
    shape: dict[str, Any] = {"markersize": 4, "capsize": 2, "color": color}
    bars = np.nan_to_num(points.stderr)
    axis.errorbar(points.root_kl, points.proxy, yerr=bars, fmt="o-", label=f"{proxy}: {name}", **shape)
    if gold and np.isfinite(points.gold).any():
        bars = np.nan_to_num(points.gold_stderr)
        axis.errorbar(points.root_kl, points.gold, yerr=bars, fmt="s--", label=f"{gold}: {name}", **shape)
    for end in dict.fromkeys((0, len(points.steps) - 1)):
        if np.isfinite(points.proxy[end]):
            where = (points.root_kl[end], points.proxy[end])
            text = f"step {points.steps[end]:.0f}"
            axis.annotate(text, where, xytext=(4, 5), textcoords="offset points", fontsize=7, color=color)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """[rows] of a column, NaN where the row has none or a null."""
    values = [row.get(name) for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
