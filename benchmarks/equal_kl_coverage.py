"""How often the interval of a difference at equal KL holds the truth, with and without the error of the KL in it.

Pairs of runs are drawn whose reward is linear in KL, 64 prompts; the truth is the difference of the lines at the last
KL of the second run. Normal intervals stand in for the bootstrap, which takes too long for this many.

Usage: python benchmarks/equal_kl_coverage.py
"""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from keel.analysis import compare
from keel.analysis.compared_runs import Evaluation, Run
from keel.observability.diagnostics import Estimate

PROMPTS, REPETITIONS = 64, 600
# standard deviation of the reward's noise, slope of the reward per nat in either run
SETTINGS = [(1, 0.1, 0.1), (1, 0.1, 0.05), (0.3, 0.05, 0.05), (0.3, 0.05, 0.0), (1, 0.02, 0.02), (0.3, 0.1, 0.1)]


def normal(values: np.ndarray) -> Estimate:
    mean, half = float(values.mean()), 1.96 * float(stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def arm(rng: np.random.Generator, base: np.ndarray, kl_nats: list[float], slope: float, noise: float) -> Run:
    """Evaluations at these mean KLs; a prompt's KL has a standard deviation of 7 nats, 0.3 before training."""
    evaluations = [
        Evaluation(
            step,
            float(step),
            {
                "reward": base + slope * kl + rng.normal(0, noise, PROMPTS),
                "kl_nats": kl + rng.normal(0, 7 if kl else 0.3, PROMPTS),
            },
        )
        for step, kl in enumerate(kl_nats)
    ]
    prompts = tuple((number, "") for number in range(PROMPTS))
    return Run("run", Path("run"), {}, prompts, tuple(evaluations))


def coverage(noise: float, slope: float, other_slope: float) -> float:
    rng, held = np.random.default_rng(0), 0
    for _ in range(REPETITIONS):
        base = rng.normal(0, 1, PROMPTS)
        pair = [arm(rng, base, [0, 8, 16], slope, noise), arm(rng, base, [0, 6, 12], other_slope, noise)]
        matching = next(each for each in compare.compare(pair).matchings if each.name == "kl")
        difference = matching.arms_at_level[1].differences["reward"]
        held += difference.low <= 12 * (other_slope - slope) <= difference.high
    return held / REPETITIONS


if __name__ == "__main__":
    compare.estimate = normal
    corrected = compare._with_error_of_kl

    def fixed(place: Any, values: Any, anchor: np.ndarray) -> dict[str, np.ndarray]:
        return dict(values)

    print("| noise | slopes | level and place held fixed | keel |\n|---|---|---|---|")
    for noise, slope, other_slope in SETTINGS:
        rates = []
        for compare._with_error_of_kl in (fixed, corrected):
            rates.append(coverage(noise, slope, other_slope))
        print(f"| {noise} | {slope}, {other_slope} | {rates[0]:.3f} | {rates[1]:.3f} |")
