"""What happened in a run, in plain sentences computed from its files."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keel.analysis import gold_fits
from keel.analysis.report_curves import Curve, EvaluationPoint, Interval, interval
from keel.errors import without_passwords

FAILURES = {
    "worker_lost": "worker lost and replaced",
    "retry": "batch made again",
    "rebuild": "rebuild of the learner and the buffer",
    "resume": "resume from a checkpoint",
    "restored": "restoring of accepted rollouts",
    "degraded": "stretch with fewer workers than wanted",
    "start_failed": "start that failed",
    "checkpoint_damaged": "damaged checkpoint",
    "line_damaged": "damaged line of metrics.jsonl",
    "quarantine": "step whose rows the learner refused",
    "tracker_failed": "step that a tracker did not take",
    "report_failed": "report that was not written",
}
"""Events that are failures or recoveries, in words."""
GUARD = ("guard", "guard_multipliers", "guard_stop", "roll_back")
"""Events of the guard: a firing, and what follows from it."""


def of_online(
    lines: Sequence[Mapping[str, Any]],
    points: Sequence[EvaluationPoint],
    values: Sequence[Mapping[str, np.ndarray]],
    committed: Sequence[int],
    best_by: str,
    settings: Mapping[str, Any],
) -> list[str]:
    """Proxy, gold, KL, entropy, length and the best checkpoint of an online run, from its evaluations.

    `settings`: the tree of its config.yaml.
    """
    if not points:
        return ["It has no evaluation yet, so nothing is known about held-out prompts.", *_last_step(lines)]
    first, last = points[0], points[-1]
    if first.step == last.step:
        where = f"At its only evaluation, step {first.step}, on {first.values['reward'].n} held-out prompts,"
    else:
        where = (
            f"Between the first and the last evaluation (steps {first.step} and {last.step},"
            f" {last.values['reward'].n} held-out prompts)"
        )
    sentences = [f"{where} the proxy, the training reward, {_change(first, last, 'reward')}."]
    sentences += (
        _gold(points, values) + _fitted(points, settings)
        if "reward_gold" in last.values
        else ["The run has no reward called gold, so this report cannot say whether the proxy was over-optimized."]
    )
    sentences += _distance(first, last)
    return sentences + _best(points, committed, best_by)


def _change(first: EvaluationPoint, last: EvaluationPoint, name: str) -> str:
    if first.step == last.step:
        return f"was {number(last.values[name])}"
    return f"went from {number(first.values[name])} to {number(last.values[name])}"


def number(value: Interval) -> str:
    """The mean with its standard error, to the two leading digits of the error."""
    if math.isnan(value.mean):
        return "unknown"
    if not value.stderr > 0:
        return f"{value.mean:.3g}" + (" (standard error 0)" if value.stderr == 0 else "")
    decimals = max(1 - math.floor(math.log10(value.stderr)), 0)
    return f"{value.mean:.{decimals}f} (standard error {value.stderr:.{decimals}f})"


def peak(points: Sequence[EvaluationPoint], name: str) -> int | None:
    """Place of the evaluation with the largest mean, the first of equal ones; None where none has a value."""
    means = [point.values[name].mean if name in point.values else math.nan for point in points]
    return int(np.nanargmax(means)) if np.isfinite(means).any() else None


def _gold(points: Sequence[EvaluationPoint], values: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    best = peak(points, "reward_gold")
    if best is None:
        return ["Gold has no value in any evaluation."]
    sentences = [f"Gold {_change(points[0], points[-1], 'reward_gold')}."]
    if len(points) == 1:
        return sentences
    at = f"Gold was highest at step {points[best].step}, at {number(points[best].values['reward_gold'])}"
    if best == len(points) - 1:
        return [*sentences, f"{at}, which is the last evaluation: it shows no turn of gold."]
    fall = interval(values[best]["reward_gold"] - values[-1]["reward_gold"])
    rise = interval(values[-1]["reward"] - values[best]["reward"])
    sentences.append(
        f"{at}; the last evaluation lies {fall.mean:.3g} below it (standard error of the paired difference"
        f" {fall.stderr:.2g})."
    )
    if fall.low > 0 and rise.low > 0:
        sentences.append(
            f"From there on the proxy rose by {rise.mean:.3g} while gold fell by {fall.mean:.3g}, both beyond their 95"
            " % intervals: the proxy was over-optimized. The peak was chosen as the largest of"
            f" {len(points)} evaluations, which makes the fall look larger than it is."
        )
    else:
        sentences.append("Proxy up and gold down from there on, both beyond their 95 % intervals, is not seen.")
    return sentences


def _fitted(points: Sequence[EvaluationPoint], settings: Mapping[str, Any]) -> list[str]:
    """Where gold peaks on the curve of Gao et al., and whether the run is behind it."""
    usable = [point for point in points if {"reward_gold", "kl_nats"} <= set(point.values)]
    other = _other_reference(settings)
    if usable and other:
        return [
            f"No curve of Gao et al. (2210.10760) is fitted: with {other} the KL is not the distance from the start"
            " model."
        ]
    gold = [point.values["reward_gold"] for point in usable]
    distances = [math.sqrt(max(0.0, point.values["kl_nats"].mean)) * (point.step > 0) for point in usable]
    means, errors = [value.mean for value in gold], [value.stderr for value in gold]
    fit = gold_fits.fit("reinforcement_learning", distances, means, errors)
    if fit is None:
        return []
    peak_kl = [distance**2 for distance in (fit.peak_distance.value, fit.peak_distance.low, fit.peak_distance.high)]
    curve = "The curve gold = d (alpha - beta log d), d = sqrt(KL), of Gao et al. (2210.10760)"
    numbers = f"alpha {fit.alpha.value:.3g} [{fit.alpha.low:.3g}, {fit.alpha.high:.3g}], beta {fit.beta.value:.3g}"
    numbers += f" [{fit.beta.low:.3g}, {fit.beta.high:.3g}]"
    fits = f"chi-squared {fit.residual_per_freedom:.2g} a degree of freedom"
    if math.isinf(peak_kl[0]):
        return [f"{curve}, fitted to {len(usable)} evaluations ({numbers}; {fits}), does not turn."]
    return [
        f"{curve}, fitted to {len(usable)} evaluations ({numbers}; {fits}), peaks at a KL of {peak_kl[0]:.3g} nats"
        f" [{peak_kl[1]:.3g}, {peak_kl[2]:.3g}]; the last evaluation is at {distances[-1] ** 2:.3g} nats."
    ]


def _other_reference(settings: Mapping[str, Any]) -> str | None:
    """The setting, with its value, by which the reference is not the start model throughout the run."""
    reference, start = settings.get("reference") or {}, (settings.get("policy") or {}).get("model")
    if reference.get("ref_policy") == "previous":
        return "reference.ref_policy=previous"
    model = reference.get("model")
    return None if model in (None, start) else f"reference.model={without_passwords(str(model))}"


def _distance(first: EvaluationPoint, last: EvaluationPoint) -> list[str]:
    sentences = []
    if "kl_nats" in last.values:
        text = f"The KL to the reference is {number(last.values['kl_nats'])} nats a completion at step {last.step}."
        sentences.append(text)
    for name, title, unit in (
        ("entropy_nats", "Entropy", "nats a token"),
        ("length_tokens", "The length of completions", "tokens"),
    ):
        if name in last.values and name in first.values:
            sentences.append(f"{title} {_change(first, last, name)} {unit}.")
    return sentences


def best_by(points: Sequence[EvaluationPoint], monitor: str | None) -> str:
    """The metric that decides which evaluation is the best: guard.monitor, else gold, else the proxy."""
    names = [f"reward_{monitor}", "reward_gold"]
    return next((name for name in names if points and name in points[-1].values), "reward")


def _best(points: Sequence[EvaluationPoint], committed: Sequence[int], metric: str) -> list[str]:
    """The best evaluation by this metric, and whether a checkpoint of it is there."""
    title = "proxy" if metric == "reward" else metric.removeprefix("reward_")
    best = peak(points, metric)
    if best is None:
        return []
    step = points[best].step
    text = f"The best evaluation by {title} is that of step {step}"
    if step == 0:
        return [f"{text}, the start model: training did not improve it."]
    if step in committed:
        return [f"{text}; its checkpoint is checkpoints/step-{step:06d}."]
    if not committed:
        return [f"{text}; the run directory holds no checkpoint."]
    nearest = min(committed, key=lambda other: (abs(other - step), other))
    return [f"{text}; its checkpoint is not there, the nearest is checkpoints/step-{nearest:06d}."]


def _last_step(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {"reward": "reward {:.3g}", "kl_nats": "KL {:.3g} nats", "length_tokens": "length {:.3g} tokens"}
    known = [text.format(lines[-1][name]) for name, text in names.items() if lines and name in lines[-1]]
    return [f"On the rollouts of its last step, {lines[-1]['step']}: {', '.join(known)}."] if known else []


def of_stage(curves: Mapping[str, Curve]) -> list[str]:
    """Held-out loss and accuracy of an offline stage."""
    sentences = []
    for name, title, best in (("held_out_loss", "loss", min), ("held_out_accuracy_ratio", "accuracy", max)):
        if name in curves:
            curve = curves[name]
            value = best(curve.mean)
            sentences.append(
                f"The held-out {title} went from {curve.mean[0]:.4g} at step {curve.steps[0]} to {curve.mean[-1]:.4g}"
                f" at step {curve.steps[-1]}; the best was {value:.4g} at step {curve.steps[curve.mean.index(value)]}."
            )
    return sentences or ["It has no evaluation yet."]


def of_events(events: Sequence[Mapping[str, Any]], last_line: Mapping[str, Any]) -> list[str]:
    """Failures and recoveries, dropped samples, and what the guard warned of or did."""
    counts = Counter(str(event["event"]) for event in events)
    failures = [f"{counts[name]} x {text}" for name, text in FAILURES.items() if counts[name]]
    sentences = [f"Failures and recoveries: {'; '.join(failures)}." if failures else "No failure was recorded."]
    for counter, title in (
        ("samples_failed_total", "Samples without a reward"),
        ("groups_dropped_total", "Groups dropped"),
    ):
        reasons = {reason: count for reason, count in (last_line.get(counter) or {}).items() if count}
        if reasons:
            listed = ", ".join(f"{count:.0f} {reason}" for reason, count in reasons.items())
            sentences.append(f"{title}: {listed}.")
    return sentences + _of_guard(events)


def _of_guard(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the guard warned of, and what it did."""
    warned: Counter[str] = Counter()
    acted: Counter[str] = Counter()
    for event in events:
        detector, step = event.get("detector"), event.get("step")
        actions = [action for action in event.get("actions") or [] if action != "warn"]
        if event["event"] == "guard" and actions:
            acted[f"{detector} ({', '.join(actions)})"] += 1
        elif event["event"] == "guard":
            warned[f"{detector}"] += 1
        elif event["event"] == "roll_back":
            acted[f"roll back to step {step}"] += 1
        elif event["event"] == "guard_stop":
            acted[f"stop after step {step}"] += 1
    return [
        f"{title}: {', '.join(f'{count} x {text}' for text, count in counts.items())}."
        for title, counts in (("The guard warned", warned), ("The guard acted", acted))
        if counts
    ]
