"""A learner rank for tests: one step of any objective from the weights it started with."""

from typing import Any

import pyarrow as pa
import torch

from keel.algorithms import kinds
from keel.anchors import Anchors
from keel.learn import DeepSpeedLearner
from keel.settings import Settings


class Probe(DeepSpeedLearner):
    """A rank that takes one step of any objective, always from the weights it started with."""

    def begin(self, directory: str) -> None:
        self.directory = directory
        self._engine.save_checkpoint(directory, tag="start")

    def probe(self, chosen: Settings, batch: pa.RecordBatch) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Parameters of policy and critic after one step, and what the step reported."""
        self._engine.load_checkpoint(self.directory, tag="start")
        self.version, self.settings, self.objective = 0, chosen, kinds.build(chosen)
        self._anchors = Anchors(self.objective.vocabulary, self._folder_of, "float32", self.device)
        report = self.step(batch)
        named = {name: value.detach().clone() for name, value in self._engine.module.named_parameters()}
        return named, {**report.metrics, "state": self.state()}
