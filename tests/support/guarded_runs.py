"""A run on in-process fakes whose gold peaks at a step, with the real guard, checkpointer and roll back around it."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

import fakes
import rollouts
from keel import checkpoint, files
from keel.algorithms import registry
from keel.algorithms.objective import Objective
from keel.cluster.weight_transport import ObjectStoreTransport
from keel.config.run import Settings
from keel.errors import LearnerLost
from keel.observability.metrics import RunMetrics
from keel.online import train
from keel.online.checkpointer import Checkpointer
from keel.online.controller import Controller
from keel.online.guard import Guard
from keel.online.recorder import Recorder
from keel.online.train import OnlineRun, Saved
from keel.protocols import Components, StepReport
from keel.rollout.buffer import RolloutBuffer
from quiet_display import Quiet

GOLD = [0.1, 0.3, 0.5, 0.45, 0.2, 0.1, 0.05]
"""By weight version."""


GOLD_MONITOR = {"name": "gold", "source": "tests:gold", "role": "monitor"}
REWARDS = [{"name": "length", "source": "tests:length"}, GOLD_MONITOR]


def settings_of(actions: list[str] | None = None, every: int = 1, coefficient: float = 0.1, **guard: Any) -> Settings:
    """Six steps, an evaluation at each, only the newest of the checkpoints kept beside the best."""
    divergence = {"proxy_gold_divergence": {"actions": actions}} if actions else {}
    return fakes.settings_for(
        steps=6,
        rewards=REWARDS,
        evaluation={"every_steps": every},
        checkpoint={"every_steps": 2, "keep": 1},
        regularizer={"kl": {"coefficient": coefficient}},
        guard={"min_rows": fakes.HELD_OUT, **divergence, **guard},
    )


class Killed(Exception):
    """The process ends here."""


class GoldScorer(fakes.FakeScorer):
    """Rewards that rise with the version of the weights, and a gold reward that does not."""

    def __init__(self, gold: Sequence[float]) -> None:
        super().__init__()
        self.gold = gold

    async def score(self, batch: pa.RecordBatch) -> Any:
        _, receipt = await super().score(batch)
        versions = [row[0] for row in batch.column("weight_versions").to_pylist()]
        noise = [0.001 * (seed % 3) for seed in batch.column("seed").to_pylist()]
        rewards, gold = (
            [series[version] + extra for version, extra in zip(versions, noise, strict=True)]
            for series in ([float(version) for version in range(len(self.gold))], self.gold)
        )
        return rollouts.scored(rollouts.referenced(batch), rewards, {"gold": gold}), receipt


class Learner(fakes.FakeLearner):
    """Reports what the guard reads and the coefficients of a real objective, and keeps what it multiplies by."""

    kl = rate = 1.0
    objective: Objective
    metrics: Callable[[int], Mapping[str, float]] = staticmethod(lambda version: {})

    async def step(self, batch: pa.RecordBatch) -> StepReport:
        report = await super().step(batch)
        numbers = {**self.objective.coefficients(), **self.metrics(report.version)}
        return StepReport(report.version, {**report.metrics, **numbers})

    async def set_multipliers(self, kl: float, learning_rate: float) -> None:
        await super().set_multipliers(kl, learning_rate)
        self.kl, self.rate = kl, learning_rate
        self.objective.multiply_kl(kl)

    async def save(self, directory: str) -> None:
        for name in ("policy", "learner"):
            (Path(directory) / name).mkdir()
            (Path(directory) / name / "version").write_text(str(self.version))

    async def restore_checkpoint(self, directory: str) -> int:
        self.version = int((Path(directory) / "learner" / "version").read_text())
        return self.version

    async def export(self, directory: str) -> None:
        Path(directory).mkdir()
        (Path(directory) / "version").write_text(str(self.version))

    async def renew_reference(self, directory: str) -> None: ...

    async def state(self) -> Mapping[str, Any]:
        return {}


class Reference:
    """A pool of reference scorers that has loaded the initial model."""

    loaded = None

    async def load_weights(self, directory: str) -> None: ...


class GuardedRun:
    """One process after another on a run directory: the real loop around attempts, each on fakes and a real buffer."""

    def __init__(
        self, directory: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, gold: Sequence[float] = GOLD
    ) -> None:
        self.directory, self.settings, self.gold = directory, settings, gold
        self.multipliers: list[tuple[int, float, float]] = []
        """Of every step taken: version, factor on KL, factor on the learning rate."""
        self.metrics: Callable[[int], Mapping[str, float]] = lambda version: {}
        self.display = Quiet()
        self.learner_lost_in: set[int] = set()
        """Which of the steps that are begun lose the learner, counted from 1 over all processes."""
        self._left: int | None = None
        self._begun = 0
        files.make_folder(directory)
        monkeypatch.setattr(train, "_end_on_signals", lambda: None)

    def process(self, killed_in: int | None = None) -> Saved:
        """Train from the newest checkpoint to the end, or raise Killed in so many steps from here on."""
        self._left = killed_in
        prepared = SimpleNamespace(
            settings=self.settings, directory=self.directory, models=SimpleNamespace(reference=None)
        )
        recorder: Any = Recorder(
            prepared,  # type: ignore[arg-type]
            RunMetrics("test", self.directory / "metrics.jsonl"),
            self.display,
        )
        online: Any = object.__new__(OnlineRun)
        online.settings, online.prepared, online.recorder, online.has_run = self.settings, prepared, recorder, True
        online.scaling = SimpleNamespace(stopping=False, end=lambda: None)
        online._attempt = lambda saved: asyncio.wait_for(self._attempt(saved, prepared, recorder), 60)
        return asyncio.run(online.to_the_end(train._newest(recorder)))

    async def _attempt(self, saved: Saved, prepared: Any, recorder: Recorder) -> None:
        def step(tickets: list[int], made: int) -> None:
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    raise Killed("here")
            self._begun += 1
            if self._begun in self.learner_lost_in:
                raise LearnerLost("the learner died")
            self.multipliers.append((made, learner.kl, learner.rate))

        version, log, sizes = saved.version, list[Any](), self.settings.buffer
        learner: Any = Learner(log, step, version)
        learner.metrics, learner.objective = self.metrics, registry.build(self.settings)
        generator = fakes.FakeGenerator(log)
        generator.version = version
        buffer: Any = RolloutBuffer(
            self.directory,
            groups_per_step=sizes.groups_per_step,
            groups_per_batch=self.settings.groups_per_batch,
            max_staleness=sizes.max_staleness,
            **saved.buffer,
        )
        guard = Guard(self.settings, saved.state.get("guard"))
        reference: Any = Reference()
        checkpointer = Checkpointer(prepared, learner, buffer, reference, recorder, guard)
        components = Components(
            generators=generator,
            scorers=[GoldScorer(self.gold)],
            buffer=buffer,
            learner=learner,
            transport=ObjectStoreTransport(),
            checkpoints=checkpointer,
            prompts=rollouts.prompts,
            held_out=rollouts.prompts(range(fakes.HELD_OUT), samples=1),
            fetch=_fetch,
        )
        recorder.begin(1, version)
        assert await checkpointer.restore(saved.path) == version
        await Controller(self.settings, components, fakes.SAMPLING, recorder, version, guard).run()

    @property
    def events(self) -> list[dict[str, Any]]:
        return files.read_json_lines(self.directory / "events.jsonl")

    def firings(self) -> list[tuple[str, int]]:
        """Detector and step of every firing, once each, in order."""
        fired = [(event["detector"], event["step"]) for event in self.events if event["event"] == "guard"]
        return list(dict.fromkeys(fired))

    def state(self, step: int) -> dict[str, Any]:
        return json.loads((checkpoint.folder_of(self.directory, step) / "state.json").read_text())


async def _fetch(batch: pa.RecordBatch) -> pa.RecordBatch:
    await fakes.a_turn()
    return batch
