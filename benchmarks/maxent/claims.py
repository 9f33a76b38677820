"""The paper's claims as statistics of the runs, each with a 95 % interval and a rule that makes a verdict of it.

A rule looks at ends of intervals, never at means, and its text stands on the page before the numbers. Intervals are
over seeds and prompts (`over_seeds_and_prompts`), or over seeds alone where a run gives one number. One seed says
nothing of other seeds: below MIN_SEEDS a verdict is always "undecided here".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from curves import ENTROPY_FAMILIES, ArmCurves, Experiment, payment
from scipy import stats

from keel.analysis.hierarchical_bootstrap import Term, over_seeds_and_prompts
from keel.observability.diagnostics import Estimate

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided here"
MIN_SEEDS = 2
MIN_ARMS = 4
"""Fewest entropy arms of a rank correlation: three are in perfect order by chance in one of six seeds."""
MARGIN = 0.25
"""A fall of gold, or a difference of gaps, below this many standard deviations counts as none."""
SMALLEST_NATS = 0.01
"""A KL below this is taken as this much before its logarithm: the estimate of a KL near 0 can be negative."""
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Row:
    """One line of a claim's table: an arm, or a mean over arms."""

    subject: str
    numbers: tuple[Estimate, ...]
    seeds: int
    verdict: str
    decides: bool = False
    """Whether the verdict of the claim is made of this row's."""


@dataclass(frozen=True)
class Claim:
    """A claim at one learning rate."""

    number: str
    statement: str
    learning_rate: float | None
    columns: tuple[str, ...]
    """Names of the numbers of a row."""
    rows: tuple[Row, ...]

    @property
    def verdict(self) -> str:
        """That of the deciding rows: all supported, or one not supported, or else undecided."""
        verdicts = {row.verdict for row in self.rows if row.decides}
        if NOT_SUPPORTED in verdicts:
            return NOT_SUPPORTED
        return SUPPORTED if verdicts == {SUPPORTED} else UNDECIDED


def mean_of(arms: Sequence[ArmCurves], values: Callable[[ArmCurves], np.ndarray], sign: int = 1) -> list[Term]:
    """Terms of the mean over arms of their [seeds, prompts], for `over_seeds_and_prompts`."""
    return [(sign, values(arm) / len(arms)) for arm in arms]


def fewest_seeds(*groups: Sequence[ArmCurves]) -> int:
    """Seeds of the arm that has the fewest; 0 where a group has no arm."""
    return min((min((len(arm.seeds) for arm in group), default=0) for group in groups), default=0)


def decided(seeds: int, supported: bool, refuted: bool) -> str:
    if seeds < MIN_SEEDS:
        return UNDECIDED
    return SUPPORTED if supported else NOT_SUPPORTED if refuted else UNDECIDED


def fall_of_gold(change: Estimate, spread: float) -> str:
    """fell: the interval lies below 0; held: its low end is above minus MARGIN standard deviations; else unknown."""
    if change.high < 0:
        return "fell"
    return "held" if change.low > -MARGIN * spread else "unknown"


def with_means(
    experiment: Experiment, arms: Sequence[ArmCurves], row: Callable[[str, Sequence[ArmCurves], bool], Row]
) -> tuple[Row, ...]:
    """Rows of a family: the mean over its arms, which decides; the two kinds of payment; every arm."""
    rows = [row(f"mean over arms ({len(arms)})", arms, True)]
    limit = experiment.proxy_range
    small = [arm for arm in arms if 0 < payment(arm.settings) <= limit]
    large = [arm for arm in arms if payment(arm.settings) > limit]
    if small and large:
        rows.append(row("those that can pay less for entropy than the proxy's range", small, False))
        rows.append(row("those that can pay more", large, False))
    return tuple(rows + [row(arm.name, [arm], False) for arm in arms])


def over_optimization(experiment: Experiment, learning_rate: float) -> Claim:
    """Claim 1: gold ends below its peak while the proxy rose after it."""
    arms, spread = experiment.family(ENTROPY_FAMILIES, learning_rate), experiment.spread("gold")

    def row(subject: str, members: Sequence[ArmCurves], decides: bool) -> Row:
        if not members:
            return Row(subject, (UNKNOWN, UNKNOWN), 0, UNDECIDED, decides)
        gold = over_seeds_and_prompts(mean_of(members, lambda arm: arm.since_peak("gold")))
        proxy = over_seeds_and_prompts(mean_of(members, lambda arm: arm.since_peak("proxy")))
        fall, seeds = fall_of_gold(gold, spread), fewest_seeds(members)
        verdict = decided(seeds, fall == "fell" and proxy.low > 0, fall == "held" or proxy.high < 0)
        return Row(subject, (gold, proxy), seeds, verdict, decides)

    columns = ("gold, end - peak", "proxy, end - peak of gold")
    statement = "Entropy arms over-optimize: gold ends below its peak while the proxy rose after the peak."
    return Claim("1", statement, learning_rate, columns, with_means(experiment, arms, row))


def unstable_kl(experiment: Experiment, learning_rate: float) -> Claim:
    """Claim 2: the KL of entropy arms ends higher and jumps further than that of KL arms, as ratios."""
    arms, controls = experiment.family(ENTROPY_FAMILIES, learning_rate), experiment.family(["kl"], learning_rate)

    def row(subject: str, members: Sequence[ArmCurves], decides: bool) -> Row:
        seeds = fewest_seeds(members, controls)
        if not seeds:
            return Row(subject, (UNKNOWN, UNKNOWN), 0, UNDECIDED, decides)
        numbers = tuple(
            ratio(mean_of(members, quantity) + mean_of(controls, quantity, -1))
            for quantity in (log_final_kl, log_largest_rise)
        )
        above = all(number.low > 1 for number in numbers)
        return Row(subject, numbers, seeds, decided(seeds, above, any(n.high < 1 for n in numbers)), decides)

    columns = ("KL at the end, times that of the KL arms", "largest rise of the KL in a step, times theirs")
    statement = "The KL of entropy arms is unstable: it ends higher and jumps further than under KL control."
    return Claim("2", statement, learning_rate, columns, with_means(experiment, arms, row))


def log_final_kl(arm: ArmCurves) -> np.ndarray:
    """[seeds, 1] logarithm of the mean KL at the last evaluation."""
    return np.log(np.maximum(np.nanmean(arm.end("kl_nats"), axis=1), SMALLEST_NATS))[:, None]


def log_largest_rise(arm: ArmCurves) -> np.ndarray:
    """[seeds, 1] logarithm of the largest rise of the training completions' KL from a step to the next."""
    rises = [np.nanmax(np.diff(series)) if len(series) > 1 else math.nan for series in arm.kl_by_step]
    return np.log(np.maximum(np.array(rises), SMALLEST_NATS))[:, None]


def ratio(terms: Sequence[Term]) -> Estimate:
    """Geometric means of arms set against each other, with an interval over seeds; from terms in logarithms."""
    return Estimate(*(math.exp(value) for value in vars(over_seeds_and_prompts(terms)).values()))


def stable_kl_control(experiment: Experiment, learning_rate: float) -> Claim:
    """Claim 3: KL arms keep their gold, and their KL levels off."""
    arms, spread = experiment.family(["kl"], learning_rate), experiment.spread("gold")

    def row(subject: str, members: Sequence[ArmCurves], decides: bool) -> Row:
        if not members:
            return Row(subject, (UNKNOWN, UNKNOWN), 0, UNDECIDED, decides)
        gold = over_seeds_and_prompts(mean_of(members, lambda arm: arm.since_peak("gold")))
        late = over_seeds_and_prompts(mean_of(members, late_growth))
        fall, seeds = fall_of_gold(gold, spread), fewest_seeds(members)
        verdict = decided(seeds, fall == "held" and late.high < 0, fall == "fell" or late.low > 0)
        return Row(subject, (gold, late), seeds, verdict, decides)

    columns = ("gold, end - peak", "KL of the last third - half of an even growth (nats)")
    statement = "KL arms stay stable: gold does not end below its peak, and the KL is bounded."
    return Claim("3", statement, learning_rate, columns, with_means(experiment, arms, row))


def late_growth(arm: ArmCurves) -> np.ndarray:
    """[seeds, prompts]: growth of the KL in the last third of the steps minus a sixth of all of its growth.

    A third would be an even growth; the KL at two thirds lies on the line between two evaluations.
    """
    kl, steps = arm.values["kl_nats"], arm.steps
    if len(steps) == 1:
        return np.full_like(kl[:, 0], math.nan)
    place = float(np.interp(steps[0] + 2 / 3 * (steps[-1] - steps[0]), steps, range(len(steps))))
    before = min(int(place), len(steps) - 2)
    weight = place - before
    at_two_thirds = (1 - weight) * kl[:, before] + weight * kl[:, before + 1]
    return kl[:, -1] - at_two_thirds - (kl[:, -1] - kl[:, 0]) / 6


def no_prevention(experiment: Experiment, learning_rate: float) -> Claim:
    """Claim 4a: the gap of proxy and gold is no smaller with entropy than without a regularizer."""
    arms, none = experiment.family(ENTROPY_FAMILIES, learning_rate), experiment.family(["none"], learning_rate)

    def row(subject: str, members: Sequence[ArmCurves], decides: bool) -> Row:
        seeds = fewest_seeds(members, none)
        if not seeds:
            return Row(subject, (UNKNOWN,), 0, UNDECIDED, decides)
        terms = mean_of(members, lambda arm: gap(experiment, arm))
        number = over_seeds_and_prompts(terms + mean_of(none, lambda arm: gap(experiment, arm), -1))
        verdict = decided(seeds, number.low > -MARGIN, number.high < -MARGIN)
        return Row(subject, (number,), seeds, verdict, decides)

    statement = "Entropy does not prevent reward hacking: the gap of proxy and gold is no smaller than without it."
    columns = ("gap at the end - that of arm none (standard deviations)",)
    return Claim("4a", statement, learning_rate, columns, with_means(experiment, arms, row))


def gap(experiment: Experiment, arm: ArmCurves) -> np.ndarray:
    """[seeds, prompts]: rise of the proxy minus rise of gold since the start, each in its standard deviations."""
    rises = [(arm.end(name) - arm.start(name)) / experiment.spread(name) for name in ("proxy", "gold")]
    return rises[0] - rises[1]


def entropy_correlates(experiment: Experiment, learning_rate: float) -> Claim:
    """Claim 4b: over entropy arms, more entropy goes with more hacking, in every seed of its own."""
    arms = experiment.family(ENTROPY_FAMILIES, learning_rate)
    causes: dict[str, Callable[[ArmCurves], np.ndarray]] = {
        "what entropy can be paid": lambda arm: np.full(len(arm.seeds), payment(arm.settings)),
        "entropy measured at the end": lambda arm: np.nanmean(arm.end("entropy"), axis=1),
    }
    effects: dict[str, Callable[[ArmCurves], np.ndarray]] = {
        "gap of proxy and gold": lambda arm: np.nanmean(gap(experiment, arm), axis=1),
        "fall of gold": lambda arm: -np.nanmean(arm.since_peak("gold"), axis=1),
    }
    rows = []
    for cause, of_cause in causes.items():
        for effect, of_effect in effects.items():
            taus = correlations(arms, of_cause, of_effect)
            tau = over_seeds_and_prompts([(1, taus[:, None])]) if len(taus) else UNKNOWN
            verdict = decided(len(taus), tau.low > 0, tau.high < 0)
            rows.append(Row(f"{cause}, with the {effect}", (tau,), len(taus), verdict, effect.startswith("gap")))
    statement = "Entropy goes with reward hacking: the more of it, the wider the gap of proxy and gold."
    return Claim("4b", statement, learning_rate, ("Kendall's rank correlation over arms",), tuple(rows))


def correlations(
    arms: Sequence[ArmCurves], cause: Callable[[ArmCurves], np.ndarray], effect: Callable[[ArmCurves], np.ndarray]
) -> np.ndarray:
    """[seeds] Kendall's tau over the arms, one for every seed that all arms have; none for fewer than MIN_ARMS."""
    if len(arms) < MIN_ARMS:
        return np.empty(0)
    shared = sorted(set.intersection(*(set(arm.seeds) for arm in arms)))
    pairs = [
        (dict(zip(arm.seeds, cause(arm), strict=True)), dict(zip(arm.seeds, effect(arm), strict=True))) for arm in arms
    ]
    taus = [stats.kendalltau([c[seed] for c, _ in pairs], [e[seed] for _, e in pairs]).statistic for seed in shared]
    return np.array(taus)


def offline_works(experiment: Experiment, learning_rate: float) -> Claim:
    """Claim 5: SimPO's gold is above the start's and above that of the best entropy arm at its end."""
    simpo, arms = experiment.named("simpo", None), experiment.family(ENTROPY_FAMILIES, learning_rate)
    best = max(arms, key=lambda arm: float(np.nanmean(arm.end("gold"))), default=None)

    def row(subject: str, other: np.ndarray | None, seeds: int, decides: bool) -> Row:
        if simpo is None or other is None:
            return Row(subject, (UNKNOWN,), 0, UNDECIDED, decides)
        number, seeds = over_seeds_and_prompts([(1, simpo.end("gold")), (-1, other)]), min(seeds, len(simpo.seeds))
        return Row(subject, (number,), seeds, decided(seeds, number.low > 0, number.high < 0), decides)

    start = arms[0].start("gold")[:1] if arms else None
    rows = [row("simpo - start", start, MIN_SEEDS if simpo is None else len(simpo.seeds), True)]
    name = "best entropy arm" if best is None else f"{best.name}, the best entropy arm"
    rows.append(row(f"simpo - {name}", best and best.end("gold"), len(best.seeds) if best else 0, True))
    rows += [row(f"simpo - {arm.name}", arm.end("gold"), len(arm.seeds), False) for arm in arms if arm is not best]
    statement = "Offline SimPO works where maximum entropy fails online."
    return Claim("5", statement, learning_rate, ("gold at the end, difference",), tuple(rows))


CLAIMS = (over_optimization, unstable_kl, stable_kl_control, no_prevention, entropy_correlates, offline_works)
