"""Records what the controller reports: metrics, events, evaluations and quarantined rows, and the progress display."""

import time
from collections.abc import Mapping
from typing import Any

import psutil
import pyarrow as pa

from keel import files, schema
from keel.cluster import actors
from keel.observability import evaluations
from keel.observability.bottlenecks import largest_share
from keel.observability.console import Display
from keel.observability.metrics import RunMetrics
from keel.observability.tracking import Tracking
from keel.observability.utilization import Utilization
from keel.online.preflight import Prepared
from keel.protocols import Batch, Observer


class Recorder(Observer):
    """Writes reports into metrics, files, trackers and the display."""

    def __init__(self, prepared: Prepared, metrics: RunMetrics, display: Display) -> None:
        self.prepared, self.metrics, self.display = prepared, metrics, display
        self.directory = prepared.directory
        self.utilization = Utilization()
        settings = prepared.settings
        self.tracking = Tracking(settings, self.directory, metrics, display.note)
        bound, steps = float(settings.buffer.max_staleness), float(settings.run.steps)
        metrics.set({"max_staleness_versions": bound, "steps_wanted": steps})
        self._before: dict[str, Any] | None = None
        self._waiting: list[str] = []
        self.furthest = 0
        """The last step that was ever recorded."""

    def begin(self, ranks: int, version: int) -> None:
        """Record a new learner group from now on; steps after `version` are made, perhaps for the second time."""
        self.tracking.begin(version)
        self._before = None
        self.metrics.set({"learner_version": float(version)})  # behind what a lost learner had reached
        self.utilization.ranks(ranks)

    def set(self, values: dict[str, Any]) -> None:
        self.metrics.set(values)

    def add(self, values: dict[str, Any]) -> None:
        self.metrics.add(values)

    def event(self, name: str, **fields: Any) -> None:
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
        """Count utilization and free memory once a second, also during a long step: alerts read them."""
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

    async def quarantine(self, step: int, batch: Batch, reason: str, multipliers: Mapping[str, float]) -> None:
        """Write the rows to quarantine/step-N.arrow; reason, multipliers and replay command to step-N.json."""
        rows = await actors.fetch(batch)
        path = self.directory / "quarantine" / f"step-{step:06d}.arrow"
        files.write(path, schema.to_bytes(rows))
        replay = f"keel replay {self.directory} --step {step}"
        factors = {f"guard_{name}_multiplier": value for name, value in multipliers.items()}
        files.write_json(path.with_suffix(".json"), {"step": step, "reason": reason, "replay": replay, **factors})
        self.event("quarantine", step=step, reason=reason, rows=rows.num_rows)
        self.display.note(f"the rows of step {step} are kept in {path}; to see it again: {replay}")
