"""Accepted batches on disk: one Arrow file each, named after its tickets and its digest (Arrow has no checksum).

RUN_DIR/buffer/segment.000000000004-000000000007.<xxh3-128>.arrow

Beside the rows it holds the reasons of dropped tickets, what each ticket adds to the counters, and how often the run
had rolled back: a buffer that is being killed may still write one, after the rows of its weights were moved aside.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, reads, schema
from keel.errors import KeelError

Counts = Mapping[str, Mapping[str, int]]
"""Increments of counters by metric name and label ("": none)."""
_TICKETS, _COUNTS, _DROPPED, _ROLL_BACKS = b"keel.tickets", b"keel.counts", b"keel.dropped", b"keel.roll_backs"
_NAME = re.compile(r"segment\.(\d+)-(\d+)\.([0-9a-f]{32})\.arrow")


class SegmentError(KeelError, ValueError):
    """A segment file is corrupt."""


@dataclass(frozen=True)
class StoredGroup:
    """One ticket of a segment."""

    rows: pa.RecordBatch | None
    """Its scored rows; None: it was dropped."""
    reason: str
    """Why it was dropped; empty when it was not."""
    versions: tuple[int, int]
    """Oldest and newest weight version of the batch it came with."""
    counts: Counts


@dataclass(frozen=True)
class Segment:
    """One accepted generator batch."""

    tickets: list[int]
    rows: pa.RecordBatch
    """Of all tickets but the dropped ones."""
    counts: Mapping[int, Counts]
    dropped: Mapping[int, str]
    """Ticket -> reason."""
    roll_backs: int = 0
    """Roll backs of the run before it was accepted."""

    def groups(self) -> Iterator[tuple[int, StoredGroup]]:
        """Every ticket with what became of it."""
        rows_of = self.rows.column("ticket").to_numpy()
        versions, _ = schema.ragged(self.rows, "weight_versions")
        span = int(versions.min()), int(versions.max())
        for ticket in self.tickets:
            rows = None if ticket in self.dropped else schema.select(self.rows, rows_of == ticket)
            yield ticket, StoredGroup(rows, self.dropped.get(ticket, ""), span, self.counts[ticket])


def write(run_directory: Path, segment: Segment) -> int:
    """Put a segment on disk; its bytes."""
    fields: dict[bytes, Any] = {
        _TICKETS: segment.tickets,
        _COUNTS: segment.counts,
        _DROPPED: segment.dropped,
        _ROLL_BACKS: segment.roll_backs,
    }
    metadata = {**(segment.rows.schema.metadata or {}), **{key: json.dumps(value) for key, value in fields.items()}}
    content = schema.to_bytes(segment.rows.replace_schema_metadata(metadata))
    first, last = segment.tickets[0], segment.tickets[-1]
    name = f"segment.{first:012d}-{last:012d}.{files.digest_of(content)}.arrow"
    files.write(run_directory / "buffer" / name, content)
    return content.size


def read(path: Path) -> Segment:
    """Read a segment. Raises SegmentError that says what is wrong with the file, ReadFailed where that is unknown."""
    name = _NAME.fullmatch(path.name)
    right = name[3] if name else None
    content = reads.confirmed(path, lambda: reads.read(path), lambda read: right in (None, files.digest_of(read)))
    if not name:
        raise SegmentError(f"named {path.name}; expected segment.FIRST-LAST.DIGEST.arrow")
    if files.digest_of(content) != name[3]:
        raise SegmentError(f"digest {files.digest_of(content)}; expected the one in its name")
    try:
        rows = schema.from_bytes(content)
        metadata = dict(rows.schema.metadata)
        tickets = [int(ticket) for ticket in json.loads(metadata.pop(_TICKETS))]
        counts, dropped = ({int(k): v for k, v in json.loads(metadata.pop(key)).items()} for key in (_COUNTS, _DROPPED))
        roll_backs = int(json.loads(metadata.pop(_ROLL_BACKS, b"0")))
        schema.check(rows)
        segment = Segment(tickets, rows.replace_schema_metadata(metadata), counts, dropped, roll_backs)
        held = set(np.unique(rows.column("ticket").to_numpy()).tolist())
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SegmentError(f"not a segment: {type(error).__name__}: {error}") from None
    if not held or held != set(tickets) - set(dropped) or set(counts) != set(tickets):
        raise SegmentError(f"rows of tickets {sorted(held)}; expected those of {tickets} without {sorted(dropped)}")
    return segment


def paths(run_directory: Path) -> list[Path]:
    return [path for path in reads.entries(run_directory / "buffer") if path.match("segment.*.arrow")]


def forget(run_directory: Path, before_ticket: int) -> None:
    """Delete segments of which every ticket lies before this one, damaged ones that were put aside, too."""
    aside = reads.entries(run_directory / files.ASIDE / "buffer")
    for path in [*paths(run_directory), *aside]:
        name = _NAME.fullmatch(path.name)
        if name and int(name[2]) < before_ticket:
            path.unlink()
