"""`keel report RUN_DIR...`: collects the numbers of a report from run directories; report_page.py makes the page.

RUN_DIR --> config.yaml                       settings, environment, which runs differ by their seed alone
            metrics.jsonl                     curves over steps
            evaluations/, evaluations.jsonl   curves with intervals, the frontier, what happened in words
            events.jsonl                      marks on the curves
            rollouts/, evaluations/           some rows, with the log-ratio of every token

No model is loaded. A run may be live: a last line that was cut off is left out.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from keel import __version__, checkpoint, files
from keel.analysis import report_curves, report_words
from keel.analysis.report_curves import Chart, Curve, EvaluationPoint
from keel.analysis.report_rows import Rows, choose
from keel.config import loader
from keel.config.commands import command_of
from keel.errors import ConfigError, without_passwords
from keel.observability import evaluations
from keel.online import status
from keel.text import one_line

_UNREADABLE = (pa.ArrowException, ArithmeticError, AssertionError, KeyError, OSError, TypeError, ValueError)
"""What files of a run raise that are not what their names say."""
_QUIET = ("checkpoint", "parity", "running", "waiting_for_resources", "resources_found", "worker_started")
"""Events of a run that goes well; they are counted, and no mark is drawn."""
_NOT_OF_AN_ARM = ("run.seed", "run.name", "run.directory", "metrics.", "tracking.", "cluster.", "deadlines.")
"""Settings in which runs of one arm may differ: the seed, and what changes no number."""
_NOT_A_DIFFERENCE = ("run.name", "run.directory", "metrics.", "tracking.")
_MOST_MARKS = 500


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl."""

    name: str
    step: int
    """The event's own step, or the last step that was recorded before it."""
    time: float
    kind: str
    """`failure`, `guard` or `other`."""
    detail: str


@dataclass(frozen=True)
class RunReport:
    """All that the page says of one run."""

    name: str
    directory: str
    command: str
    seed: int | None
    sentences: list[str]
    training: dict[str, Curve]
    evaluated: dict[str, Curve]
    evaluations: list[EvaluationPoint]
    best_step: int | None
    """Step of the best evaluation."""
    best_by: str
    """The metric that decides it: guard.monitor, else gold, else the proxy."""
    events: list[Event]
    event_counts: dict[str, int]
    settings: dict[str, str]
    environment: dict[str, str]
    rows: Rows


@dataclass(frozen=True)
class Arm:
    """Runs that differ only by their seed, with the mean and the band of every curve."""

    name: str
    runs: list[int]
    """Places in the list of runs."""
    training: dict[str, Curve]
    evaluated: dict[str, Curve]


@dataclass(frozen=True)
class Difference:
    setting: str
    values: list[str | None]
    """One a run; None where the run has no such setting."""


@dataclass(frozen=True)
class Report:
    version: str
    made: str
    """Date and time in UTC."""
    charts: list[Chart]
    runs: list[RunReport]
    arms: list[Arm]
    differences: list[Difference]
    notes: list[str]


def collect(directories: Sequence[Path]) -> Report:
    """The numbers of a report. Raises ConfigError, one line, for a directory that is no run's or cannot be read."""
    places = [place for directory in directories for place in _runs_in(directory)]
    names = [_name(directory) for directory, _ in places]
    if len(set(names)) < len(names):
        names = [str(directory) for directory, _ in places]
    runs = [_run(directory, stored, name, len(places)) for (directory, stored), name in zip(places, names, strict=True)]
    arms = _arms(runs)
    named = dict.fromkeys(name for run in runs for name in (*run.evaluated, *run.training) if not _repeats(name, runs))
    return Report(
        version=__version__,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        charts=report_curves.charts(list(named), _roles(runs)),
        runs=runs,
        arms=arms,
        differences=_differences(runs),
        notes=_notes(runs, arms),
    )


def _runs_in(directory: Path) -> list[tuple[Path, Path]]:
    """(directory, config.yaml) of the run, of all runs of a sweep, of all members of a reward stage."""
    if of_sweep := sorted(directory.glob("*/seed-*/config.yaml")):
        return [place for path in of_sweep for place in _runs_in(path.parent)]
    stored = loader.stored_config(directory, f"RUN_DIR={directory}")
    command = command_of(loader.read(stored))
    if command == "label":
        raise ConfigError(f"RUN_DIR={directory}: keel label trains nothing over steps; expected a run that trains")
    members = sorted((directory / "members").glob("*/metrics.jsonl")) if command == "reward" else []
    return [(path.parent, stored) for path in members] or [(directory, stored)]


def _name(directory: Path) -> str:
    path = directory.resolve()
    if (path.parents[1] / "configs" / f"{path.parent.name}-{path.name}.yaml").exists():  # of a sweep
        return f"{path.parent.name}-{path.name}"
    return f"{path.parents[1].name} member {path.name}" if path.parent.name == "members" else path.name


def _run(directory: Path, stored: Path, name: str, runs: int) -> RunReport:
    tree = loader.read(stored)
    try:
        return _read(directory, stored, tree, name, runs)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"RUN_DIR={directory}: {what}; expected the files of a run") from None


def _read(directory: Path, stored: Path, tree: dict[str, Any], name: str, runs: int) -> RunReport:
    lines, damaged = files.sound_lines(directory / "metrics.jsonl", {"step": int})
    raw_events, _ = files.sound_lines(directory / "events.jsonl", {"event": str})
    command = command_of(tree)
    points, values = report_curves.evaluated(directory)
    committed = checkpoint.steps(directory)
    curves = report_curves.of_evaluations(points) if points else report_curves.of_stage(directory)
    best_by = report_words.best_by(points, (tree.get("guard") or {}).get("monitor"))
    if command == "train":
        sentences = report_words.of_online(lines, points, values, committed, best_by, tree)
    else:
        sentences = report_words.of_stage(curves)
    best = report_words.peak(points, best_by)
    if damaged:
        sentences.append(f"{len(damaged)} lines of metrics.jsonl are damaged and left out.")
    events = _events(raw_events, lines)
    return RunReport(
        name=name,
        directory=str(directory),
        command=command,
        seed=tree["run"].get("seed"),
        sentences=[
            _place(directory, stored, command, lines),
            *sentences,
            *report_words.of_events(raw_events, _last(lines)),
        ],
        training=report_curves.of_training(lines),
        evaluated=curves,
        evaluations=points,
        best_step=None if best is None else points[best].step,
        best_by=best_by,
        events=events,
        event_counts=dict(Counter(str(event["event"]) for event in raw_events)),
        settings=_settings(tree),
        environment=_environment(directory, stored, tree, lines, raw_events),
        rows=choose(directory, runs),
    )


def _last(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return lines[-1] if lines else {}


def _place(directory: Path, stored: Path, command: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """The first sentence: what kind of run it is, and where it stands."""
    kind = "an online run" if command == "train" else f"a run of keel {command}"
    if stored.parent != directory:
        return f"This is member {directory.name} of {kind}; it recorded {_last(lines).get('step', 0)} steps."
    try:
        return f"This is {kind}; {status.sentence(status.of(directory))}."
    except ValueError as error:  # a damaged line
        return f"This is {kind}; where it stands cannot be read ({one_line(error)})."


def _events(raw: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> list[Event]:
    """Events that are more than routine, the newest where they are very many."""
    times = [line.get("time", 0.0) for line in lines]
    marked = [event for event in raw if event["event"] not in _QUIET]
    return [_event(event, times, lines) for event in marked[-_MOST_MARKS:]]


def _event(event: Mapping[str, Any], times: Sequence[float], lines: Sequence[Mapping[str, Any]]) -> Event:
    name, time = str(event["event"]), float(event.get("time") or 0.0)
    before = bisect_right(times, time)
    step = event.get("step", lines[before - 1]["step"] if before else 0)
    kind = "guard" if name in report_words.GUARD else "failure" if name in report_words.FAILURES else "other"
    fields = {key: value for key, value in event.items() if key not in ("event", "time", "step")}
    detail = ", ".join(f"{key} {one_line(value)}" for key, value in fields.items())
    return Event(name, int(step), time, kind, without_passwords(detail)[:1000])


def _settings(tree: Mapping[str, Any]) -> dict[str, str]:
    """Every setting as text; what may be a secret is left out."""
    return {key: _shown(key, value) for key, value in loader.leaves(tree).items()}


def _shown(key: str, value: Any) -> str:
    if loader.SECRET in key.split("."):
        return "(not shown)"
    return without_passwords(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _environment(
    directory: Path,
    stored: Path,
    tree: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """What the run directory says of where the run ran: version, digests, workers, models, times."""
    header = loader.first_line(stored).lstrip("# ")
    steps = [int(row["step"]) for row in evaluations.frontier(directory)]
    metadata = evaluations.load(directory, steps[-1]).schema.metadata or {} if steps else {}
    times = [event["time"] for event in events if event.get("time")] + [
        line["time"] for line in lines if "time" in line
    ]
    model = (tree.get("policy") or {}).get("model")
    workers = _last(lines).get("workers") or {}
    values = {
        "configuration": header,
        "model": None if model is None else without_passwords(str(model)),
        **{key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"keel.")},
        "workers": ", ".join(f"{count:.0f} {role}" for role, count in workers.items()),
        "first record": _date(min(times)) if times else None,
        "last record": _date(max(times)) if times else None,
    }
    return {name: value for name, value in values.items() if value}


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _arms(runs: Sequence[RunReport]) -> list[Arm]:
    """Runs grouped by all their settings but the seed, in the order of their first run.

    A second run of a seed with the same settings is a repetition, no other seed: it belongs to another arm.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    repeats: Counter[tuple[str, int | None, str]] = Counter()
    for place, run in enumerate(runs):
        told = {key: value for key, value in run.settings.items() if not key.startswith(_NOT_OF_AN_ARM)}
        settings = json.dumps([run.command, told], sort_keys=True)
        directory = Path(run.directory)
        member = directory.name if directory.parent.name == "members" else ""  # its own seed comes with its place
        seeded = (settings, run.seed, member)
        groups.setdefault((settings, repeats[seeded]), []).append(place)
        repeats[seeded] += 1
    return [_arm([runs[place] for place in places], places) for places in groups.values()]


def _arm(runs: Sequence[RunReport], places: list[int]) -> Arm:
    more = len(runs) - 1
    name = runs[0].name + (f" and {more} more seed{'s' if more > 1 else ''}" if more else "")
    return Arm(
        name,
        places,
        training=_bands([run.training for run in runs]),
        evaluated=_bands([run.evaluated for run in runs]),
    )


def _bands(curves: Sequence[Mapping[str, Curve]]) -> dict[str, Curve]:
    """Curves that all runs of an arm have. Intervals of one run stay; of several, bands take their place."""
    names = [name for name in curves[0] if all(name in of_run for of_run in curves)]
    return {name: report_curves.band([of_run[name] for of_run in curves]) for name in names}


def _differences(runs: Sequence[RunReport]) -> list[Difference]:
    """Settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(_NOT_A_DIFFERENCE))
    rows = [Difference(key, [run.settings.get(key) for run in runs]) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _roles(runs: Sequence[RunReport]) -> dict[str, str]:
    """Column of each reward -> its role, from the settings."""
    roles = {}
    for run in runs:
        for key, value in run.settings.items():
            block, _, field = key.rpartition(".")
            if block.startswith("rewards.") and field == "name":
                roles[f"reward_{value}"] = run.settings.get(f"{block}.role", "train")
    return roles


def _repeats(name: str, runs: Sequence[RunReport]) -> bool:
    """Whether a reward is the training reward itself in every run, as an only one of weight 1 is."""
    pairs = [(curves.get(name), curves.get("reward")) for run in runs for curves in (run.training, run.evaluated)]
    return name.startswith("reward_") and all(one == whole for one, whole in pairs if one)


def _notes(runs: Sequence[RunReport], arms: Sequence[Arm]) -> list[str]:
    """What the page leaves out, and what bands and intervals are."""
    notes = [
        "Intervals are 95 % over held-out prompts (Student's t, standard error of the prompts' means). They do not"
        " cover another seed of training.",
    ]
    if any(len(arm.runs) > 1 for arm in arms):
        notes.append("Bands reach from the lowest to the highest seed of an arm; the line is the mean over its seeds.")
    for run in runs:
        rows = run.rows
        embedded = Counter(row.source for row in rows.rows)
        notes.append(
            f"{run.name}: {rows.steps_read} of {rows.steps} rollout files and {rows.evaluations_read} of"
            f" {rows.evaluations} evaluations were read. Of their rows {embedded['training']} of {rows.training_rows}"
            f" training rows are in this page, the extremes of reward, proxy minus gold and KL among them, and"
            f" {embedded['evaluation']} of {rows.evaluation_rows} evaluation rows."
        )
    return notes
