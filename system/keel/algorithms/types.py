"""What passes between the learner and an objective: measurements, credit, rows, outputs, loss.

Shapes: B rows and N completion tokens of a micro-batch (flat, row by row), K value heads, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """What the learner computed for all tokens of the step before it is weighed; None: not asked for."""

    logprobs: np.ndarray | None = None
    """[tokens] of the current policy."""
    values: np.ndarray | None = None
    """[tokens, K] of the current critic, as its heads give them."""
    version: int = 0
    """Of the learner at the start of the step."""


@dataclass(frozen=True)
class Credit:
    """What the loss needs to know of the whole step, token for token; every rank computes the same."""

    advantages: np.ndarray
    """float64 [tokens]; equal within a row where the whole completion is one action."""
    num_rows: int
    num_tokens: int
    """Completion tokens of the step."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Gauges by metric name."""
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Increments of counters by metric name and label."""
    targets: np.ndarray | None = None
    """[tokens, K] what the critic regresses on; NaN: this token has no target."""
    old_values: np.ndarray | None = None
    """[tokens, K] of the critic before the step, in the unit of the targets."""
    selected: np.ndarray | None = None
    """bool [tokens] where the vocabulary term is computed; None: everywhere."""
    penalized: np.ndarray | None = None
    """bool [tokens] where the loss has a KL to the sampler (KL-Cov); None: nowhere."""
    finished: bool = False
    """The objective has reached its own stopping rule: this is the last step."""
    num_sampled_tokens: int | None = None
    """Completion tokens of the step that a policy sampled; None: all."""

    def checked(self, num_tokens: int) -> "Credit":
        """Itself. Raises ValueError unless there is one finite advantage for each of the step's tokens."""
        if self.advantages.shape != (num_tokens,) or not np.isfinite(self.advantages).all():
            raise ValueError(
                f"credit: advantages {self.advantages.shape}; expected {num_tokens} finite numbers, one a token"
            )
        return self


@dataclass(frozen=True)
class LossTerms:
    """One micro-batch's share of the loss, already divided by the step's counts, and sums for the metrics."""

    loss: Tensor
    """Scalar; shares of all micro-batches of all ranks add up to the step's loss."""
    sums: Mapping[str, float]
    """Shares that add up in the same way: means over the step's tokens or rows. name/label for labeled metrics."""


@dataclass(frozen=True)
class Rows:
    """The torch view of a micro-batch's stored columns."""

    advantages: Tensor
    """fp32 [N]."""
    lengths: Tensor
    """fp32 [B] completion tokens."""
    row_of_item: Tensor
    """int64 [N]."""
    sampler: Tensor | None
    """fp32 [N] log-probs under the sampler, mu; None: no policy sampled these completions."""
    old: Tensor | None = None
    """fp32 [N] log-probs under the learner when the step began; None: the current ones, detached."""
    reference: Tensor | None = None
    """fp32 [N]."""
    targets: Tensor | None = None
    """fp32 [N, K], NaN where there is none."""
    old_values: Tensor | None = None
    """fp32 [N, K]."""
    penalized: Tensor | None = None
    """fp32 [N], 1 where the loss has a KL to the sampler; None: nowhere."""
    stored: Tensor | None = None
    """bool [B]: completions that came with the prompts; None: none of them."""

    def first_items(self) -> Tensor:
        """[B] place of each row's first token among the N."""
        lengths = self.lengths.long()
        return lengths.cumsum(0) - lengths

    def sum_by_row(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each row: [N] -> [B]."""
        return torch.zeros_like(self.lengths, dtype=values.dtype).index_add(0, self.row_of_item, values)


@dataclass(frozen=True)
class Outputs:
    """The model's outputs for a micro-batch's completion tokens, with gradient."""

    logprobs: Tensor
    """fp32 [N], nats at the sampling temperature."""
    entropies: Tensor | None = None
    """fp32 [N] full-vocabulary entropy, nats; None: not computed."""
    values: Tensor | None = None
    """fp32 [N, K] of the state before each token."""
    vocabulary: Tensor | None = None
    """fp32 [N] of the objective's vocabulary term."""


class VocabularyTerm(Protocol):
    """A term of each token that reads the whole vocabulary. It is recomputed in the backward pass, piece by piece."""

    models: frozenset[str]
    """Whose logits it reads beside the policy's: reference, teacher, old (the policy when the step began)."""

    def __call__(self, logits: Tensor, targets: Tensor, advantages: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """fp32 logits [n, V] at the sampling temperature, sampled ids [n], advantages [n] -> [n]."""


def labeled(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as floats; `name/label` keys gathered under their name."""
    tree: dict[str, Any] = {}
    for key, value in metrics.items():
        name, _, label = key.partition("/")
        labels = {label: value} if label else value
        if isinstance(labels, Mapping):
            tree[name] = {**tree.get(name, {}), **{label: float(number) for label, number in labels.items()}}
        else:
            tree[name] = float(value)
    return tree
