"""Explains where the time of a run goes: what the learner did or waited for, how busy each role is, what to change.

    metrics.jsonl (busy, idle, queue seconds of utilization.py) --> the difference of two lines --> Explanation

`keel explain` and the column of the live table are this one computation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.observability.utilization import LEARNER, STAGES

Line = Mapping[str, Any]
_OPTION = {"generator": "--generators", "reference": "--reference", "scorer": "--scorers", LEARNER: "--learners"}
_SETTING = {
    "weight_sync": "buffer.groups_per_step (larger steps publish less often), or buffer.max_staleness",
    "evaluation": "evaluation.every_steps (0: only at the start and the end), or lower prompts.held_out",
    "checkpoint": "checkpoint.every_steps (0: only at the end)",
    "new_reference": "reference.iteration_steps",
}
_CLOSE = 0.1
"""Two shares that differ by less: the second is named, too."""
_LARGE, _SPARE = 0.25, 0.2


@dataclass(frozen=True)
class Role:
    """Workers of a role over a window."""

    name: str
    workers: float
    """Mean number that served."""
    busy_ratio: float
    waiting_batches: float
    """Mean number of batches in line for a worker."""
    idle_ratios: dict[str, float]
    """Share of the workers' time without work, by what they waited for; with `busy_ratio` they add up to 1."""


@dataclass(frozen=True)
class Explanation:
    first_step: int
    last_step: int
    seconds_per_step: float
    timeline: dict[str, float]
    """Share of the time of the learner's own work and of each role or phase it waited for. Largest first; sum 1."""
    roles: list[Role]
    advice: list[str]


def explain(lines: Sequence[Line], max_staleness: int = 0, steps: int | None = None) -> Explanation:
    """The last `steps` steps of the lines of a metrics.jsonl, all that there are by default.

    The first line there is stands for the start: what came before it, start-up and first evaluation, is no step's.
    Raises ValueError where nothing was counted between two steps.
    """
    first = lines[max(0, len(lines) - 1 - (steps or len(lines)))] if lines else {}
    last = lines[-1] if lines else {}
    roles = worked(first, last)
    if not roles or roles[-1].name != LEARNER:
        raise ValueError("no two steps whose worker seconds were counted")
    shares = {LEARNER: roles[-1].busy_ratio} | roles[-1].idle_ratios
    timeline = {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share}
    count = last["step"] - first["step"]
    seconds = sum(_increase("phase_seconds_total", first, last).values()) / count
    advice = _advice(timeline, roles, max_staleness)
    return Explanation(first["step"] + 1, last["step"], seconds, timeline, roles, advice)


def largest_share(before: Line, now: Line) -> str:
    """Name what took most of a step's time, for a cell of the live table: `generator 62%`."""
    timeline = explain([before, now]).timeline
    name = next(iter(timeline))
    return f"{name} {timeline[name]:.0%}"


def _increase(name: str, first: Line, last: Line) -> dict[str, float]:
    """Increase of a labeled counter, by label; a run resumed from a checkpoint may have lost some of it."""
    before, now = first.get(name, {}), last.get(name, {})
    return {label: grown for label in now if (grown := now[label] - before.get(label, 0.0)) > 0}


def worked(first: Line, last: Line) -> list[Role]:
    """The roles whose worker seconds were counted between two lines; the learner is the last of them."""
    return [role for name in (*STAGES, LEARNER) if (role := _role(name, first, last))]


def _role(name: str, first: Line, last: Line) -> Role | None:
    busy = _increase("busy_seconds_total", first, last).get(name, 0.0)
    idle = _increase("idle_seconds_total", first, last)
    idle_by_target = {label.partition("/")[2]: value for label, value in idle.items() if label.startswith(f"{name}/")}
    total = busy + sum(idle_by_target.values())
    wall = sum(_increase("phase_seconds_total", first, last).values())
    if not total or not wall:
        return None
    queue = _increase("queue_seconds_total", first, last).get(name, 0.0)
    ratios = {on: value / total for on, value in sorted(idle_by_target.items(), key=lambda item: -item[1])}
    return Role(name, total / wall, busy / total, queue / wall, ratios)


def _advice(timeline: Mapping[str, float], roles: Sequence[Role], max_staleness: int) -> list[str]:
    ranked = list(timeline.items())
    largest = [name for name, share in ranked if share > ranked[0][1] - _CLOSE]
    advice = [_to_shorten(name, timeline[name]) for name in largest]
    stages = sum(share for name, share in timeline.items() if name in STAGES)
    if max_staleness == 0 and min(stages, timeline.get(LEARNER, 0.0)) > _LARGE:
        advice.append(
            "rollouts and learner take turns (buffer.max_staleness=0): with 1 the next step's rollouts are made while"
            " the learner works, at the price of samples one version old"
        )
    spare = [role for role in roles if role.busy_ratio < _SPARE and role.workers > 1.5 and role.name not in largest]
    return advice + [
        f"{role.workers:.0f} workers of {role.name} are busy {role.busy_ratio:.0%} of the time: fewer would do"
        for role in spare
    ]


def _to_shorten(name: str, share: float) -> str:
    if name in _OPTION:
        reason = "works" if name == LEARNER else "is what the learner waits for"
        return f"{name} {reason} {share:.0%} of the time: raise its count (keel scale RUN {_OPTION[name]} N)"
    if name in _SETTING:
        return f"{name} takes {share:.0%} of the time: raise {_SETTING[name]}"
    if name == "start":
        why = "the run was resumed, or built again after a loss or for other ranks (events.jsonl says when and why)"
        return f"start takes {share:.0%} of the time: {why}"
    return f"{name} takes {share:.0%} of the time: no count changes that"
