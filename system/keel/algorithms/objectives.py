"""Policy-gradient objectives: group advantage x clipped ratio x truncated importance weight, plus regularisers.

    reward   R_i = s_i - beta KL_i + alpha E_i           (terms that live in the reward; `weigh`, numpy, whole step)
    credit   A_i = advantage of R_i within its group
    loss     = reduce_t [ -min(rho A, clip(rho) A) w ] + beta reduce_t k2 - c mean_t H_t      (`loss`, torch, own rows)

    rho = pi / pi_old, token or sequence;  pi_old: the learner when the step began
    w   = min(pi_old / mu, cap), mu: the sampler's log-probs as stored; detached (truncated importance weight)

RLOO, REINFORCE with group mean, GRPO (2402.03300), Dr. GRPO (2503.20783) and PPO's clip (1707.06347) are settings of
these. Reductions divide by counts of the whole optimizer step, over all ranks and micro-batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import schema
from keel.algorithms import regularisers
from keel.algorithms.advantages import ADVANTAGES, by_ticket, num_uniform_groups
from keel.settings import Settings

MAX_LOG_RATIO = 20.0
"""Exponents of log-ratios are clamped here; how often is a metric (a clamp has no gradient)."""


@dataclass(frozen=True)
class Credit:
    """What the whole step owes each of its rows, computed alike on every rank."""

    advantages: np.ndarray
    """float64 [rows]."""
    num_rows: int
    num_tokens: int
    """Completion tokens of the step."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class LossTerms:
    """One micro-batch's share of the loss, already divided by the step's counts, and sums for the metrics."""

    loss: Tensor
    """Scalar; shares of all micro-batches of all ranks add up to the step's loss."""
    sums: Mapping[str, float]
    """Shares that add up in the same way: means over the step's tokens or rows."""


@dataclass(frozen=True)
class Rows:
    """The torch view of a micro-batch's stored columns. N completion tokens of B rows."""

    advantages: Tensor
    """fp32 [B]."""
    lengths: Tensor
    """fp32 [B] completion tokens."""
    row_of_item: Tensor
    """int64 [N]."""
    sampler: Tensor
    """fp32 [N] log-probs under the sampler, mu."""
    old: Tensor | None
    """fp32 [N] log-probs under the learner when the step began; None: the current ones, detached."""
    reference: Tensor | None
    """fp32 [N]."""


class PolicyGradient:
    """The objective of a run: `weigh` the whole step in numpy, then `loss` of each micro-batch in torch."""

    def __init__(self, settings: Settings) -> None:
        self.objective = settings.objective
        self.kl = settings.regulariser.kl
        self.entropy = settings.regulariser.entropy
        self.max_tokens = settings.sampling.max_tokens
        self.needs = frozenset(settings.needed_columns())
        self.bonus = regularisers.token_bonus_coefficient(self.entropy)

    def weigh(self, batch: pa.RecordBatch) -> Credit:
        """Advantages of all rows of the step, regularisers that live in the reward included."""
        missing = self.needs - set(batch.schema.names)
        assert not missing, missing
        tickets = batch.column("ticket").to_numpy()
        rewards = batch.column("reward").to_numpy(zero_copy_only=False).astype(np.float64)
        logprobs, lengths = schema.ragged(batch, "completion_logprobs")
        entropy = self.entropy.coefficient * regularisers.entropy_reward(self.entropy.form, logprobs, lengths)
        penalty = self._kl_penalty(batch, logprobs, lengths)
        before = self.kl.order == "before_baseline"
        regularised = rewards + entropy - (penalty if before else 0.0)
        advantages = by_ticket(ADVANTAGES[self.objective.advantage], regularised, tickets)
        return Credit(
            advantages=advantages - (0.0 if before else penalty),
            num_rows=len(rewards),
            num_tokens=int(lengths.sum()),
            metrics={
                "regularised_reward": float((rewards + entropy - penalty).mean()),
                "reward_kl_term": float(-penalty.mean()),
                "reward_entropy_term": float(entropy.mean()),
                "uniform_groups": float(num_uniform_groups(regularised, tickets)),
            },
        )

    def _kl_penalty(self, batch: pa.RecordBatch, logprobs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if self.kl.coefficient == 0 or self.kl.placement != "reward":
            return np.zeros(len(lengths))
        reference, _ = schema.ragged(batch, "reference_logprobs")
        return self.kl.coefficient * regularisers.sequence_kl(logprobs, reference, lengths)

    def loss(self, rows: Rows, logprobs: Tensor, entropies: Tensor, credit: Credit) -> LossTerms:
        """The micro-batch's share of the loss. logprobs, entropies fp32 [N] with gradient."""
        old = logprobs.detach() if rows.old is None else rows.old
        weight, clamped_weights = self._importance_weight(old - rows.sampler, rows)
        surrogate, clipped, clamped = self._surrogate(logprobs - old, weight, rows)
        num_terms = credit.num_rows if self.objective.level == "sequence" else credit.num_tokens
        terms = {"policy_loss": self._reduce(surrogate, rows, credit)}
        if self.kl.coefficient > 0 and self.kl.placement == "loss":
            assert rows.reference is not None
            k2 = regularisers.kl_loss(logprobs, rows.reference)
            terms["kl_loss"] = self.kl.coefficient * self._reduce(k2, rows, credit)
        if self.bonus > 0:
            terms["entropy_loss"] = -self.bonus * entropies.sum() / credit.num_tokens
        total = torch.stack(list(terms.values())).sum()
        return LossTerms(
            total,
            {name: term.item() for name, term in terms.items()}
            | {
                "loss": total.item(),
                "clip_ratio": clipped / num_terms,
                "clamped_log_ratios": float(clamped + clamped_weights),
                "importance_weight": weight.sum().item() / num_terms,
                "truncated_weight_ratio": (weight >= self.objective.correction_cap).sum().item() / num_terms,
                "policy_entropy_nats": entropies.detach().sum().item() / credit.num_tokens,
            },
        )

    def _importance_weight(self, log_ratio: Tensor, rows: Rows) -> tuple[Tensor, int]:
        """min(pi_old / mu, cap) for every term of the surrogate, and how many exponents were clamped."""
        sequence_terms = self.objective.level == "sequence"
        if self.objective.correction == "none":
            return torch.ones_like(rows.advantages if sequence_terms else log_ratio), 0
        per_row = self.objective.correction == "sequence"
        exponent, clamped = _clamp(_per_row(log_ratio, rows) if per_row else log_ratio)
        weight = exponent.exp().clamp(max=self.objective.correction_cap)
        return (weight[rows.row_of_item] if per_row and not sequence_terms else weight), clamped

    def _surrogate(self, log_ratio: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, int, int]:
        """-min(rho A, clip(rho) A) w of every term ([N] tokens or [B] rows); clipped and clamped terms counted."""
        sequence_terms = self.objective.level == "sequence"
        advantages = rows.advantages if sequence_terms else rows.advantages[rows.row_of_item]
        exponent, clamped = _clamp(_per_row(log_ratio, rows) if sequence_terms else log_ratio)
        ratio = exponent.exp()
        low, high = self.objective.clip_low, self.objective.clip_high
        bounded = ratio.clamp(1 - low if low else None, 1 + high if high else None) if low or high else ratio
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        clipped = int((bounded * advantages < ratio * advantages).sum())
        return -objective * weight, clipped, clamped

    def _reduce(self, terms: Tensor, rows: Rows, credit: Credit) -> Tensor:
        """Sum of terms ([N] tokens or [B] rows) divided by counts of the whole step, as `reduction` says."""
        match self.objective.reduction:
            case "sequence_sum":
                return terms.sum() / credit.num_rows
            case "sequence_mean":
                return (terms / rows.lengths[rows.row_of_item]).sum() / credit.num_rows
            case "token_mean":
                return terms.sum() / credit.num_tokens
            case "constant":
                return terms.sum() / (credit.num_rows * self.max_tokens)


def _per_row(values: Tensor, rows: Rows) -> Tensor:
    """Sum over the tokens of each row: [N] -> [B]."""
    return torch.zeros_like(rows.advantages, dtype=values.dtype).index_add(0, rows.row_of_item, values)


def _clamp(log_ratio: Tensor) -> tuple[Tensor, int]:
    clamped = int((log_ratio.detach().abs() > MAX_LOG_RATIO).sum())
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), clamped
