"""What the guard's detectors did in runs that nothing was done about, and what guarded arms kept of the peak.

A run is healthy where gold does not end below its peak by more than one standard error of that difference, paired by
prompt; else it is hacked. The fall of a hacked run is at the first evaluation at which gold lies more than one such
standard error below its largest mean so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from claims import Row, decided, fewest_seeds
from curves import Experiment

from keel.analysis.hierarchical_bootstrap import over_seeds_and_prompts
from keel.config.guard import GuardSettings

DETECTORS = tuple(GuardSettings().watches())


@dataclass(frozen=True)
class DetectorRecord:
    """One detector over all unguarded runs."""

    detector: str
    fired_healthy: int
    healthy: int
    hacked: int
    delays: tuple[int, ...]
    """First firing minus the fall (steps), of the hacked runs in which it fired."""


def fall_step(steps: Sequence[int], gold: np.ndarray) -> int | None:
    """Step of the fall of one run's gold [evaluations, prompts]; None: it never fell."""
    means = np.nanmean(gold, axis=1)
    for place in range(1, len(steps)):
        peak = int(means[: place + 1].argmax())
        if is_below(gold[place], gold[peak]):
            return steps[place]
    return None


def is_below(late: np.ndarray, early: np.ndarray) -> bool:
    """Whether the mean of late - early [prompts] is below minus its standard error."""
    change = (late - early)[np.isfinite(late - early)]
    return len(change) > 1 and float(change.mean()) < -float(change.std(ddof=1)) / math.sqrt(len(change))


def records(experiment: Experiment) -> list[DetectorRecord]:
    """Of every detector, also of one that never fired."""
    healthy: list[set[str]] = []
    hacked: list[dict[str, int]] = []
    falls: list[int] = []
    for arm in experiment.arms:
        if arm.guarded or arm.settings["offline"]:
            continue
        for seed, gold in zip(arm.seeds, arm.values["gold"], strict=True):
            first: dict[str, int] = {}
            for firing in sorted(arm.firings, key=lambda firing: firing.step):
                if firing.seed == seed:
                    first.setdefault(firing.detector, firing.step)
            peak = int(np.nanmean(gold, axis=1).argmax())
            fell = fall_step(arm.steps, gold)
            if is_below(gold[-1], gold[peak]) and fell is not None:
                hacked.append(first)
                falls.append(fell)
            else:
                healthy.append(set(first))
    return [
        DetectorRecord(
            detector,
            sum(detector in fired for fired in healthy),
            len(healthy),
            len(hacked),
            tuple(first[detector] - fell for first, fell in zip(hacked, falls, strict=True) if detector in first),
        )
        for detector in DETECTORS
    ]


def guarded_arms(experiment: Experiment) -> list[Row]:
    """Gold of each guarded arm minus a bound, the unguarded arm's peak minus one standard error of its mean.

    At the guarded arm's end, which decides; at its peak, the checkpoint that keep_best keeps, which the other half of
    the prompts chooses; and of the unguarded arm at its end.
    """
    rows = []
    for arm in experiment.arms:
        plain = experiment.named(arm.name.removesuffix("-guard"), arm.learning_rate)
        if not arm.guarded or plain is None:
            continue
        peak = plain.at_peak("gold")
        error = np.nanstd(peak.mean(axis=0), ddof=1) / math.sqrt(peak.shape[1])
        places = (arm.end("gold"), arm.at_peak("gold"), plain.end("gold"))
        gains = tuple(over_seeds_and_prompts([(1, gold), (-1, peak - error)]) for gold in places)
        seeds = fewest_seeds([arm], [plain])
        rows.append(Row(arm.label, gains, seeds, decided(seeds, gains[0].low > 0, gains[0].high < 0), True))
    return rows
