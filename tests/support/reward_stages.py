"""The reward stage with a learner group whose losses are given."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from keel.config import loader
from keel.config.stages import RewardModelSettings
from keel.learner.reward_models import RewardText
from keel.observability.metrics import RunMetrics
from keel.stages import reward
from keel.stages.reward import PairRows, RewardTraining
from offline_runs import FakeOfflineLearner, Listener
from prompt_files import PLAIN, jsonl

STEPS = 4


class FakeRankGroup(FakeOfflineLearner):
    """A learner group that trains one member after the other; rows are checked by what they hold."""

    def __init__(self, losses: list[float], killed: tuple[int, int] | None = None) -> None:
        super().__init__(losses)
        self.killed, self.member = killed, -1
        self.stopped = False

    async def ready(self) -> None: ...

    def stop(self) -> None:
        self.stopped = True

    def _begin(self, member: int) -> None:
        self.member, self.version = member, 0
        self.killed_at = self.killed[1] if self.killed and self.killed[0] == member else None

    def _step(self, batch: Any) -> Any:
        assert batch.num_rows == 2 * 5, batch.num_rows
        return super()._step(_of(self.version))

    def _assess(self, batch: Any) -> dict[str, float]:
        assert batch.num_rows == 2 * 3, batch.num_rows
        return super()._assess(_of(-1))


def _of(version: int) -> pa.RecordBatch:
    """What the scripted learner looks at."""
    return pa.record_batch({"version": [version]})


class Stage:
    """A prepared stage in a folder of its own, trained by fake rank groups; no member is scored."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **blocks: Any) -> None:
        rows = [{"prompt": f"{n} ", "chosen": f"{n} {n}", "rejected": f"{n}"} for n in range(23)] + [
            {"prompt": "1 ", "chosen": "", "rejected": "1"}
        ]
        tree = {
            "policy": {"model": "m"},
            "prompts": {"source": str(jsonl(root / "pairs.jsonl", rows)), "held_out": 3},
            "training": {"rows_per_step": 5, "evaluate_every_steps": 1},
            "checkpoint": {"every_steps": 2},
            "members": {"count": 2},
            **blocks,
        }
        self.settings = loader.parse_as(RewardModelSettings, tree)
        self.directory, self.monkeypatch = root / "run", monkeypatch
        self.directory.mkdir()
        self.rows = PairRows(self.settings, RewardText(PLAIN, False, 50))
        self.judged: list[list[str]] = []
        monkeypatch.setattr(reward, "_judge", self._judge)

    async def _judge(
        self, prepared: RewardTraining, folders: list[Path], trained: list[Path], display: Any
    ) -> dict[str, Any]:
        self.judged.append([(folder / "weights").read_text() for folder in folders])
        return {"pairs": 3}

    async def train(self, group: FakeRankGroup) -> dict[str, Any]:
        self.monkeypatch.setattr(reward.learner_group, "RankGroup", lambda *arguments: group)
        prepared = RewardTraining(self.settings, self.directory, "m", self.rows, [], STEPS)
        self.metrics = RunMetrics("test", self.directory / "metrics.jsonl")
        return await reward._train(prepared, self.metrics, Listener(), 0.0)

    def member(self, number: int) -> Path:
        return self.directory / "members" / str(number)


LOSSES = [5.0, 4.0, 3.0, 2.0, 1.0]
