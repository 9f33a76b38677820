"""Every arm beside the KL arms of its learning rate, at equal steps and at equal KL, as `keel compare` does it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from curves import ArmCurves, Experiment

from keel.analysis import compare
from keel.analysis.compared_runs import Evaluation, Run
from keel.observability.diagnostics import Estimate

_NAMES = {"gold": "reward_gold", "proxy": "reward", "kl_nats": "kl_nats"}


@dataclass(frozen=True)
class AtEqual:
    """An arm minus a KL arm, both at one level."""

    level: float
    gold: Estimate
    proxy: Estimate


@dataclass(frozen=True)
class Pairing:
    arm: ArmCurves
    control: ArmCurves
    steps: AtEqual | str
    """Or why they cannot be compared at equal steps."""
    kl: AtEqual | str


def pairings(experiment: Experiment) -> list[Pairing]:
    """Online arms without a guard, each with every KL arm of its learning rate."""
    return [
        paired(arm, control)
        for arm in experiment.arms
        if arm.family not in ("kl", "offline", "guard")
        for control in experiment.family(["kl"], arm.learning_rate)
    ]


def paired(arm: ArmCurves, control: ArmCurves) -> Pairing:
    both = [control, arm]
    runs = [run for member in both for run in _runs(member)]
    comparison = compare.compare(runs, [member.name for member in both for _ in member.seeds])
    matchings = {matching.name: matching for matching in comparison.matchings}
    return Pairing(arm, control, _difference(matchings["steps"]), _difference(matchings["kl"]))


def _difference(matching: compare.Matching) -> AtEqual | str:
    if not matching.arms_at_level:
        return matching.why_not
    differences: Mapping[str, Estimate] = matching.arms_at_level[1].differences
    return AtEqual(matching.level, differences["reward_gold"], differences["reward"])


def _runs(arm: ArmCurves) -> Sequence[Run]:
    """The seeds of an arm as runs to compare."""
    prompts = tuple((place, "") for place in range(arm.end("gold").shape[1]))
    return [
        Run(
            f"{arm.name}-seed-{seed}",
            Path(arm.name) / f"seed-{seed}",
            {"run": {"seed": seed}},
            prompts,
            tuple(
                Evaluation(step, float("nan"), {name: arm.values[key][place, at] for key, name in _NAMES.items()})
                for at, step in enumerate(arm.steps)
            ),
        )
        for place, seed in enumerate(arm.seeds)
    ]
