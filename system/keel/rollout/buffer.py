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
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, schema
from keel.algorithms.advantages import vary
from keel.protocols import AddReceipt
from keel.rollout import manifest, segments


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
        self._in_flight: dict[int, float] = {}  # ticket -> monotonic seconds of its admission
        self._ready: dict[int, pa.RecordBatch] = {}
        self._added_at: dict[int, float] = {}
        self._openings: deque[int] = deque()  # sizes of generator batches that may be admitted
        self._freed = 0  # slots of dropped groups, not yet opened again
        self._gave_up: dict[int, str] = {}  # dropped ticket -> reason, until a step has passed it
        self._counts: dict[int, segments.Counts] = {}  # by ticket, until a step has passed it
        self._changed = asyncio.Condition()
        self._stored: dict[int, list[segments.StoredGroup]] = defaultdict(list)  # by ticket, from disk
        self._damaged = self._restore()
        self._deliverable = sum(any(group.rows is not None for group in groups) for groups in self._stored.values())
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
                self._in_flight |= dict.fromkeys(tickets, time.monotonic())
                assert self.taken + len(self._live) <= self._bound()
                if missing := self._absorb(tickets):
                    return missing

    async def add(self, tickets: list[int], batch: pa.RecordBatch) -> AddReceipt:
        """Accept the rows of admitted tickets that were scored; what is kept is on disk when this returns."""
        schema.check(batch)
        rows_of = batch.column("ticket").to_numpy()
        if not set(tickets) <= set(self._in_flight) or not set(rows_of.tolist()) <= set(tickets):
            raise ValueError(f"tickets {tickets}: not in flight, or rows of other tickets in the batch")
        scored = batch.column("reward").is_valid().to_numpy(zero_copy_only=False)
        dropped = {ticket: why for ticket in tickets if (why := self._refusal(batch, scored & (rows_of == ticket)))}
        counts = {t: _counts(schema.select(batch, rows_of == t), dropped.get(t)) for t in tickets}
        rows = schema.concat([schema.select(batch, scored & ~np.isin(rows_of, list(dropped)))])
        kept = [ticket for ticket in tickets if ticket not in dropped]
        segment = segments.Segment(tickets, rows, counts, dropped)
        num_bytes = segments.write(self.directory, segment) if kept else 0
        groups = {ticket: schema.select(rows, rows.column("ticket").to_numpy() == ticket) for ticket in kept}
        async with self._changed:
            self._counts |= counts
            self._settle(groups, dropped)
            self._changed.notify_all()
        failures = Counter(reason for reason in batch.column("failure").to_pylist() if reason)
        return AddReceipt(len(kept), rows.num_rows, failures, Counter(dropped.values()), num_bytes)

    async def drop(self, tickets: list[int], reason: str) -> None:
        """Give up admitted tickets; their slots open again."""
        assert set(tickets) <= set(self._in_flight), (tickets, reason)
        async with self._changed:
            self._counts |= {ticket: {"groups_dropped_total": {reason: 1}} for ticket in tickets}
            self._settle({}, dict.fromkeys(tickets, reason))
            self._changed.notify_all()

    async def take(self, groups: int) -> tuple[pa.RecordBatch, Mapping[str, Any]]:
        """The next groups in admission order as one contiguous batch, stored as the step's rollout file.

        With it gauges of the buffer, and under `counts` what became of the tickets since the last step's up to this
        step's last one: counters are a function of the ledger, so those of a resumed run go on as if nothing had
        happened.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._head_is_ready(groups))
            tickets = [self._live.popleft() for _ in range(groups)]
            self.taken += groups
            passed = range(self._after_taken, tickets[-1] + 1)
            self._after_taken = passed.stop
            batch = schema.concat([self._ready.pop(ticket) for ticket in tickets])
            dropped = {ticket: self._gave_up.pop(ticket) for ticket in passed if ticket not in set(tickets)}
            counts = _sum([self._counts.pop(ticket, {}) for ticket in passed])
        versions, _ = schema.ragged(batch, "weight_versions")
        staleness = self.version - versions
        assert staleness.max() <= self.max_staleness, (staleness.max(), self.max_staleness)
        num_bytes = manifest.write_step(self.directory, self.version + 1, batch, dropped)
        now = time.monotonic()
        return batch, {
            "buffer_age_seconds": now - min(self._added_at.pop(ticket) for ticket in tickets),
            "buffer_groups": float(len(self._ready)),
            "buffer_bytes": float(sum(rows.nbytes for rows in self._ready.values())),
            "rollout_bytes": float(num_bytes),
            "staleness_mean_versions": float(staleness.mean()),
            "staleness_max_versions": float(staleness.max()),
            "counts": counts,
        }

    async def advance(self, version: int) -> None:
        """All generators hold this version now: a step's worth of tickets opens."""
        assert version == self.version + 1, (version, self.version)
        async with self._changed:
            self.version = version
            self._refilled = 0
            self._open(self.groups_per_step)
            self._changed.notify_all()

    async def resize(self, groups_per_batch: int) -> None:
        """The number of generators changed: tickets that open from now on share batches of this size."""
        assert 1 <= groups_per_batch <= (1 + self.max_staleness) * self.groups_per_step, groups_per_batch
        self.groups_per_batch = groups_per_batch

    async def state(self) -> dict[str, int]:
        """What a checkpoint must hold to start again here: everything behind the last ticket taken is asked for again.

        Also what was dropped since: it is dropped again, so batches, refills and counts come out as they were.
        """
        return {"version": self.version, "taken": self.taken, "next_ticket": self._after_taken}

    async def found(self) -> dict[str, Any]:
        """What the start found on disk: `groups` it can deliver again, and what was `damaged`, by name."""
        return {"groups": self._deliverable, "damaged": self._damaged}

    async def waiting(self) -> str:
        """What a step waits for, in one line: tickets in flight and for how long, what is ready, live, open."""
        head = list(self._live)[: self.groups_per_step]
        late = [ticket for ticket in head if ticket not in self._ready]
        seconds = time.monotonic() - min((self._in_flight[ticket] for ticket in late), default=time.monotonic())
        awaited = f"tickets {_spans(late)} in flight for {seconds:.0f} s" if late else "no ticket in flight"
        behind = sum(ticket not in head for ticket in self._ready)
        return (
            f"{awaited}; {len(head) - len(late)} of {self.groups_per_step} groups ready and {behind} behind them;"
            f" {len(self._live)} live, {sum(self._openings)} open"
        )

    async def forget(self, before_ticket: int) -> None:
        """Delete stored batches that no committed checkpoint can ask for."""
        segments.forget(self.directory, before_ticket)

    def _head_is_ready(self, groups: int) -> bool:
        return len(self._live) >= groups and all(self._live[i] in self._ready for i in range(groups))

    def _settle(self, groups: Mapping[int, pa.RecordBatch], dropped: Mapping[int, str]) -> None:
        """These tickets are in flight no longer: ready with their rows, or given up."""
        self._ready |= groups
        self._added_at |= dict.fromkeys(groups, time.monotonic())
        self._gave_up |= dropped
        for ticket in (*groups, *dropped):
            del self._in_flight[ticket]
        self._live = deque(ticket for ticket in self._live if ticket not in dropped)
        self._freed += len(dropped)
        if not self._in_flight and not self._openings and self._freed:
            self._open(self._freed)
            self._freed = 0
            self._refilled += 1

    def _refusal(self, batch: pa.RecordBatch, scored: np.ndarray) -> str | None:
        """Why the group of these rows is not kept. One of equal rewards is, once the step may ask for no others."""
        if scored.sum() < self.min_samples:
            return "too_few_samples"
        rewards = batch.column("reward").to_numpy(zero_copy_only=False)
        return "uniform_rewards" if self._refilled < self.refills and not vary(rewards[scored]) else None

    def _absorb(self, tickets: list[int]) -> list[int]:
        """Take what is already on disk for these tickets; the tickets still to be generated."""
        found = {ticket: group for ticket in tickets if (group := self._in_time(ticket))}
        if found:
            self._counts |= {ticket: group.counts for ticket, group in found.items()}
            groups = {ticket: group.rows for ticket, group in found.items() if group.rows is not None}
            self._settle(groups, {ticket: group.reason for ticket, group in found.items() if group.reason})
            self._changed.notify_all()
        return [ticket for ticket in tickets if ticket not in found]

    def _in_time(self, ticket: int) -> segments.StoredGroup | None:
        """The newest stored group that may be trained at its ticket's place of now.

        What `drop` gave up is not on disk: asked for again it may succeed, and those behind it come later than before.
        """
        trained_from = (self.taken + self._live.index(ticket)) // self.groups_per_step
        groups = sorted(self._stored.pop(ticket, []), key=lambda group: group.versions, reverse=True)
        oldest = trained_from - self.max_staleness
        return next((g for g in groups if oldest <= g.versions[0] and g.versions[1] <= trained_from), None)

    def _restore(self) -> list[str]:
        """Read accepted batches back; what is damaged is moved aside, and its tickets are generated again."""
        damaged = manifest.cut_back(self.directory, self.version)
        for path in segments.paths(self.directory):
            try:
                segment = segments.read(path)
            except segments.SegmentError:
                files.move_aside(self.directory, path)
                damaged.append(path.name)
                continue
            for ticket, group in segment.groups():
                if ticket >= self.next_ticket:
                    self._stored[ticket].append(group)
        return damaged


def _counts(rows: pa.RecordBatch, dropped: str | None) -> segments.Counts:
    """What the rows of one ticket add to the counters; `dropped`: why it was."""
    scored = rows.filter(rows.column("failure").is_null())
    nulls = {name: scored.column(name).null_count for name in rows.schema.names if name.startswith("reward_")}
    monitors = {f"{name.removeprefix('reward_')}_monitor": count for name, count in nulls.items() if count}
    failures = Counter(reason for reason in rows.column("failure").to_pylist() if reason)
    return {
        "samples_accepted_total": {"": 0 if dropped else scored.num_rows},
        "completion_tokens_total": {"": int(schema.lengths(rows, "completion_tokens").sum())},
        "samples_failed_total": {**failures, **monitors},
        "groups_dropped_total": {dropped: 1} if dropped else {},
    }


def _sum(counts: list[segments.Counts]) -> dict[str, dict[str, int]]:
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for each in counts:
        for name, values in each.items():
            totals[name].update(values)
    return {name: dict(values) for name, values in totals.items()}


def _spans(tickets: list[int]) -> str:
    """Ascending numbers as 3, 5-7."""
    starts = [ticket for ticket in tickets if ticket - 1 not in tickets]
    ends = [ticket for ticket in tickets if ticket + 1 not in tickets]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
