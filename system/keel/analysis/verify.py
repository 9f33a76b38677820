"""Checks a run directory against what a run leaves behind, from its files alone and without loading torch.

    config.yaml      loads; the hash in its first line is that of its settings
    rollouts/        manifest, files, tickets, seeds, staleness                            (audit.py)
    buffer/          segments with the digest of their name                                (audit.py)
    checkpoints/     committed, digests, state in step with the ledger
    metrics.jsonl    steps once each in order; counters never fall and agree with the ledger
    evaluations/     readable; frontier.arrow says of each what its rows say
    events.jsonl, quarantine/    counted

What a kill may leave at any moment is in order; what of it is worth knowing is a note.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel import checkpoint, files, reads, schema
from keel.analysis.audit import UNREADABLE, Audit, Finding, Progress, audit_evaluations, audit_rollouts
from keel.config import loader
from keel.config.commands import command_of
from keel.config.run import Settings
from keel.errors import ConfigError
from keel.observability import metric_table

_COUNTERS = [metric.name for metric in metric_table.TABLE if metric.kind == "counter"]
_LABELED = {metric.name for metric in metric_table.TABLE if metric.labels}
_OPERATIONAL = {metric.name for metric in metric_table.TABLE if metric.operational}
_CLOCKS = ("time", "free_memory_bytes", "generate_tokens_per_second")  # and everything with "seconds" in its name
_ODD = (ValueError, KeyError, TypeError, AttributeError, checkpoint.CheckpointError)
"""Errors of checkpoint content that no run writes; a failed read raises ReadFailed."""
_PROVENANCE = ("generate_seconds", "score_seconds", "generator", "scorer")


@dataclass(frozen=True)
class Report:
    """The result of checking a run directory."""

    directory: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    """States that are in order and need a word: what a kill left, what a resumed run will do again."""
    counts: Mapping[str, int | Mapping[str, int]]


def check(run_directory: Path) -> Report:
    """Check every file of an online run against the others.

    Where something is found all is looked at once more, past the cache: that look counts. Raises ConfigError for a
    folder that is no online run, ReadFailed where a file cannot be read.
    """
    report = _check(run_directory)
    if report.findings:
        for path in reads.files(run_directory):
            reads.uncache(path)
        report = _check(run_directory)
    return report


def _check(run_directory: Path) -> Report:
    audit = Audit(run_directory)
    settings = _settings(audit)
    if settings:
        committed = checkpoint.steps(run_directory)  # the oldest claim first: the run may be alive
        lines = audit.lines("metrics.jsonl", {"step": int})
        progress = Progress(max(committed, default=0), lines[-1]["step"] if lines else 0)
        manifest = audit_rollouts(audit, settings, progress)
        _metrics(audit, lines, manifest, progress)
        _checkpoints(audit, committed, lines, manifest, settings)
        audit_evaluations(audit, settings, committed)
        events = audit.lines("events.jsonl", {"event": str})
        audit.counts["events"] = dict(Counter(event["event"] for event in events))
        quarantine = run_directory / "quarantine"
        audit.counts["quarantined_files"] = sum(path.is_file() for path in quarantine.rglob("*"))
    for path in sorted(run_directory.rglob(".*.tmp")):
        audit.notes.append(f"{path.relative_to(run_directory)}: an interrupted write, which is never read")
    return Report(str(run_directory), tuple(audit.findings), tuple(audit.notes), dict(audit.counts))


def _settings(audit: Audit) -> Settings | None:
    """Read the settings of the run; None, with a finding, where the file is damaged."""
    path = loader.stored_config(audit.directory, f"RUN_DIR={audit.directory}", kind="an online run")
    try:
        tree = loader.read(path)
        command = command_of(tree)
        online = command == "train" or (audit.directory / "rollouts").is_dir()
        settings = loader.parse(tree) if online else None
    except ConfigError as error:
        audit.fault("config.yaml", "the resolved settings of the run, without which nothing else is checked", error)
        return None
    if settings is None:
        raise ConfigError(f"RUN_DIR={audit.directory}: is of keel {command}; expected the directory of an online run")
    audit.test("config.yaml", "digest in the first line", loader.digest(settings), loader.stored_digest(path))
    return settings


def _metrics(
    audit: Audit, lines: Sequence[Mapping[str, Any]], manifest: Sequence[Mapping[str, Any]], progress: Progress
) -> None:
    file = "metrics.jsonl"
    steps = [line["step"] for line in lines]
    audit.test(file, "steps in order", list(range(1, len(steps) + 1)), steps)
    if progress.recorded < progress.committed:
        audit.fault(file, f"steps up to {progress.committed}, which has a checkpoint", progress.recorded)
    expected = _ledger_counters(audit, manifest)
    before: dict[str, float] = {}
    for line in lines:
        where, now = f"{file} step {line['step']}", _counters(line)
        if missing := [name for name in _COUNTERS if name not in line]:
            audit.fault(where, "every counter", f"no {', '.join(missing)}")
        if fallen := [name for name, value in before.items() if not now.get(name, -math.inf) >= value]:
            name = fallen[0]
            audit.fault(where, f"{name} at least {before[name]}, as the step before", now.get(name))
        audit.test(where, "steps_total", float(line["step"]), now.get("steps_total"))
        audit.test(where, "version", float(line["step"]), line.get("version"))
        for name, value in expected.get(line["step"], {}).items():
            if now.get(name, 0.0) != value:
                audit.fault(where, f"{name} {value}, by the manifest", now.get(name))
        before = now


def _counters(line: Mapping[str, Any]) -> dict[str, float]:
    """Counters of a line of metrics.jsonl, or of the totals of a checkpoint; labeled ones as name/label."""
    counters: dict[str, Any] = {}
    for name in _COUNTERS:
        value = line.get(name)
        if name in _LABELED and isinstance(value, dict):
            counters |= {f"{name}/{label}": number for label, number in value.items()}
        elif value is not None:
            counters[name] = value
    return {name: value if isinstance(value, int | float) else math.nan for name, value in counters.items()}


def _ledger_counters(audit: Audit, manifest: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Compute every step's counters from manifest and files. A group counts from the step behind its place."""
    faulty = {finding.file for finding in audit.findings}
    reasons = {reason for line in manifest for reason in line["dropped"]} | {"too_few_samples", "uniform_rewards"}
    totals: Counter[str] = Counter({f"groups_dropped_total/{reason}": 0 for reason in reasons})
    expected: dict[int, dict[str, float]] = {}
    for line in manifest:
        path = audit.directory / "rollouts" / line["file"]
        totals["samples_accepted_total"] += line["rows"]
        if path.is_file() and f"rollouts/{line['file']}" not in faulty:
            totals["rollout_bytes_total"] += path.stat().st_size
        else:
            faulty |= {f"rollouts/{later['file']}" for later in manifest}  # no later sum is known either
        for reason, tickets in line["dropped"].items():
            totals[f"groups_dropped_total/{reason}"] += len(tickets)
        known = [name for name in totals if name != "rollout_bytes_total" or f"rollouts/{line['file']}" not in faulty]
        expected[line["step"]] = {name: float(totals[name]) for name in known}
    return expected


def _checkpoints(
    audit: Audit,
    steps: Sequence[int],
    lines: Sequence[Mapping[str, Any]],
    manifest: Sequence[Mapping[str, Any]],
    settings: Settings,
) -> None:
    """Check that every committed checkpoint is whole, with the state that the manifest has for its step."""
    if missing := checkpoint.lost(audit.directory):
        audit.fault("checkpoints", f"the commit of step {missing[0]}, which {missing[1]} knows of", "none")
    last_of = {line["step"]: line["tickets"][-1] for line in manifest}
    recorded = {line["step"]: _counters(line) for line in lines}
    for step in steps:
        file = f"checkpoints/step-{step:06d}"
        path = audit.directory / file
        try:
            state = checkpoint.read_state(path)
            buffer, totals = state["buffer"], _counters(state["totals"])
            audit.test(f"{file}/state.json", "version", step, state["version"])
            audit.test(f"{file}/state.json", "digest of the settings", loader.digest(settings), state["digest"])
            place = {"version": step, "taken": step * settings.buffer.groups_per_step}
            place |= {"next_ticket": last_of[step] + 1} if step in last_of else {}
            audit.test(f"{file}/state.json", "buffer", place, {name: buffer[name] for name in place})
        except (FileNotFoundError, *_ODD) as error:
            if reads.is_there(path / "COMMIT"):  # a live run may have deleted it meanwhile
                audit.fault(file, "the files of its MANIFEST.json", f"{type(error).__name__}: {error}")
            continue
        for name, value in recorded.get(step, {}).items():
            if not totals.get(name, -math.inf) >= value:
                audit.fault(f"{file}/state.json", f"{name} at least {value}, as metrics.jsonl", totals.get(name))
        audit.counts["checkpoints"] += 1
    for path in reads.entries(audit.directory / "checkpoints"):
        if path.name.startswith("step-") and not reads.is_there(path / "COMMIT"):
            audit.notes.append(
                f"checkpoints/{path.name}: has no COMMIT, so it does not count; its deletion was interrupted"
            )


def compare(run_directory: Path, other: Path) -> list[Finding]:
    """List how a run differs from another; a run that was killed and resumed must not differ from a whole one.

    Compared are the policy weights of the newest checkpoint both have, bit for bit; every rollout column but who made
    it and how long it took; every metric but clocks, memory and the operational ones; frontier.arrow. Settings are not:
    paths may differ, and what else they change shows in the rest. Raises ConfigError where one of the two is no online
    run.
    """
    for directory in (run_directory, other):
        _settings(Audit(directory))
    audit = Audit(run_directory)
    _same_metrics(audit, other)
    _same_rows(audit, other)
    frontier, its = (_content(directory / "frontier.arrow") for directory in (run_directory, other))
    audit.test("frontier.arrow", "digest", files.digest_of(its), files.digest_of(frontier))
    _same_policy(audit, other)
    return audit.findings


def _content(path: Path) -> bytes:
    return reads.read(path) if reads.is_there(path) else b""


def _same_metrics(audit: Audit, other: Path) -> None:
    file = "metrics.jsonl"
    lines, expected = (files.sound_lines(directory / file, {"step": int})[0] for directory in (audit.directory, other))
    audit.test(file, "steps", len(expected), len(lines))
    for line, right in zip(lines, expected, strict=False):
        left_out = {*_CLOCKS, *_OPERATIONAL, *(name for name in {**line, **right} if "seconds" in name)}
        for name in sorted({*line, *right} - left_out):
            audit.test(f"{file} step {right['step']}", name, right.get(name), line.get(name))


def _same_rows(audit: Audit, other: Path) -> None:
    paths, expected = (
        [f"rollouts/{path.name}" for path in sorted((directory / "rollouts").glob("step-*.arrow"))]
        for directory in (audit.directory, other)
    )
    audit.test("rollouts", "steps", len(expected), len(paths))
    for file in (file for file in expected if file in paths):
        contents = [reads.read(directory / file) for directory in (audit.directory, other)]
        try:
            batch, right = (schema.from_bytes(content) for content in contents)
        except UNREADABLE as error:
            audit.fault(file, "an Arrow file in both runs", f"{type(error).__name__}: {error}")
            continue
        audit.test(file, "columns", right.schema.names, batch.schema.names)
        for name in (name for name in right.schema.names if name in batch.schema.names and name not in _PROVENANCE):
            values, wanted = batch.column(name).to_pylist(), right.column(name).to_pylist()
            places = [row for row, pair in enumerate(zip(values, wanted, strict=False)) if pair[0] != pair[1]]
            if places or len(values) != len(wanted):
                audit.fault(file, f"{name} of the other run", f"another in {len(places)} of {len(wanted)} rows")


def _same_policy(audit: Audit, other: Path) -> None:
    common = set(checkpoint.steps(audit.directory)) & set(checkpoint.steps(other))
    if not common:
        audit.fault("checkpoints", "one that both runs have", "none")
        return
    folder = f"checkpoints/step-{max(common):06d}/policy"
    digests, expected = (
        {path.name: files.digest(path) for path in sorted((directory / folder).glob("*.safetensors"))}
        for directory in (audit.directory, other)
    )
    for name in sorted({*digests, *expected}):
        audit.test(f"{folder}/{name}", "digest", expected.get(name), digests.get(name))
