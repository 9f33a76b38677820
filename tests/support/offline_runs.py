"""An offline run whose learner counts instead of training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from keel import files
from keel.config import loader
from keel.config.stages import SupervisedSettings
from keel.observability.metrics import RunMetrics
from keel.protocols import StepReport
from keel.stages import offline_loop
from keel.stages.offline_loop import OfflineRecorder, OfflineRun, State

ROWS = 20


class Killed(Exception):
    """The process ends here."""


class FakeOfflineLearner:
    """Its weights are the number of its steps. `losses`: held-out loss by version; `killed_at`: a step that never ends."""

    def __init__(self, losses: Sequence[float], killed_at: int | None = None) -> None:
        self.losses, self.killed_at = losses, killed_at
        self.version = 0
        self.log: list[tuple[str, int]] = []

    async def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        answer = getattr(self, f"_{method.__name__}")(*arguments)
        self.log.append((method.__name__, self.version))
        return answer

    def _step(self, batch: pa.RecordBatch) -> StepReport:
        assert batch.column("version").to_pylist() == [self.version]  # the rows of this step and no other
        if self.version + 1 == self.killed_at:
            raise Killed(f"at step {self.killed_at}")
        self.version += 1
        metrics = {
            "loss": 1 / self.version,
            "step_seconds": 0.5,
            "trained_tokens": 7.0,
            "reward": 1.0,
            "reward_std": 0.0,
        }
        return StepReport(self.version, metrics, {"pairs_dropped_total": {"tie": 2.0}})

    def _assess(self, batch: pa.RecordBatch) -> dict[str, float]:
        assert batch.column("version").to_pylist() == [-1], "not the held-out rows"
        return {"loss": self.losses[self.version], "preference_accuracy_ratio": 0.25}

    def _export(self, folder: str) -> None:
        Path(folder).mkdir()  # which must not be there yet, while its parent is
        (Path(folder) / "weights").write_text(str(self.version))

    def _save(self, folder: str) -> None:
        (Path(folder) / "weights").write_text(str(self.version))

    def _restore_checkpoint(self, folder: str) -> int:
        self.version = int((Path(folder) / "weights").read_text())
        return self.version

    def _state(self) -> dict[str, Any]:
        return {"moments": self.version}


class Listener:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def doing(self, what: str) -> None: ...

    def step(self, line: dict[str, Any]) -> None:
        self.steps.append(line["step"])


def rows(version: int) -> pa.RecordBatch:
    return pa.record_batch({"version": [version]})


def offline_run_of(
    directory: Path, steps: int = 6, every: int = 0, patience: int = 0, checkpoints: int = 0
) -> OfflineRun:
    tree = {
        "run": {"name": "test"},
        "policy": {"model": "m"},
        "prompts": {"source": "p"},
        "training": {"rows_per_step": 5, "evaluate_every_steps": every, "patience": patience},
        "checkpoint": {"every_steps": checkpoints, "keep": 2},
    }
    settings = loader.parse_as(SupervisedSettings, tree)
    return OfflineRun(settings, directory, steps, ROWS, batch=rows, held_out=rows(-1), dropped={"empty": 3})


class Run:
    """An offline run from the newest checkpoint (or the start) to its end."""

    def __init__(self, plan: OfflineRun, learner: FakeOfflineLearner) -> None:
        self.plan, self.learner, self.display = plan, learner, Listener()
        self.metrics = RunMetrics("test", plan.directory / "metrics.jsonl")

    async def finish(self) -> State:
        recorder = OfflineRecorder(self.plan, self.metrics, self.display)
        state = await offline_loop.restore(self.plan, self.learner, recorder)
        return await offline_loop.run(self.plan, self.learner, recorder, state)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return files.read_json_lines(self.plan.directory / name)

    @property
    def exported(self) -> int:
        return int((self.plan.model / "weights").read_text())

    def done(self, method: str) -> list[int]:
        return [version for name, version in self.learner.log if name == method]
