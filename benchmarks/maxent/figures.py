"""The two pictures of RESULTS.md: gold and proxy against the root of the KL, and gold by step, a panel a family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from curves import FAMILIES, ArmCurves, Experiment
from matplotlib.figure import Figure

FRONTIER, GOLD = "frontier.svg", "gold.svg"
TITLES = {
    "none": "no regularizer",
    "kl": "KL in the reward",
    "entropy_sum": "entropy, sum",
    "entropy_mean_exact": "entropy, exact mean",
    "entropy_mean_naive": "entropy, naive mean",
    "token_bonus": "entropy, token bonus",
    "other": "other objectives",
}


def draw(experiment: Experiment, folder: Path) -> None:
    """Write both pictures, of the learning rate that the most arms have."""
    rates = [arm.learning_rate for arm in experiment.arms if arm.learning_rate is not None]
    rate = max(experiment.learning_rates, key=rates.count)
    _panels(
        experiment, rate, folder / FRONTIER, _against_root_kl, "square root of the KL to the reference (nats$^{1/2}$)"
    )
    _panels(experiment, rate, folder / GOLD, _by_step, "step")


def _panels(
    experiment: Experiment, rate: float, path: Path, plot: Callable[[Any, ArmCurves, str], None], label: str
) -> None:
    families = [(name, experiment.family([name], rate)) for name in (*FAMILIES, "other")]
    families = [(name, arms) for name, arms in families if arms]
    with matplotlib.rc_context({"svg.hashsalt": "keel", "svg.fonttype": "none", "font.size": 8}):
        columns = min(4, len(families))
        rows = -(-len(families) // columns)
        figure = Figure(figsize=(3.2 * columns, 2.8 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=plot is _by_step, sharey=True, squeeze=False).ravel()
        for axis, (name, arms) in zip(axes, families, strict=False):
            for number, arm in enumerate(arms):
                plot(axis, arm, f"C{number % 10}")
            axis.set_title(TITLES[name])
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6)
        for axis in axes[len(families) :]:
            axis.set_visible(False)
        figure.savefig(path, metadata={"Date": None})


def _mean(arm: ArmCurves, quantity: str) -> np.ndarray:
    """[evaluations] mean over seeds and prompts."""
    return np.nanmean(arm.values[quantity], axis=(0, 2))


def _against_root_kl(axis: Any, arm: ArmCurves, color: str) -> None:
    root = np.sqrt(np.maximum(_mean(arm, "kl_nats"), 0))
    axis.plot(root, _mean(arm, "proxy"), "o-", markersize=3, color=color, label=f"proxy: {arm.name}")
    axis.plot(root, _mean(arm, "gold"), "s--", markersize=3, color=color, label=f"gold: {arm.name}")


def _by_step(axis: Any, arm: ArmCurves, color: str) -> None:
    axis.plot(arm.steps, _mean(arm, "gold"), "s-", markersize=3, color=color, label=arm.name)
    for seed in arm.values["gold"]:
        axis.plot(arm.steps, np.nanmean(seed, axis=1), linewidth=0.5, alpha=0.6, color=color)
