"""How often 95 % intervals over seeds and prompts hold the planted difference of two arms.

v[s, p] = b[p] + c[p] + a[s] + e[s, p]: the prompts' own level b (standard deviation 2, in both arms), what the prompt
does in one arm alone (c, skewed: a centered exponential), the seed (a), the rest (e). Beside Keel's interval: seeds
and prompts both resampled, percentiles (the pigeonhole bootstrap), which knows nothing of how few the seeds are.

Usage: python benchmarks/seed_coverage.py [TRIALS]
"""

import sys

import numpy as np

from keel.analysis.hierarchical_bootstrap import Term, over_seeds_and_prompts

LAYOUTS = ((0.3, 0.5, 1.0, 64), (0.0, 0.5, 1.0, 64), (0.3, 0.0, 0.3, 64), (0.1, 1.0, 1.0, 32))
"""Standard deviations of seeds, prompts in one arm, rest; number of prompts."""


def drawn(rng: np.random.Generator, layout: tuple[float, float, float, int], seeds: int) -> list[Term]:
    of_seeds, of_prompts, of_rest, prompts = layout
    shared = 2 * rng.normal(size=prompts)
    first, second = (
        shared + of_seeds * rng.normal(size=(seeds, 1)) + of_rest * rng.normal(size=(seeds, prompts)) for _ in range(2)
    )
    return [(1, first + of_prompts * (rng.exponential(size=prompts) - 1)), (-1, second)]


def resampled(terms: list[Term], rng: np.random.Generator, draws: int = 300) -> tuple[float, float]:
    """Percentiles of the difference with seeds and prompts drawn with replacement."""
    prompts = rng.integers(0, terms[0][1].shape[1], (draws, terms[0][1].shape[1]))
    differences = np.zeros(draws)
    for sign, values in terms:
        seeds = rng.integers(0, len(values), (draws, len(values)))
        differences += [
            sign * values[np.ix_(rows, columns)].mean() for rows, columns in zip(seeds, prompts, strict=True)
        ]
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rng = np.random.default_rng(1)
    print("seeds  seed prompt rest prompts   covered   both resampled")
    for seeds in (2, 3, 5, 8):
        for layout in LAYOUTS:
            held = np.zeros(2)
            for _ in range(trials):
                terms = drawn(rng, layout, seeds)
                interval = over_seeds_and_prompts(terms)
                low, high = resampled(terms, rng)
                held += (interval.low <= 0 <= interval.high, low <= 0 <= high)
            covered, other = held / trials
            print(
                f"{seeds:5d}  {layout[0]:4} {layout[1]:6} {layout[2]:4} {layout[3]:7}   {covered:.3f}     {other:.3f}"
            )
