"""The rollout buffer: bounded staleness, admission order, groups whole, rows on disk before they count.

    admit -> tickets -> (generate, score) -> add | drop -> take -> advance
      ^                                                       |
      +---------- opens groups_per_step tickets --------------+

A group is admitted only while

    taken + live < (version + 1 + max_staleness) * groups_per_step

(live: admitted, neither taken nor dropped) and groups are taken in admission order. A group admitted at version v is
then at most the (v + 1 + max_staleness) * groups_per_step-th one taken, so it is trained by the step that starts
from version v + max_staleness at the latest: no row is ever trained more than max_staleness versions late.

Tickets that share a generator batch are decided here: an opening of groups_per_step slots is split into batches of
groups_per_batch, and slots freed by drops are refilled once nothing is in flight. So at max_staleness 0 the
composition of every batch is a function of tickets and drops, never of timing.

Dynamic sampling (DAPO, 2503.14476): a group whose rewards are all equal teaches a group baseline nothing and is
dropped, too, while the step's slots were opened again less than `refills` times (by any drop); after that such groups
are kept, so a step always fills up.
"""

import asyncio
import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import durable, schema
from keel.protocols import AddReceipt

_TICKETS, _COUNTS = b"keel.tickets", b"keel.counts"


class RolloutBuffer:
    """Groups of scored rows between the generators and the learner.

    `directory` is the run directory: accepted batches go to `buffer/`, step batches to `rollouts/`. Starting on a
    directory that already holds accepted batches absorbs them instead of asking for the same tickets again.
    Raises ValueError for a batch that breaks the column contract or for tickets that were not admitted.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        groups_per_step: int,
        groups_per_batch: int,
        max_staleness: int,
        min_samples: int = 2,
        refills: int = 0,
        version: int = 0,
        taken: int = 0,
        next_ticket: int = 0,
    ) -> None:
        self.directory = Path(directory)
        self.groups_per_step = groups_per_step
        self.groups_per_batch = groups_per_batch
        self.max_staleness = max_staleness
        self.min_samples = min_samples  # with fewer scored ones a group is dropped: its objective compares them
        self.refills = refills
        self._refilled = 0  # times slots of dropped groups were opened again since the last advance
        self.version = version
        self.taken = taken
        self.next_ticket = next_ticket
        self._after_taken = next_ticket  # the first ticket behind the last one taken
        self._live: deque[int] = deque()  # admitted, in order, neither taken nor dropped
        self._in_flight: set[int] = set()
        self._ready: dict[int, pa.RecordBatch] = {}
        self._added_at: dict[int, float] = {}
        self._openings: deque[int] = deque()  # sizes of generator batches that may be admitted
        self._freed = 0  # slots of dropped groups, not yet opened again
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)  # of the batches behind the next step
        self._changed = asyncio.Condition()
        self._stored: dict[int, pa.RecordBatch | None] = {}  # by ticket, from disk; None: its samples failed
        self._stored_counts: dict[int, dict[str, dict[str, int]]] = {}  # by first ticket of a stored batch
        self._restore()
        self._open(self._bound() - taken)

    def _bound(self) -> int:
        return (self.version + 1 + self.max_staleness) * self.groups_per_step

    def _open(self, slots: int) -> None:
        whole, rest = divmod(slots, self.groups_per_batch)
        self._openings.extend([self.groups_per_batch] * whole + [rest] * bool(rest))

    async def admit(self) -> list[int]:
        """The next tickets that share a generator batch. Batches already on disk are absorbed on the way."""
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._openings)
                size = self._openings.popleft()
                tickets = list(range(self.next_ticket, self.next_ticket + size))
                self.next_ticket += size
                self._live.extend(tickets)
                self._in_flight.update(tickets)
                assert self.taken + len(self._live) <= self._bound()
                if missing := self._absorb(tickets):
                    return missing

    async def add(self, tickets: list[int], batch: pa.RecordBatch) -> AddReceipt:
        """Accept the rows of admitted tickets that were scored; what is kept is on disk when this returns."""
        schema.check(batch)
        rows_of = batch.column("ticket").to_numpy()
        if not set(tickets) <= self._in_flight or not set(rows_of.tolist()) <= set(tickets):
            raise ValueError(f"tickets {tickets}: not in flight, or rows of other tickets in the batch")
        failures = Counter(reason for reason in batch.column("failure").to_pylist() if reason)
        scored = batch.column("reward").is_valid().to_numpy(zero_copy_only=False)
        samples = Counter(rows_of[scored].tolist())
        kept = {ticket for ticket in tickets if samples[ticket] >= self.min_samples}
        uniform = self._uniform(batch, rows_of, scored, kept)
        kept -= uniform
        rows = schema.select(batch, scored & np.isin(rows_of, list(kept)))
        owned = schema.concat([rows])
        too_few = len(tickets) - len(kept) - len(uniform)
        dropped = {"too_few_samples": too_few} if too_few else {}
        dropped |= {"uniform_rewards": len(uniform)} if uniform else {}
        counts = {
            "samples_accepted_total": {"": owned.num_rows},
            "completion_tokens_total": {"": int(schema.lengths(batch, "completion_tokens").sum())},
            "samples_failed_total": {**failures, **_failed_monitors(batch)},
            "groups_dropped_total": dropped,
        }
        num_bytes = self._write_segment(tickets, owned, counts) if kept else 0
        async with self._changed:
            self._count(counts)
            self._accept(tickets, owned)
            self._changed.notify_all()
        return AddReceipt(len(kept), owned.num_rows, failures, dropped, num_bytes)

    async def drop(self, tickets: list[int], reason: str) -> None:
        """Give up admitted tickets; their slots open again. The reason is the caller's to count."""
        assert set(tickets) <= self._in_flight, (tickets, reason)
        async with self._changed:
            self._settle(tickets, kept=set())
            self._changed.notify_all()

    async def take(self, groups: int) -> tuple[pa.RecordBatch, Mapping[str, Any]]:
        """The next groups in admission order as one contiguous batch, stored as the step's rollout file.

        With it gauges of the buffer, and under `counts` what the batches accepted since the last step consisted of,
        also those found on disk: counters of a resumed run go on as if nothing had happened.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._head_is_ready(groups))
            tickets = [self._live.popleft() for _ in range(groups)]
            self.taken += groups
            self._after_taken = tickets[-1] + 1
            batch = schema.concat([self._ready.pop(ticket) for ticket in tickets])
            counts, self._counts = self._counts, defaultdict(Counter)
        versions, _ = schema.ragged(batch, "weight_versions")
        staleness = self.version - versions
        assert staleness.max() <= self.max_staleness, (staleness.max(), self.max_staleness)
        num_bytes = self._write_step(self.version + 1, batch)
        now = time.monotonic()
        return batch, {
            "buffer_age_seconds": now - min(self._added_at.pop(ticket) for ticket in tickets),
            "buffer_groups": float(len(self._ready)),
            "buffer_bytes": float(sum(rows.nbytes for rows in self._ready.values())),
            "rollout_bytes": float(num_bytes),
            "staleness_mean_versions": float(staleness.mean()),
            "staleness_max_versions": float(staleness.max()),
            "counts": {name: dict(values) for name, values in counts.items()},
        }

    async def advance(self, version: int) -> None:
        """All generators hold this version now: a step's worth of tickets opens."""
        assert version == self.version + 1, (version, self.version)
        async with self._changed:
            self.version = version
            self._refilled = 0
            self._open(self.groups_per_step)
            self._changed.notify_all()

    async def state(self) -> dict[str, int]:
        """What a checkpoint must hold to start again here: everything behind the last ticket taken is asked for again.

        Also what was dropped since: it is dropped again, so batches, refills and counts come out as they were.
        """
        return {"version": self.version, "taken": self.taken, "next_ticket": self._after_taken}

    async def forget(self, before_ticket: int) -> None:
        """Delete stored batches that no committed checkpoint can ask for."""
        for path in self._segments():
            if int(path.name.split(".")[1].split("-")[1]) < before_ticket:
                path.unlink()

    def _head_is_ready(self, groups: int) -> bool:
        return len(self._live) >= groups and all(self._live[i] in self._ready for i in range(groups))

    def _accept(self, tickets: list[int], rows: pa.RecordBatch) -> None:
        rows_of = rows.column("ticket").to_numpy()
        kept = set(rows_of.tolist())
        for ticket in kept:
            self._ready[ticket] = schema.select(rows, rows_of == ticket)
            self._added_at[ticket] = time.monotonic()
        self._settle(tickets, kept)

    def _settle(self, tickets: list[int], kept: set[int]) -> None:
        gone = set(tickets) - kept
        self._in_flight.difference_update(tickets)
        self._live = deque(ticket for ticket in self._live if ticket not in gone)
        self._freed += len(gone)
        if not self._in_flight and not self._openings and self._freed:
            self._open(self._freed)
            self._freed = 0
            self._refilled += 1

    def _uniform(self, batch: pa.RecordBatch, rows_of: np.ndarray, scored: np.ndarray, kept: set[int]) -> set[int]:
        """Tickets of kept groups whose rewards are all equal, while the step may still ask for others."""
        if self._refilled >= self.refills:
            return set()
        rewards = batch.column("reward").to_numpy(zero_copy_only=False)
        return {ticket for ticket in kept if np.ptp(rewards[(rows_of == ticket) & scored]) == 0}

    def _absorb(self, tickets: list[int]) -> list[int]:
        """Take what is already on disk for these tickets; the tickets still to be generated."""
        found = [ticket for ticket in tickets if ticket in self._stored and self._in_time(ticket)]
        for ticket in found:
            self._count(self._stored_counts.pop(ticket, {}))
        groups = [rows for rows in (self._stored.pop(ticket) for ticket in found) if rows is not None]
        if groups:
            self._accept(found, schema.concat(groups))
        elif found:
            self._settle(found, kept=set())
        if found:
            self._changed.notify_all()
        return [ticket for ticket in tickets if ticket not in found]

    def _in_time(self, ticket: int) -> bool:
        """A stored group may be trained at its ticket's place of now: drops are not on disk, so it may have moved."""
        group = self._stored[ticket]
        if group is None:
            return True
        trained_from = (self.taken + self._live.index(ticket)) // self.groups_per_step
        versions, _ = schema.ragged(group, "weight_versions")
        return bool(trained_from - self.max_staleness <= versions.min() and versions.max() <= trained_from)

    def _count(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        for name, values in counts.items():
            self._counts[name].update(values)

    def _write_segment(self, tickets: list[int], rows: pa.RecordBatch, counts: Mapping[str, Any]) -> int:
        """One file per accepted batch, named after its tickets and its digest (Arrow files have no checksum)."""
        own = {_TICKETS: json.dumps(tickets), _COUNTS: json.dumps(counts)}
        content = schema.to_bytes(rows.replace_schema_metadata({**(rows.schema.metadata or {}), **own}))
        name = f"segment.{tickets[0]:012d}-{tickets[-1]:012d}.{schema.digest(content)}.arrow"
        durable.write(self.directory / "buffer" / name, content)
        return content.size

    def _write_step(self, step: int, batch: pa.RecordBatch) -> int:
        content = schema.to_bytes(batch)
        path = self.directory / "rollouts" / f"step-{step:06d}.arrow"
        durable.write(path, content)
        line = {"step": step, "file": path.name, "rows": batch.num_rows, "xxh3_128": schema.digest(content)}
        durable.append_json(path.parent / "MANIFEST.jsonl", line)
        return content.size

    def _segments(self) -> list[Path]:
        return sorted((self.directory / "buffer").glob("segment.*.arrow"))

    def _restore(self) -> None:
        """Read accepted batches back; a file that does not match its digest is deleted."""
        durable.keep_steps(self.directory / "rollouts" / "MANIFEST.jsonl", self.version)
        for path in self._segments():
            content = path.read_bytes()
            if schema.digest(content) != path.name.split(".")[2]:
                path.unlink()  # its tickets are generated again
                continue
            rows = schema.from_bytes(content)
            metadata = dict(rows.schema.metadata)
            tickets = json.loads(metadata.pop(_TICKETS))
            self._stored_counts[tickets[0]] = json.loads(metadata.pop(_COUNTS))
            rows = rows.replace_schema_metadata(metadata)
            rows_of = rows.column("ticket").to_numpy()
            for ticket in (ticket for ticket in tickets if ticket >= self.next_ticket):
                group = schema.select(rows, rows_of == ticket)
                self._stored[ticket] = group if group.num_rows else None


def _failed_monitors(batch: pa.RecordBatch) -> dict[str, int]:
    """Nulls of each reward in rows that have their training reward."""
    scored = batch.filter(batch.column("failure").is_null())
    nulls = {name: scored.column(name).null_count for name in batch.schema.names if name.startswith("reward_")}
    return {f"{name.removeprefix('reward_')}_monitor": count for name, count in nulls.items() if count}
