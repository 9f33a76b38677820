"""Checks the manifest against rollout files and segments: nothing accepted is lost, nothing is trained twice.

Evaluations are checked too: every file is readable, and frontier.arrow says of each what its rows say.

A finding names a file, what its place in the run demands and what it holds instead. A state that `kill -9` may leave
at any moment is a note, not a finding. Steps after the newest committed checkpoint are done again by a resumed run,
which first cuts metrics.jsonl back, then moves rollout files aside, then cuts the manifest back.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, reads, schema
from keel.config.run import Settings
from keel.rollout import manifest, segments
from keel.rollout.prompts import seed_of

_COLUMNS = {*schema.PROMPT.names, *schema.GENERATE.names, *schema.SCORE.names}
UNREADABLE = (pa.ArrowException, OSError, ValueError, AssertionError)
"""Errors of content that is no Arrow file; a failed read of it raises ReadFailed."""
_RELATIVE_ERROR = 1e-6  # means of the frontier are summed in another order here
_NUMBERS = ("steps", "rows", "largest_staleness_versions", "tickets_trained")
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(_NUMBERS, 0),
    "tickets_dropped": {},
    **dict.fromkeys(("groups_waiting", "segments", "checkpoints", "evaluations"), 0),
    "events": {},
    "quarantined_files": 0,
}


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be."""

    file: str
    """Path in the run directory."""
    expected: str
    found: str


@dataclass
class Audit:
    """Findings, notes and counts of the check of one run directory."""

    directory: Path
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=lambda: dict(_NOTHING))
    """How many of what were checked: numbers, or mappings of numbers."""

    def fault(self, file: str, expected: object, content: object) -> None:
        self.findings.append(Finding(file, str(expected), str(content)))

    def test(self, file: str, what: str, expected: object, content: object) -> None:
        """Record a fault unless the two are equal."""
        if expected != content:
            self.fault(file, f"{what} {expected}", content)

    def lines(self, file: str, fields: Mapping[str, type]) -> list[dict[str, Any]]:
        """Read the whole lines of a JSON-lines file; damaged ones are faults, one cut off by a crash is a note."""
        path = self.directory / file
        lines, damaged = files.sound_lines(path, fields)
        for number in damaged:
            self.fault(file, f"line {number}: a JSON object with {', '.join(fields)}", "something else")
        if reads.is_there(path) and (content := reads.read(path)) and not content.endswith(b"\n"):
            self.notes.append(f"{file}: its last line was cut off, which the next start removes")
        return lines

    def arrow(self, file: str, content: bytes) -> pa.RecordBatch | None:
        """Read rows of a rollout or evaluation and check the contract of their columns; None after a fault."""
        try:
            batch = schema.from_bytes(content)
            batch.validate(full=True)
            if missing := _COLUMNS - set(batch.schema.names):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            schema.check(batch)
        except UNREADABLE as error:
            self.fault(file, "an Arrow file of rollout columns", f"{type(error).__name__}: {error}")
            return None
        return batch


@dataclass(frozen=True)
class Progress:
    """How far a run got, according to its files."""

    committed: int
    """Step of the newest committed checkpoint, 0 without one."""
    recorded: int
    """Last step of metrics.jsonl, 0 without one."""

    @property
    def cut_back(self) -> bool:
        """A resumed run may have begun to move aside what it did after its checkpoint."""
        return self.recorded == self.committed


def audit_rollouts(audit: Audit, settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """Check manifest, rollout files and segments; returns the sound lines of the manifest."""
    name = "rollouts/MANIFEST.jsonl"
    lines = audit.lines(name, manifest.FIELDS)
    steps = [line["step"] for line in lines]
    audit.test(name, "steps in order", list(range(1, len(steps) + 1)), steps)
    last = max(steps, default=0)
    if last < max(progress.recorded, progress.committed):
        audit.fault(name, f"steps up to {max(progress.recorded, progress.committed)}, which were trained", last)
    if last > progress.recorded + 1 and not progress.cut_back:
        audit.fault("metrics.jsonl", f"steps up to {last - 1}, whose rollouts are there", progress.recorded)
    sound = [line for line in lines if _numbered(audit, line)]
    _tickets(audit, sound, settings)
    for line in sound:
        _rollout(audit, line, settings, progress)
    _files_without_line(audit, set(steps), progress)
    _segments(audit, sound[-1]["tickets"][-1] if sound else -1)
    audit.counts["steps"] = len(lines)
    return sound


def _numbered(audit: Audit, line: manifest.Line) -> bool:
    """Whether a line's tickets are numbers, of which some were trained."""
    lists = [line["tickets"], *line["dropped"].values()]
    numbered = all(isinstance(tickets, list) and all(type(ticket) is int for ticket in tickets) for tickets in lists)
    if not numbered or not line["tickets"]:
        audit.fault(f"rollouts/MANIFEST.jsonl step {line['step']}", "lists of tickets, some trained", lists)
    return numbered and bool(line["tickets"])


def _tickets(audit: Audit, lines: Sequence[manifest.Line], settings: Settings) -> None:
    """Check that trained and dropped tickets are 0, 1, 2, ..., each once, in the first step that may name it."""
    following = 0  # the first ticket behind the last trained one
    dropped: Counter[str] = Counter()
    for line in lines:
        file = f"rollouts/MANIFEST.jsonl step {line['step']}"
        trained = line["tickets"]
        gone = [ticket for tickets in line["dropped"].values() for ticket in tickets]
        audit.test(file, "groups of a step:", settings.buffer.groups_per_step, len(trained))
        audit.test(file, "tickets in ascending order", sorted(trained), trained)
        if "" in line["dropped"]:
            audit.fault(file, "a reason for every dropped ticket", f"none for {line['dropped']['']}")
        times = Counter([*trained, *gone])
        if twice := sorted(ticket for ticket, count in times.items() if count > 1 or ticket < following):
            audit.fault(file, "every ticket once", f"again {twice}")
        if lost := sorted(set(range(following, trained[-1])) - set(times)):
            audit.fault(file, f"tickets {following} to {trained[-1]} trained or dropped", f"nothing of {lost}")
        if early := sorted(ticket for ticket in gone if ticket > trained[-1]):
            audit.fault(file, f"dropped tickets below {trained[-1]}", early)
        following = max(following, trained[-1] + 1)
        dropped.update({reason: len(tickets) for reason, tickets in line["dropped"].items()})
        audit.counts["tickets_trained"] += len(trained)
    audit.counts["tickets_dropped"] = dict(dropped)


def _rollout(audit: Audit, line: manifest.Line, settings: Settings, progress: Progress) -> None:
    """Check that a step's file is the one its line describes, made by the right seeds and not too late."""
    step = line["step"]
    file = f"rollouts/step-{step:06d}.arrow"
    audit.test("rollouts/MANIFEST.jsonl", f"file of step {step}:", f"step-{step:06d}.arrow", line["file"])
    path = audit.directory / file
    if not path.is_file():
        if step > progress.committed and progress.cut_back:
            audit.notes.append(f"{file}: moved aside by a resumed run, which trains this step again")
        else:
            audit.fault(file, "the rows this step trained on", "no file")
        return
    right = line["xxh3_128"]
    content = reads.confirmed(path, lambda: reads.read(path), lambda read: files.digest_of(read) == right)
    if files.digest_of(content) != right:
        audit.fault(file, f"digest {line['xxh3_128']}", files.digest_of(content))
        return
    batch = audit.arrow(file, content)
    if batch is None:
        return
    audit.counts["rows"] += batch.num_rows
    audit.test(file, "rows", line["rows"], batch.num_rows)
    tickets, samples = batch.column("ticket").to_pylist(), batch.column("sample").to_pylist()
    audit.test(file, "tickets in the manifest's order:", line["tickets"], list(dict.fromkeys(tickets)))
    rows = list(zip(tickets, samples, strict=True))
    if again := [row for row, count in Counter(rows).items() if count > 1]:
        audit.fault(file, "every (ticket, sample) once", f"{again[0]} more than once")
    if wrong := [s for s in samples if not 0 <= s < settings.sampling.samples_per_prompt]:
        audit.fault(file, f"samples 0 to {settings.sampling.samples_per_prompt - 1}", wrong[0])
    if few := [t for t, count in Counter(tickets).items() if count < settings.objective.min_samples]:
        audit.fault(file, f"at least {settings.objective.min_samples} rows a ticket", f"fewer of {few}")
    audit.test(file, "rows without a reward:", 0, batch.column("reward").null_count)
    seeds = [seed_of("train", settings.run.seed, *row) for row in rows]
    if wrong := [r for r, a, b in zip(rows, seeds, batch.column("seed").to_pylist(), strict=True) if a != b]:
        audit.fault(file, f"the seed of run.seed={settings.run.seed}, ticket and sample", f"another at {wrong[0]}")
    _staleness(audit, file, batch, step, settings.buffer.max_staleness)


def _staleness(audit: Audit, file: str, batch: pa.RecordBatch, step: int, most: int) -> None:
    """Check the staleness, also of stored completions: their version is that of the generator that read them."""
    versions, _ = schema.ragged(batch, "weight_versions")
    late = step - 1 - versions
    if late.min() < 0 or late.max() > most:
        audit.fault(file, f"tokens 0 to {most} versions late", f"{late.min()} to {late.max()}")
    audit.counts["largest_staleness_versions"] = max(audit.counts["largest_staleness_versions"], int(np.max(late)))


def _files_without_line(audit: Audit, known: set[int], progress: Progress) -> None:
    """Check files of steps without a line: only the last step's may be one, killed between file and line."""
    following = max(known, default=0) + 1
    for path in _named(audit.directory / "rollouts", "step-*.arrow"):
        file = f"rollouts/{path.name}"
        number = path.stem.removeprefix("step-")
        step = int(number) if number.isdecimal() else -1
        if step == following and step > progress.committed:
            audit.notes.append(f"{file}: was written, its line was not; the step is trained again")
        elif step not in known:
            audit.fault("rollouts/MANIFEST.jsonl", f"a line for {file}", "none")


def _named(folder: Path, pattern: str) -> list[Path]:
    return [path for path in reads.entries(folder) if path.match(pattern)]


def _segments(audit: Audit, last_trained: int) -> None:
    """Check that accepted batches in buffer/ are intact, and count their groups that are still to be trained."""
    waiting = set()
    for path in _named(audit.directory / "buffer", "*.arrow"):
        try:
            segment = segments.read(path)
        except FileNotFoundError:
            continue  # a live run deletes those no checkpoint needs
        except segments.SegmentError as error:
            audit.fault(f"buffer/{path.name}", "an accepted batch with the digest of its name", error)
            continue
        audit.counts["segments"] += 1
        waiting |= {t for t in segment.tickets if t > last_trained and t not in segment.dropped}
    audit.counts["groups_waiting"] = len(waiting)


def audit_evaluations(audit: Audit, settings: Settings, committed: Sequence[int]) -> None:
    """Check that frontier.arrow has the due evaluations in order, with the numbers of their files.

    `committed`: steps of checkpoints. What was evaluated behind the newest is evaluated again by a resumed run, which
    writes the file first and then the row.
    """
    sure = max(committed, default=-1)
    rows: list[dict[str, Any]] = []
    path = audit.directory / "frontier.arrow"
    content = _content(path) if reads.is_there(path) else None
    try:
        rows = schema.from_bytes(content).to_pylist() if content is not None else []
        steps = [int(row["step"]) for row in rows]
    except (*UNREADABLE, KeyError, TypeError) as error:
        audit.fault("frontier.arrow", "an Arrow file with one row an evaluation", f"{type(error).__name__}: {error}")
        steps = []
    else:
        every = settings.evaluation.every_steps
        due = {0, *range(every, sure + 1, every)} if every else {0}
        if missing := sorted(due - set(steps)) if sure >= 0 else []:
            audit.fault("frontier.arrow", f"rows of steps {sorted(due)}", f"none of {missing}")
    audit.test("frontier.arrow", "steps in order, each once", sorted(set(steps)), steps)
    files = {path.stem: path for path in reads.entries(audit.directory / "evaluations") if path.match("step-*.arrow")}
    for row, step in zip(rows, steps, strict=False):
        name = f"step-{step:06d}"
        if name in files:
            _evaluation(audit, files.pop(name), row, step > sure)
        else:
            audit.fault(f"evaluations/{name}.arrow", "the evaluation that frontier.arrow tells of", "no file")
    for name, path in files.items():
        _evaluation(audit, path, {}, again=True)
        if steps and name < f"step-{steps[-1]:06d}":
            audit.fault("frontier.arrow", f"a row for evaluations/{name}.arrow", "none")


def _content(path: Path) -> bytes:
    """Bytes of an Arrow file; where they are none they were read twice. Raises ReadFailed."""
    return reads.confirmed(path, lambda: reads.read(path), _is_arrow)


def _is_arrow(content: bytes) -> bool:
    try:
        schema.from_bytes(content).validate(full=True)
    except UNREADABLE:
        return False
    return True


def _evaluation(audit: Audit, path: Path, row: Mapping[str, Any], again: bool) -> None:
    """Compare one evaluation with its row of the frontier; `again`: a resumed run may have written it again."""
    file = f"evaluations/{path.name}"
    batch = audit.arrow(file, _content(path))
    if batch is None:
        return
    audit.counts["evaluations"] += 1
    for name, value in _means(batch).items() if row and not again else []:
        stored = math.nan if row.get(name) is None else row[name]
        if not np.isclose(value, stored, rtol=_RELATIVE_ERROR, atol=1e-9, equal_nan=True):
            audit.fault("frontier.arrow", f"step {row['step']:.0f}: {name} {value:.6g}, by {file}", stored)


def _means(batch: pa.RecordBatch) -> dict[str, float]:
    """Columns of a frontier row from the rows of its evaluation."""
    lengths = schema.completion_lengths(batch)
    surprise = -schema.row_sums(schema.ragged(batch, "completion_logprobs")[0], lengths)
    names = [name for name in batch.schema.names if name.startswith("reward")]
    columns = {name: batch.column(name).to_numpy(zero_copy_only=False).astype(float) for name in names}
    columns["proxy"] = columns.pop("reward")
    values = columns | {"length_tokens": lengths.astype(float), "entropy_nats": surprise / lengths}
    if "reference_logprobs" in batch.schema.names:
        values["kl_nats"] = -surprise - schema.row_sums(schema.ragged(batch, "reference_logprobs")[0], lengths)
    means = {name: float(np.nanmean(value)) if np.isfinite(value).any() else math.nan for name, value in values.items()}
    return means | {"n": float(np.isfinite(columns["proxy"]).sum())}
