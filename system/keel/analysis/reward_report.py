"""Reports a reward model on held-out pairs: accuracy, calibration, length. Pure numpy.

Shapes: P pairs, M members of an ensemble; scores of the chosen and of the rejected text of each pair.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from keel.algorithms.advantages import vary
from keel.observability.diagnostics import estimate

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted probability lies in one interval; of every pair the more probable text counts as first."""

    low: float
    high: float
    pairs: int
    predicted: float
    """Mean sigma(|r_w - r_l|), the probability the model gives its own choice."""
    observed: float
    """Share of these choices that agree with the label; a tie is half."""


def accuracies(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen text scores higher, 0.5 at a tie, 0 else: margins [P] = r_w - r_l -> [P]."""
    return (margins > 0) + 0.5 * (margins == 0)


def calibration(margins: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Predicted against observed, in equal intervals of [0.5, 1]; empty intervals are left out."""
    predicted, right = special.expit(np.abs(margins)), accuracies(margins)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.digitize(predicted, edges) - 1, 0, bins - 1)
    return [
        Bin(edges[b], edges[b + 1], int(pairs.sum()), float(predicted[pairs].mean()), float(right[pairs].mean()))
        for b in range(bins)
        if (pairs := place == b).any()
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: mean |predicted - observed| over pairs (2017, arXiv 1706.04599)."""
    return sum(b.pairs * abs(b.predicted - b.observed) for b in bins) / sum(b.pairs for b in bins)


def report(chosen: np.ndarray, rejected: np.ndarray, lengths: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Build the report, as JSON, of scores [M, P] and lengths [P] of the chosen and rejected texts in characters."""
    margins = chosen.mean(0) - rejected.mean(0)
    scores, characters = np.concatenate([chosen.mean(0), rejected.mean(0)]), np.concatenate(lengths)
    longer = np.sign(lengths[0] - lengths[1])
    bins = calibration(margins)
    return {
        "pairs": len(margins),
        "accuracy": estimate(accuracies(margins)).as_json(),
        "member_accuracies": [
            float(accuracies(one - other).mean()) for one, other in zip(chosen, rejected, strict=True)
        ],
        "loss": float(-special.log_expit(margins).mean()),
        "margin_mean": float(margins.mean()),
        "margin_std": float(margins.std()),
        "member_std": float(np.concatenate([chosen, rejected], axis=1).std(0).mean()),
        "calibration": [asdict(one) for one in bins],
        "calibration_error": calibration_error(bins),
        "length_correlation": _spearman(scores, characters),
        "prefers_longer": float((np.sign(margins) == longer)[longer != 0].mean()) if longer.any() else None,
        "label_prefers_longer": float((longer > 0)[longer != 0].mean()) if longer.any() else None,
    }


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Rank correlation; None where one of them does not vary by more than rounding, which has ranks, too."""
    return float(stats.spearmanr(one, other).statistic) if vary(one) and vary(other) else None
