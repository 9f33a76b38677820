"""Run directories written by the real buffer, metrics, checkpoints and evaluations, in the order of a training run.

The learner is a hash of everything it was given, so two runs with equal weights have trained on equal rows.
"""

import asyncio
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

import rollouts
from fakes import settings_for
from keel import checkpoint, files, schema
from keel.config import loader
from keel.config.run import Settings
from keel.observability import evaluations
from keel.observability.metrics import RunMetrics
from keel.rollout import manifest
from keel.rollout.buffer import RolloutBuffer

STEPS = 5
SEED = 7


def settings(staleness: int = 0, name: str = "test", **blocks: Any) -> Settings:
    """Five steps of two groups, one ticket a generator batch; checkpoints and evaluations every second step."""
    subject: dict[str, Any] = {
        "run": {"name": name, "seed": SEED},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "evaluation": {"every_steps": 2},
    }
    return settings_for(steps=STEPS, staleness=staleness, **{**subject, **blocks})


def seeded(batch: pa.RecordBatch, domain: str = "train") -> pa.RecordBatch:
    """Prompt rows with the seeds of a run of seed 7."""
    rows = zip(batch.column("ticket").to_pylist(), batch.column("sample").to_pylist(), strict=True)
    seeds = [xxhash.xxh3_64_intdigest(f"{domain}:{SEED}:{t}:{s}".encode()) >> 1 for t, s in rows]
    place = batch.schema.get_field_index("seed")
    return batch.set_column(place, batch.schema.field(place), pa.array(seeds, pa.int64()))


def scored(tickets: Sequence[int], version: int, failing: frozenset[int] = frozenset()) -> pa.RecordBatch:
    """Two samples a ticket by these weights; those of failing tickets have no reward."""
    batch = rollouts.referenced(rollouts.generated(seeded(rollouts.prompts(tickets)), version))
    rows = zip(batch.column("ticket").to_pylist(), batch.column("sample").to_pylist(), strict=True)
    return rollouts.scored(batch, [None if t in failing else 0.1 * s + 0.01 * (t % 5) for t, s in rows])


async def blocked(task: "asyncio.Task[Any]") -> bool:
    """Whether a task still waits after everything else had its turn."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


@dataclass
class Writer:
    """Trains the fake learner in a directory, from its last checkpoint on."""

    directory: Path
    settings: Settings
    failing: frozenset[int] = frozenset()
    """Tickets whose samples have no reward."""
    lost: frozenset[int] = frozenset()
    """Tickets whose worker dies."""

    def train(self) -> None:
        asyncio.run(self._train())

    async def _train(self) -> None:
        files.make_folder(self.directory)
        files.write(self.directory / "config.yaml", loader.dump(self.settings).encode())
        saved, state, damaged = checkpoint.newest_intact(self.directory)
        assert damaged == []
        version = state["version"] if state else 0
        if version == self.settings.run.steps:
            return
        files.keep_steps(self.directory / "metrics.jsonl", version)
        manifest.undo(self.directory, version)
        self.metrics = RunMetrics(self.settings.run.name, self.directory / "metrics.jsonl")
        self.trained = "nothing"
        if saved and state:
            files.append_json(self.directory / "events.jsonl", {"event": "resume", "time": 0.0, "step": version})
            self.metrics.restore(state["totals"])
            self.trained = (saved / "learner" / "state").read_text()
        await self._steps(self._buffer(state["buffer"] if state else {}), version)

    def _buffer(self, state: dict[str, int]) -> RolloutBuffer:
        config = self.settings.buffer
        return RolloutBuffer(
            self.directory,
            groups_per_step=config.groups_per_step,
            groups_per_batch=self.settings.groups_per_batch,
            max_staleness=config.max_staleness,
            **state,
        )

    async def _steps(self, buffer: RolloutBuffer, version: int) -> None:
        if version == 0:
            self._evaluate(0)
        while version < self.settings.run.steps:
            await self._generate(buffer, version)
            batch, numbers = await asyncio.wait_for(buffer.take(self.settings.buffer.groups_per_step), 5)
            self.trained = hashlib.sha256(f"{self.trained} {batch.to_pydict()}".encode()).hexdigest()
            version += 1
            self.metrics.set({"version": float(version), "staleness_max_versions": numbers["staleness_max_versions"]})
            self.metrics.add({name: values.get("", values) for name, values in numbers["counts"].items()})
            self.metrics.add({"steps_total": 1.0, "rollout_bytes_total": numbers["rollout_bytes"]})
            last = version == self.settings.run.steps
            if last or version % self.settings.evaluation.every_steps == 0:
                self._evaluate(version)
            if not last:
                await buffer.advance(version)
            self.metrics.record(version, time.time())
            if last or self._due(version):
                await self._checkpoint(buffer, version)

    def _due(self, version: int) -> bool:
        every = self.settings.checkpoint.every_steps
        return every > 0 and version % every == 0

    async def _generate(self, buffer: RolloutBuffer, version: int) -> None:
        """Everything that may be admitted, the last batch first; again until nothing opens."""
        while True:
            batches: list[list[int]] = []
            while not await blocked(task := asyncio.create_task(buffer.admit())):
                batches.insert(0, task.result())
            task.cancel()
            if not batches:
                return
            for tickets in batches:
                if set(tickets) <= self.lost:
                    await buffer.drop(tickets, "worker_lost")
                else:
                    await buffer.add(tickets, scored(tickets, version, self.failing))

    def _evaluate(self, version: int) -> None:
        rows = rollouts.generated(seeded(rollouts.prompts(range(3), samples=1), "held_out"), version)
        evaluations.store(self.directory, version, rollouts.scored(rollouts.referenced(rows)))
        self.metrics.add({"evaluations_total": 1.0})

    async def _checkpoint(self, buffer: RolloutBuffer, version: int) -> None:
        aside = checkpoint.begin(self.directory, version)
        for name, content in {"policy/model.safetensors": self.trained, "learner/state": self.trained}.items():
            (aside / name).parent.mkdir()
            (aside / name).write_text(content)
        place = await buffer.state() | {"version": version}
        self.metrics.add({"checkpoints_total": 1.0})
        state = {
            "version": version,
            "finished": False,
            "buffer": place,
            "objective": {},
            "totals": self.metrics.totals,
            "digest": loader.digest(self.settings),
        }
        checkpoint.commit(aside, state)
        checkpoint.prune(self.directory, self.settings.checkpoint.keep)
        await buffer.forget(place["next_ticket"])


class Killed(BaseException):
    """kill -9, which no process can catch."""


@contextmanager
def killed_before(operation: int) -> Iterator[Callable[[], int]]:
    """Die before the so-manieth operation that changes the disk; a file being written then loses its end.

    The function that is yielded says how many there were.
    """
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                if real is fsync and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                    os.ftruncate(arguments[0], max(0, os.fstat(arguments[0]).st_size - 3))
                raise Killed
            return real(*arguments, **options)

        return call

    fsync = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "unlink", "rmdir", "truncate"):
            patch.setattr(os, name, dying(getattr(os, name)))
        yield lambda: count


def read_rows(path: Path) -> pa.RecordBatch:
    return schema.from_bytes(path.read_bytes())
