"""One learner rank that trains reward models: Bradley-Terry on pairs, on the same engine as every learner.

    L = -(1 - e) log sigma(u) - e log sigma(-u) + c (r_w + r_l)^2,    u = r_w - r_l - margin

averaged over the pairs of a step; w chosen, l rejected, e label smoothing, c `center_penalty` (2312.09244). Both texts
of a pair go through the model together. Shapes: P pairs, B = 2 P rows (chosen, rejected, chosen, ...).
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from keel import files, schema
from keel.config.stages import RewardModelSettings
from keel.learner import activation_checkpointing, optimizer, packing, reward_models
from keel.learner.engine import Engine, join_ranks
from keel.protocols import StepReport

PAIR = schema.described(
    tokens=(schema.TOKENS, "prompt and completion as the reward model reads them"),
    second=(pa.int32(), "where the second segment of an encoder's text begins"),
    margin=(pa.float32(), "subtracted from the difference of the pair"),
)
"""Two rows a pair: chosen, then rejected."""


class PairLoss(NamedTuple):
    losses: Tensor
    """[P]."""
    margins: Tensor
    """[P] r_w - r_l."""


def pair_loss(scores: Tensor, margins: Tensor, config: RewardModelSettings) -> PairLoss:
    """Bradley-Terry losses of scores [2 P] (chosen, rejected, chosen, ...) and margins [P]."""
    chosen, rejected = scores[0::2], scores[1::2]
    u, smoothing = chosen - rejected - margins, config.label_smoothing
    losses = -(1 - smoothing) * logsigmoid(u) - smoothing * logsigmoid(-u)
    return PairLoss(losses + config.center_penalty * (chosen + rejected).square(), (chosen - rejected).detach())


class RewardModelLearner:
    """All public methods are collective: every rank must be called with the same arguments."""

    def __init__(
        self, settings: RewardModelSettings, folder: str, steps: int, rank: int, ranks: int, address: str, port: int
    ) -> None:
        join_ranks(settings.learners, rank, ranks, address, port, settings.deadlines.step_seconds)
        self.settings, self.folder, self.steps = settings, folder, steps
        self.rank, self.ranks = rank, ranks
        self.version = 0

    def begin(self, member: int) -> None:
        """Put a new model in place: this member's head, untrained."""
        settings = self.settings
        dtype = "float32" if settings.learners.precision == "fp32" else "bfloat16"
        seed = settings.members.head_seed(settings.run.seed, member)
        self._engine = Engine(settings.learners, self.ranks, self.steps)
        options = settings.policy.chat_template_options
        model = reward_models.start(Path(self.folder), dtype, settings.completions.max_tokens, seed, options)
        activation_checkpointing.enable(model.model, settings.learners.activation_checkpointing)
        model = model.to(self._engine.device)
        self._engine.drive(model, optimizer.adamw(settings.learners, [{"params": list(model.parameters())}]))
        self.version = 0

    def step(self, batch: pa.RecordBatch) -> StepReport:
        """One optimizer update on the pairs. Raises NotFinite for a loss or gradient that is not, before it."""
        started = time.monotonic()
        rate = self._engine.set_rate(self.version)
        pairs = batch.num_rows // 2
        margins = torch.from_numpy(batch.column("margin").to_numpy()[0::2].copy())
        sums: dict[str, float] = defaultdict(float)
        for numbers, real, inputs in self._passes(batch):
            scores, margin = self._engine(*inputs), margins[torch.from_numpy(numbers)].to(self._engine.device)
            losses, differences = pair_loss(scores, margin, self.settings)
            self._engine.backward(losses.sum() / pairs, real=real)
            if real:
                sums["loss"] += losses.sum().item() / pairs
                sums["implicit_margin"] += differences.sum().item() / pairs
                sums["preference_accuracy_ratio"] += (differences > 0).sum().item() / pairs
        metrics = self._engine.sum_named(sums)
        metrics["grad_norm"] = self._engine.update(self.version + 1, metrics["loss"], metrics)
        self.version += 1
        tokens = float(schema.lengths(batch, "tokens").sum())
        metrics |= {"learning_rate": rate, "pairs": float(pairs), "trained_tokens": tokens}
        metrics |= {"length_tokens": tokens / batch.num_rows, "step_seconds": time.monotonic() - started}
        return StepReport(self.version, metrics)

    @torch.no_grad()
    def scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """float64 [rows] under the current weights, without dropout (there is none), no offset subtracted."""
        scores = torch.zeros(batch.num_rows, dtype=torch.float64, device=self._engine.device)
        for numbers, real, inputs in self._passes(batch):
            values = self._engine(*inputs).double()
            if real:
                rows = torch.from_numpy(np.stack([2 * numbers, 2 * numbers + 1], axis=1).reshape(-1))
                scores[rows.to(scores.device)] = values
        return self._engine.sum_over_ranks(scores).cpu().numpy()

    def assess(self, batch: pa.RecordBatch) -> dict[str, float]:
        """Loss, accuracy and margin on held-out pairs; nothing is learned."""
        margins = torch.from_numpy(batch.column("margin").to_numpy()[0::2].copy())
        pair_losses = pair_loss(torch.from_numpy(self.scores(batch)), margins, self.settings)
        ties = (pair_losses.margins == 0).double() / 2
        return {
            "loss": float(pair_losses.losses.mean()),
            "preference_accuracy_ratio": float(((pair_losses.margins > 0).double() + ties).mean()),
            "implicit_margin": float(pair_losses.margins.mean()),
        }

    def save(self, directory: str) -> None:
        self._engine.save(directory, self.version)

    def restore_checkpoint(self, directory: str) -> int:
        self.version = self._engine.restore_checkpoint(directory)
        return self.version

    def state(self) -> dict[str, Any]:
        return {}

    def export(self, folder: str) -> None:
        """Write the model as a Hugging Face folder, on rank 0; the others take part in gathering."""
        model = self._engine.module
        named = self._engine.gather(model.model, self.rank)
        if self.rank == 0:
            Path(folder).mkdir(parents=True)
            reward_models.write(Path(folder), model, named)
            files.sync_tree(Path(folder))

    def _passes(self, batch: pa.RecordBatch) -> Iterator[tuple[np.ndarray, bool, tuple[Tensor, Tensor, Tensor]]]:
        """(pair numbers, real, inputs) of this rank's passes; equally many on every rank, the last ones filler."""
        lengths = schema.lengths(batch, "tokens")
        total = 2 * np.maximum(lengths[0::2], lengths[1::2])  # a pair, padded to its longer text
        shares, real = packing.share_out(total, self.ranks, self.settings.learners.tokens_per_batch)
        tokens, seconds = batch.column("tokens"), batch.column("second").to_pylist()
        for numbers, is_real in zip(shares[self.rank], real[self.rank], strict=True):
            rows = [row for number in numbers.tolist() for row in (2 * number, 2 * number + 1)]
            inputs = self._engine.module.padded([(tokens[row].as_py(), seconds[row]) for row in rows])
            yield numbers, is_real, tuple(tensor.to(self._engine.device) for tensor in inputs)
