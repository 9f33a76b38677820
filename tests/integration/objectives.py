"""Objectives of these tests, importable by the learner ranks through PYTHONPATH."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config.run import Settings


class Poisoned(Objective):
    """A weighted likelihood whose loss is not a number in the step that `options.step` names."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._step = 0

    def weigh(self, batch: pa.RecordBatch, measured: Measured) -> Credit:
        self._step = measured.version + 1
        rewards = self.regularized_rewards(batch, measured)
        lengths = np.array([len(tokens) for tokens in batch.column("completion_tokens").to_pylist()])
        return Credit((rewards - rewards.mean()).repeat(lengths), len(lengths), int(lengths.sum()), {})

    def surrogate(self, rows: Rows, outputs: Outputs, credit: Credit) -> tuple[Tensor, dict[str, Any]]:
        loss, sums = super().surrogate(rows, outputs, credit)
        return (loss * math.nan if self._step == self.settings.objective.options["step"] else loss), sums
