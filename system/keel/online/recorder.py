"""What a run writes while it goes: metrics, events, evaluations, checkpoints, references, quarantined rows."""

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import psutil
import pyarrow as pa

from keel import checkpoint, files, references, schema
from keel.cluster import actors, learner_group
from keel.config import loader
from keel.observability import evaluations
from keel.observability.bottlenecks import largest_share
from keel.observability.metrics import RunMetrics
from keel.observability.tracking import Tracking
from keel.observability.utilization import Utilization
from keel.online.preflight import Prepared
from keel.protocols import Batch, Observer


class Display(Protocol):
    """Where progress goes: a live table, plain lines, or nothing."""

    def note(self, text: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, line: dict[str, Any]) -> None: ...


class Recorder(Observer):
    """Puts what the controller tells into metrics, files and the display."""

    def __init__(self, prepared: Prepared, metrics: RunMetrics, display: Display) -> None:
        self.prepared, self.metrics, self.display = prepared, metrics, display
        self.directory = prepared.directory
        self.buffer: actors.RemoteBuffer | None = None
        self.learner: learner_group.LearnerGroup | None = None
        self.reference: actors.ScorerPool | None = None
        self.utilization = Utilization()
        settings = prepared.settings
        self.tracking = Tracking(settings, self.directory, metrics, display.note)
        bound, steps = float(settings.buffer.max_staleness), float(settings.run.steps)
        metrics.set({"max_staleness_versions": bound, "steps_wanted": steps})
        self.finished = self._renewed = False
        self._before: dict[str, Any] | None = None
        self._waiting: list[str] = []
        self.furthest = 0
        """The last step that was ever recorded."""

    def begin(self, learner: learner_group.LearnerGroup, buffer: actors.RemoteBuffer, version: int) -> None:
        """These are the learner and the buffer from now on; steps after `version` are made, perhaps again."""
        self.tracking.begin(version)
        self.learner, self.buffer, self.finished = learner, buffer, False
        self._before = None
        self.metrics.set({"learner_version": float(version)})  # behind what a lost learner had reached
        self.utilization.ranks(learner.placement.ranks)

    def set(self, values: dict[str, Any]) -> None:
        self.metrics.set(values)

    def add(self, values: dict[str, Any]) -> None:
        self.metrics.add(values)

    def event(self, name: str, **fields: Any) -> None:
        self.finished |= name == "objective_finished"
        files.append_json(self.directory / "events.jsonl", {"event": name, "time": time.time(), **fields})

    def note(self, text: str) -> None:
        self.display.note(text)

    def doing(self, what: str) -> None:
        self.utilization.doing(what.replace(" ", "_"))
        self.display.doing(what)

    def occupied(self, role: str, running: int, waiting: int, serving: int) -> None:
        self.utilization.occupied(role, running, waiting, serving)
        self.metrics.set({"batches_waiting": {role: float(waiting)}})

    def waiting_for_resources(self, name: str, asked: str, free: str) -> None:
        """Record an event for each; when many wait, only the first is shown."""
        new = name not in self._waiting
        if new:
            self._waiting.append(name)
            self.event("waiting_for_resources", who=name, asked=asked, reason=free)
        if new or name == self._waiting[0]:
            others = len(self._waiting) - 1
            names = f"{name} ({asked})" + (f" and {others} more" if others else "")
            self.display.note(f"waiting for resources for {names}: {free}")
            if self.utilization.starting:
                self.display.doing(f"waiting for resources for {name}")

    def waited_for_resources(self, name: str, seconds: float, *, granted: bool) -> None:
        self._waiting.remove(name)
        if granted:
            self.event("resources_found", who=name, seconds=round(seconds, 3))
            self.display.note(f"resources for {name} after {seconds:.0f} s")
            if self.utilization.starting:
                self.display.doing(f"{name} comes up")

    def tick(self) -> None:
        """Each second, also while a step takes long: an alert waits five minutes for little memory."""
        self.metrics.add(self.utilization.drain())
        self.metrics.set({"free_memory_bytes": float(psutil.virtual_memory().available)})

    def step(self, step: int) -> None:
        self.furthest = max(self.furthest, step)
        self.tick()
        self.tracking.report()
        line = self.metrics.record(step, time.time())
        share = {"largest_share": largest_share(self._before, line)} if self._before else {}
        self._before = line
        self.display.step(line | share)
        self.tracking.step(line)

    async def evaluated(self, step: int, batch: pa.RecordBatch) -> None:
        row = evaluations.store(self.directory, step, batch)
        self.tracking.evaluated(step, row)
        self.display.note(
            f"evaluation at step {step}: reward {row['proxy']:+.3f} +- {row['stderr']:.3f} (standard error),"
            f" KL {row['kl_nats']:.2f} nats, {row['n']:.0f} held-out prompts"
        )

    async def checkpoint(self, step: int) -> None:
        """Learner and policy from the ranks, state from buffer and counters; then what it makes obsolete goes."""
        assert self.learner and self.buffer
        aside = checkpoint.begin(self.directory, step)
        try:
            with files.naming_a_full_disk(aside / "learner"):
                await self._commit(aside, step)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # gone by now, unless something went wrong
        self.event("checkpoint", step=step)

    async def _commit(self, aside: Path, step: int) -> None:
        assert self.learner and self.buffer
        await self.learner.save(str(aside))
        buffer = await self.buffer.state() | {"version": step}
        self.metrics.add({"checkpoints_total": 1.0})
        settings = self.prepared.settings
        state = {
            "version": step,
            "finished": self.finished,
            "buffer": buffer,
            "objective": await self.learner.state(),
            "totals": self.metrics.totals,
            "digest": loader.digest(settings),
        }
        await asyncio.to_thread(checkpoint.commit, aside, state)  # it reads every file again
        checkpoint.prune(self.directory, settings.checkpoint.keep)
        oldest = checkpoint.steps(self.directory)[0]
        references.prune(self.directory, settings.reference_iteration_steps, oldest)
        await self.buffer.forget(checkpoint.state_of(self.directory, oldest)["buffer"]["next_ticket"])

    async def quarantine(self, step: int, batch: Batch, reason: str) -> None:
        """quarantine/step-N.arrow: the rows; step-N.json: why, and how to see it again."""
        rows = await actors.fetch(batch)
        path = self.directory / "quarantine" / f"step-{step:06d}.arrow"
        files.write(path, schema.to_bytes(rows))
        again = f"keel replay {self.directory} --step {step}"
        files.write_json(path.with_suffix(".json"), {"step": step, "reason": reason, "replay": again})
        self.event("quarantine", step=step, reason=reason, rows=rows.num_rows)
        self.display.note(f"the rows of step {step} are kept in {path}; to see it again: {again}")

    async def iteration(self, step: int) -> None:
        """Write the policy of now into references/ and let everyone who reads the reference read that."""
        assert self.learner
        folder = references.folder_of(self.directory, step)
        await self.learner.export(str(references.begin(folder)))
        await asyncio.to_thread(references.commit, folder)  # as a checkpoint's
        await self.renew(str(folder))

    async def refer_to(self, folder: Path | None) -> None:
        """Go back to the reference a checkpoint was made under; None: the initial one."""
        if folder is not None:
            references.check(folder)
        elif self._renewed:
            assert self.prepared.models.reference
            folder = Path(self.prepared.models.reference)
        if folder is not None:
            await self.renew(str(folder))

    async def renew(self, folder: str) -> None:
        assert self.learner and self.reference
        self._renewed = True
        await self.reference.pool.load_weights(folder)
        await self.learner.renew_reference(folder)
