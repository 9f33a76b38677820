"""LCO: regress the logits of each state onto the closed-form optimum of one KL-regularized step (2603.00963).

    z* = z_anchor + A / eta,   pi* = softmax(z*)
    mse        1/2 ||z - z*||^2            gradient z - z*
    log_cosh   sum_a log cosh(z - z*)      gradient tanh(z - z*): bounded
    kl         KL(pi*, pi)                 gradient pi - pi*

All three are convex in the logits, where clipped policy gradients are not, and their gradient dies out at the target.
Only the abstract and reviews of the paper were to be had: these equations are a reconstruction from its description.
Sparse advantages touch the sampled token alone, so nothing of vocabulary size is stored between passes: with anchor
behavior and one epoch the anchor is the policy itself; with more, its hidden states and output head.
Logits are defined up to a constant: mse and log_cosh compare them after removing their mean, which keeps them convex.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import schema
from keel.algorithms import advantages
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config.objective import LogitsConvexitySettings
from keel.config.run import LearnerSpec


def distance(logits: Tensor, target: Tensor, form: str) -> Tensor:
    """Loss of each state, [n, V] logits and target logits -> [n]. mse and log_cosh take them as they are."""
    if form == "kl":
        log_target = target.log_softmax(-1)
        return (log_target.exp() * (log_target - logits.log_softmax(-1))).sum(-1)
    error = logits - target
    if form == "mse":
        return 0.5 * error.square().sum(-1)
    # log cosh e = |e| + log(1 + exp(-2|e|)) - log 2, which does not overflow
    size = error.abs()
    return (size + torch.nn.functional.softplus(-2 * size) - np.log(2)).sum(-1)


def ratio_shift(log_probability: Tensor, ratio: Tensor) -> Tensor:
    """Logit change that makes the sampled token's probability ratio * p: log(ratio (1-p) / (1 - ratio p)). [n] -> [n].

    A ratio above 1 is capped so that ratio * p <= 1 - 1e-3, but never below 1; a token that is already that sure, up
    to the last bit of fp32, stays where it is.
    """
    probability = log_probability.exp()
    capped = torch.where(ratio > 1, torch.minimum(ratio, ((1 - 1e-3) / probability).clamp(min=1)), ratio)
    rest = -torch.expm1(log_probability)  # 1 - p without cancellation
    shift = torch.log(capped * rest / (1 - capped * probability))
    return torch.where((rest <= 0) | (capped == 1), torch.zeros_like(shift), shift)


def centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


class ConvexTerm:
    """LCO's loss of each token of a piece of the vocabulary's logits."""

    def __init__(self, config: LogitsConvexitySettings) -> None:
        self.config = config
        self.anchor = "reference" if config.anchor == "reference" else "old" if config.epochs > 1 else None
        models = {self.anchor, *(("teacher", "reference") if config.dense else ())}
        self.models = frozenset(name for name in models if name is not None)

    def __call__(self, logits: Tensor, targets: Tensor, advantages: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        anchor = others[self.anchor] if self.anchor else logits.detach()
        if self.config.dense:
            ratio = others["teacher"].log_softmax(-1) - others["reference"].log_softmax(-1)
            target = anchor + self.config.dense.coefficient * ratio / self.config.temperature
        else:
            shift = self._shift(anchor, targets, advantages.to(logits.dtype))
            target = anchor.scatter_add(-1, targets[:, None], shift[:, None])
        if self.config.form != "kl":
            return distance(centered(logits), centered(target), self.config.form)
        weight = advantages.abs() if self.config.target == "ratio" else 1.0
        return weight * distance(logits, target, "kl")

    def _shift(self, anchor: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
        if self.config.target == "advantage":
            return advantages / self.config.temperature
        log_p = anchor.gather(-1, targets[:, None]).squeeze(-1).sub(torch.logsumexp(anchor, -1))
        up = torch.full_like(log_p, self.config.ratio_up)
        shift = ratio_shift(log_p, torch.where(advantages > 0, up, torch.full_like(up, self.config.ratio_down)))
        return torch.where(advantages == 0, 0.0, shift)


class LogitsConvexity(Objective):
    """Group advantages in, distance to the improved policy out."""

    reads_old = False

    def __init__(self, settings: LearnerSpec) -> None:
        super().__init__(settings)
        assert isinstance(settings.objective, LogitsConvexitySettings)
        self.config: LogitsConvexitySettings = settings.objective
        self.vocabulary = ConvexTerm(self.config)

    def weigh(self, batch: pa.RecordBatch, measured: Measured) -> Credit:
        lengths = schema.completion_lengths(batch)
        tickets = batch.column("ticket").to_numpy()
        kl = schema.row_sums(self.penalty(batch, measured), lengths)
        bonus = schema.row_sums(self.bonus(batch, measured), lengths)
        regularized = self.regularized_rewards(batch, measured)
        late = kl if self.kl.order == "after_baseline" else 0.0
        rows = advantages.by_ticket(advantages.GROUP[self.config.advantage], regularized + late, tickets) - late
        deviation = advantages.deviation(rows, size=advantages.magnitude(self.rewards(batch), kl, bonus))
        if self.config.normalize_advantage and deviation:
            rows = rows / deviation
        return Credit(
            advantages=np.repeat(rows, lengths),
            num_rows=len(rows),
            num_tokens=int(lengths.sum()),
            metrics={**self.reward_metrics(regularized, kl, bonus, tickets), "advantage_std": deviation},
        )

    def surrogate(self, rows: Rows, outputs: Outputs, credit: Credit) -> tuple[Tensor, dict[str, float]]:
        assert outputs.vocabulary is not None
        loss = self.reduce(outputs.vocabulary, rows, credit)
        return loss, {"policy_loss": loss.item()}
