"""The rollout buffer: bounded staleness, admission order, groups whole, rows on disk before they count.

    admit -> tickets -> (generate, score) -> add | drop -> take -> advance
      ^                                                       |
      +---------- opens groups_per_step tickets --------------+

One record (`PromptGroup`) holds what has become of a ticket. Which groups are admitted, and the bound on staleness, is
decided in admission.py; which scored groups are dropped in `RolloutBuffer._reason_to_drop`; which groups the next step
takes in `RolloutBuffer._next_groups`.

Tickets that share a generator batch are decided here: an opening of groups_per_step slots is split into batches of
groups_per_batch, and slots freed by drops are refilled once nothing is in flight. So at max_staleness 0 the
composition of every batch is a function of tickets and drops, never of timing.

Dynamic sampling (DAPO, 2503.14476): a group whose rewards are all equal teaches a group baseline nothing and is
dropped, too, while the step's slots were opened again less than `refills` times (by any drop); after that such groups
are kept, so a step always fills up.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, schema
from keel.algorithms.advantages import vary
from keel.protocols import AddReceipt
from keel.rollout import manifest, segments
from keel.rollout.admission import AdmissionWindow
from keel.rollout.segments import Counts


class GroupState(Enum):
    """State of an admitted group. A step forgets the groups that it takes, and those dropped before them."""

    IN_FLIGHT = "in flight"
    READY = "ready"
    DROPPED = "dropped"


@dataclass
class PromptGroup:
    """The samples of one ticket, from admission until a step has passed it."""

    admitted_at: float
    """Monotonic seconds."""
    state: GroupState = GroupState.IN_FLIGHT
    ready_at: float = 0.0
    rows: pa.RecordBatch | None = None
    """Its scored rows, while it is ready."""
    reason: str = ""
    """Why it was dropped."""
    counts: Counts = field(default_factory=dict)

    def settle(self, rows: pa.RecordBatch | None, reason: str, counts: Counts) -> None:
        """End the flight: the group is ready with its rows, or dropped for a reason."""
        assert self.state is GroupState.IN_FLIGHT, self.state
        self.state = GroupState.DROPPED if reason else GroupState.READY
        self.rows, self.reason, self.counts, self.ready_at = rows, reason, counts, time.monotonic()


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
        roll_backs: int = 0,
    ) -> None:
        """`min_samples`: with fewer scored ones a group is dropped, because its objective compares them.

        `roll_backs`: those of the run so far; batches accepted before the last of them are moved aside.
        """
        self.directory = Path(directory)
        self.window = AdmissionWindow(groups_per_step, groups_per_batch, max_staleness, version, taken)
        self.min_samples, self.refills, self.roll_backs = min_samples, refills, roll_backs
        self._refilled = 0  # times slots of dropped groups were opened again since the last advance
        self._freed = 0  # slots of dropped groups, not yet opened again
        self._groups: dict[int, PromptGroup] = {}  # by ticket, in admission order, from the first that no step passed
        self._next_ticket = next_ticket
        self._after_taken = next_ticket  # the first ticket behind the last one taken
        self._changed = asyncio.Condition()
        self._stored: dict[int, list[segments.StoredGroup]] = defaultdict(list)  # by ticket, from disk
        self._damaged = self._restore()
        self._deliverable = sum(any(group.rows is not None for group in groups) for groups in self._stored.values())

    async def admit(self) -> list[int]:
        """The next tickets that share a generator batch. Batches already on disk are absorbed on the way."""
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self.window.openings)
                size = self.window.admit(len(self._live()))
                tickets = list(range(self._next_ticket, self._next_ticket + size))
                self._next_ticket += size
                now = time.monotonic()
                self._groups |= {ticket: PromptGroup(now) for ticket in tickets}
                if missing := self._absorb(tickets):
                    return missing

    async def add(self, tickets: list[int], batch: pa.RecordBatch) -> AddReceipt:
        """Accept the rows of admitted tickets that were scored; what is kept is on disk when this returns."""
        schema.check(batch)
        rows_of = batch.column("ticket").to_numpy()
        if not self._in_flight(tickets) or not set(rows_of.tolist()) <= set(tickets):
            raise ValueError(f"tickets {tickets}: not in flight, or rows of other tickets in the batch")
        scored = batch.column("reward").is_valid().to_numpy(zero_copy_only=False)
        reasons = {ticket: self._reason_to_drop(batch, scored & (rows_of == ticket)) for ticket in tickets}
        dropped = {ticket: reason for ticket, reason in reasons.items() if reason}
        counts = {t: _counts(schema.select(batch, rows_of == t), reasons[t]) for t in tickets}
        rows = schema.concat([schema.select(batch, scored & ~np.isin(rows_of, list(dropped)))])
        kept = [ticket for ticket in tickets if ticket not in dropped]
        segment = segments.Segment(tickets, rows, counts, dropped, self.roll_backs)
        num_bytes = segments.write(self.directory, segment) if kept else 0
        rows_by_ticket = {ticket: schema.select(rows, rows.column("ticket").to_numpy() == ticket) for ticket in kept}
        async with self._changed:
            for ticket in tickets:
                self._groups[ticket].settle(rows_by_ticket.get(ticket), reasons[ticket], counts[ticket])
            self._settled(len(dropped))
        failures = Counter(reason for reason in batch.column("failure").to_pylist() if reason)
        return AddReceipt(len(kept), rows.num_rows, failures, Counter(dropped.values()), num_bytes)

    async def drop(self, tickets: list[int], reason: str) -> None:
        """Give up admitted tickets; their slots open again."""
        assert self._in_flight(tickets), (tickets, reason)
        async with self._changed:
            for ticket in tickets:
                self._groups[ticket].settle(None, reason, {"groups_dropped_total": {reason: 1}})
            self._settled(len(tickets))

    async def take(self, groups: int) -> tuple[pa.RecordBatch, Mapping[str, Any]]:
        """The next groups in admission order as one contiguous batch, stored as the step's rollout file.

        With it gauges of the buffer, and under `counts` what became of the tickets since the last step's up to this
        step's last one: counters are a function of the manifest, so those of a resumed run equal those of an
        uninterrupted one.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._next_groups(groups))
            tickets = self._next_groups(groups)
            self.window.taken += groups
            passed = {ticket: self._groups.pop(ticket) for ticket in range(self._after_taken, tickets[-1] + 1)}
            self._after_taken = tickets[-1] + 1
        batch = schema.concat([passed[ticket].rows for ticket in tickets])
        dropped = {ticket: group.reason for ticket, group in passed.items() if group.reason}
        version, max_staleness = self.window.version, self.window.max_staleness
        versions, _ = schema.ragged(batch, "weight_versions")
        staleness = version - versions
        assert staleness.max() <= max_staleness, (staleness.max(), max_staleness)
        num_bytes = manifest.write_step(self.directory, version + 1, batch, dropped)
        ready = [group.rows for group in self._groups.values() if group.rows is not None]
        return batch, {
            "buffer_age_seconds": time.monotonic() - min(passed[ticket].ready_at for ticket in tickets),
            "buffer_groups": float(len(ready)),
            "buffer_bytes": float(sum(rows.nbytes for rows in ready)),
            "rollout_bytes": float(num_bytes),
            "staleness_mean_versions": float(staleness.mean()),
            "staleness_max_versions": float(staleness.max()),
            "counts": _sum([group.counts for group in passed.values()]),
        }

    async def advance(self, version: int) -> None:
        """Open a step's worth of tickets: all generators hold this version now."""
        assert version == self.window.version + 1, (version, self.window.version)
        async with self._changed:
            self._refilled = 0
            self.window.advance()
            self._changed.notify_all()

    async def resize(self, groups_per_batch: int) -> None:
        """Let tickets that open from now on share batches of this size: the number of generators changed."""
        window = self.window
        assert 1 <= groups_per_batch <= (1 + window.max_staleness) * window.groups_per_step, groups_per_batch
        window.groups_per_batch = groups_per_batch

    async def state(self) -> dict[str, int]:
        """What a checkpoint must hold to start again here: everything behind the last ticket taken is asked for again.

        Also what was dropped since: it is dropped again, so batches, refills and counts come out as they were.
        """
        return {"version": self.window.version, "taken": self.window.taken, "next_ticket": self._after_taken}

    async def restored(self) -> dict[str, Any]:
        """What the start read from disk: `groups` it can deliver again, and what was `damaged`, by name."""
        return {"groups": self._deliverable, "damaged": self._damaged}

    async def waiting(self) -> str:
        """What a step waits for, in one line: tickets in flight and for how long, what is ready, live, open."""
        live, groups_per_step = self._live(), self.window.groups_per_step
        head = live[:groups_per_step]
        late = [ticket for ticket in head if self._groups[ticket].state is GroupState.IN_FLIGHT]
        ready = sum(self._groups[ticket].state is GroupState.READY for ticket in live)
        now = time.monotonic()
        seconds = now - min((self._groups[ticket].admitted_at for ticket in late), default=now)
        awaited = f"tickets {_spans(late)} in flight for {seconds:.0f} s" if late else "no ticket in flight"
        behind = ready - (len(head) - len(late))
        return (
            f"{awaited}; {len(head) - len(late)} of {groups_per_step} groups ready and {behind} behind them;"
            f" {len(live)} live, {sum(self.window.openings)} open"
        )

    async def forget(self, before_ticket: int) -> None:
        """Delete stored batches that no committed checkpoint can ask for."""
        segments.forget(self.directory, before_ticket)

    def _live(self) -> list[int]:
        """Admitted tickets in order, neither taken nor dropped."""
        return [ticket for ticket, group in self._groups.items() if group.state is not GroupState.DROPPED]

    def _in_flight(self, tickets: list[int]) -> bool:
        groups = [self._groups.get(ticket) for ticket in tickets]
        return all(group is not None and group.state is GroupState.IN_FLIGHT for group in groups)

    def _next_groups(self, count: int) -> list[int]:
        """The tickets that the next step takes: the oldest live groups, once all of them are ready; until then none."""
        head = self._live()[:count]
        ready = len(head) == count and all(self._groups[ticket].state is GroupState.READY for ticket in head)
        return head if ready else []

    def _reason_to_drop(self, batch: pa.RecordBatch, scored: np.ndarray) -> str:
        """Why the group of these rows is dropped; empty: it is kept, as are equal rewards once all refills are used."""
        if scored.sum() < self.min_samples:
            return "too_few_samples"
        rewards = batch.column("reward").to_numpy(zero_copy_only=False)
        return "uniform_rewards" if self._refilled < self.refills and not vary(rewards[scored]) else ""

    def _settled(self, dropped: int) -> None:
        """Wake the waiting calls, and open the slots of dropped groups again once nothing is in flight."""
        self._freed += dropped
        in_flight = any(group.state is GroupState.IN_FLIGHT for group in self._groups.values())
        if self._freed and not in_flight and not self.window.openings:
            self.window.open(self._freed)
            self._freed = 0
            self._refilled += 1
        self._changed.notify_all()

    def _absorb(self, tickets: list[int]) -> list[int]:
        """Settle what is already on disk of these tickets; the tickets still to be generated."""
        stored = {ticket: group for ticket in tickets if (group := self._in_time(ticket))}
        for ticket, group in stored.items():
            self._groups[ticket].settle(group.rows, group.reason, group.counts)
        if stored:
            self._settled(sum(bool(group.reason) for group in stored.values()))
        return [ticket for ticket in tickets if ticket not in stored]

    def _in_time(self, ticket: int) -> segments.StoredGroup | None:
        """The newest stored group that may be trained at its ticket's current place.

        A group that `drop` gave up is not on disk. If it is sampled again it may succeed; later groups then move back.
        """
        trained_from = (self.window.taken + self._live().index(ticket)) // self.window.groups_per_step
        groups = sorted(self._stored.pop(ticket, []), key=lambda group: group.versions, reverse=True)
        oldest = trained_from - self.window.max_staleness
        return next((g for g in groups if oldest <= g.versions[0] and g.versions[1] <= trained_from), None)

    def _restore(self) -> list[str]:
        """Read accepted batches back; what is damaged is moved aside, and its tickets are generated again."""
        damaged = manifest.cut_back(self.directory, self.window.version)
        for path in segments.paths(self.directory):
            try:
                segment = segments.read(path)
            except segments.SegmentError:
                files.move_aside(self.directory, path)
                damaged.append(path.name)
                continue
            if segment.roll_backs != self.roll_backs:
                files.move_aside(self.directory, path)
                continue
            for ticket, group in segment.groups():
                if ticket >= self._next_ticket:
                    self._stored[ticket].append(group)
        return damaged


def _counts(rows: pa.RecordBatch, reason: str) -> Counts:
    """What the rows of one ticket add to the counters; `reason`: why it was dropped, if it was."""
    scored = rows.filter(rows.column("failure").is_null())
    nulls = {name: scored.column(name).null_count for name in rows.schema.names if name.startswith("reward_")}
    monitors = {f"{name.removeprefix('reward_')}_monitor": count for name, count in nulls.items() if count}
    failures = Counter(failure for failure in rows.column("failure").to_pylist() if failure)
    return {
        "samples_accepted_total": {"": 0 if reason else scored.num_rows},
        "completion_tokens_total": {"": int(schema.lengths(rows, "completion_tokens").sum())},
        "samples_failed_total": {**failures, **monitors},
        "groups_dropped_total": {reason: 1} if reason else {},
    }


def _sum(counts: list[Counts]) -> dict[str, dict[str, int]]:
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for group_counts in counts:
        for name, values in group_counts.items():
            totals[name].update(values)
    return {name: dict(values) for name, values in totals.items()}


def _spans(tickets: list[int]) -> str:
    """Ascending numbers as 3, 5-7."""
    starts = [ticket for ticket in tickets if ticket - 1 not in tickets]
    ends = [ticket for ticket in tickets if ticket + 1 not in tickets]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
