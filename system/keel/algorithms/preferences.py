"""The DPO family and SimPO, on pairs or rankings of one prompt's completions, sampled just now or stored.

    S = log pi(y|x), S_ref the same under the reference, A = S/|y|;  w chosen, l rejected
    logit u = beta (score_w - score_l) - gamma [+ beta (1/|w| - 1/|l|)] [+ c (Gamma_w - Gamma_l)]

A loss of sequence log-probs is a policy gradient with advantage -dL/dS: `weigh` takes the learner's S of the whole
step, differentiates the loss by them once, alike on every rank, and the model is trained by sum_t (dL/dS) log pi_t.
So the two sides of a pair may lie in different micro-batches or on different ranks, and memory is that of one.

SimPO (2405.14734) is maximum-entropy RL (2509.20265) with temperature beta/|y|; the optimum has a length term,
r_w - r_l = beta (A_w - A_l) + beta (1/|w| - 1/|l|), which SimPO omits and `exact_length_margin` puts back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from keel import schema
from keel.algorithms import pair_selection, reward_ensembles
from keel.algorithms.advantages import vary
from keel.algorithms.objective import Objective
from keel.algorithms.pair_selection import Candidates, Pairs
from keel.algorithms.types import Credit, Measured
from keel.config.objective import PreferenceSettings
from keel.config.run import LearnerSpec


@dataclass(frozen=True)
class Sequences:
    """Sequence log-probs of the step's rows and what losses read beside them, float64."""

    policy: Tensor
    """[rows] S, nats, with gradient."""
    reference: Tensor
    """[rows] S_ref, nats; zeros where no loss reads it."""
    lengths: Tensor
    """[rows] tokens, end token included."""
    uncertainty: Tensor
    """[rows] Gamma, the reward ensemble's deviation; zeros without one."""


Score = Callable[[Sequences], Tensor]


def log_ratio(rows: Sequences) -> Tensor:
    """h = S - S_ref, summed over tokens (DPO, 2305.18290). [rows]."""
    return rows.policy - rows.reference


def chi_squared_ratio(rows: Sequences) -> Tensor:
    """phi(rho) = rho + log rho of rho = exp(h): chi-squared and KL together, chi-PO (2407.13399). [rows].

    The exponent is cut at 20 nats. The paper also clips the logit to twice the range of its rewards, for its proof.
    """
    h = log_ratio(rows)
    return h.clamp(max=20.0).exp() + h


def mean_log_ratio(rows: Sequences) -> Tensor:
    """(S - S_ref) / |y|: IPO as TRL has it; its tau means something else than with sums. [rows]."""
    return log_ratio(rows) / rows.lengths


def mean_logprob(rows: Sequences) -> Tensor:
    """A = S / |y|: SimPO. [rows]."""
    return rows.policy / rows.lengths


def logprob(rows: Sequences) -> Tensor:
    """S: CPO (2401.08417), DPO with a uniform reference. [rows]."""
    return rows.policy


def log_odds(rows: Sequences) -> Tensor:
    """log p / (1 - p) of p = exp(A): ORPO (2403.07691). [rows]."""
    mean = mean_logprob(rows)
    return mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7)))


def sigmoid_loss(logits: Tensor, config: PreferenceSettings) -> Tensor:
    """-(1 - e) log sigma(u) - e log sigma(-u), e: labels taken as wrong (cDPO). [P] -> [P]."""
    smoothing = config.label_smoothing
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def hinge_loss(logits: Tensor, config: PreferenceSettings) -> Tensor:
    """max(0, 1 - u). [P] -> [P]."""
    return torch.relu(1 - logits)


def square_loss(logits: Tensor, config: PreferenceSettings) -> Tensor:
    """(h - 1/(2 tau))^2 with h = u / tau: IPO (2310.12036), tau is beta. [P] -> [P]."""
    return (logits / config.beta - 1 / (2 * config.beta)).square()


def odds_loss(logits: Tensor, config: PreferenceSettings) -> Tensor:
    """-beta log sigma(log odds difference): ORPO's second term; beta is its weight, not a temperature. [P] -> [P]."""
    return -config.beta * logsigmoid(logits / config.beta)


PAIR_LOSSES: dict[str, tuple[Score, Callable[[Tensor, PreferenceSettings], Tensor]]] = {
    "dpo": (log_ratio, sigmoid_loss),
    "dpo_hinge": (log_ratio, hinge_loss),
    "chi_po": (chi_squared_ratio, sigmoid_loss),
    "ipo_sum": (log_ratio, square_loss),
    "ipo_average": (mean_log_ratio, square_loss),
    "simpo": (mean_logprob, sigmoid_loss),
    "simpo_hinge": (mean_logprob, hinge_loss),
    "cpo": (logprob, sigmoid_loss),
    "orpo": (log_odds, odds_loss),
}
RANKING_SCORES: dict[str, Score] = {"dpo_plackett_luce": log_ratio, "simpo_plackett_luce": mean_logprob}


_AVERAGES = ("ipo_average", "simpo", "simpo_hinge", "simpo_plackett_luce", "orpo")
"""Losses of log-probs per token: regularizers beside them are per token, too."""


def pair_logits(rows: Sequences, chosen: Tensor, rejected: Tensor, config: PreferenceSettings) -> Tensor:
    """u of each pair [P]; pessimism as in pessimistic DPO: + c Gamma_w - c Gamma_l (2312.11456)."""
    score = PAIR_LOSSES[config.loss][0](rows)
    inverse = 1 / rows.lengths
    u = config.beta * (score[chosen] - score[rejected]) - config.target_margin
    if config.exact_length_margin:
        u = u + config.beta * (inverse[chosen] - inverse[rejected])
    return u + config.pessimism * (rows.uncertainty[chosen] - rows.uncertainty[rejected])


def ranking_loss(scores: Tensor, margin: float) -> Tensor:
    """Plackett-Luce: -sum_k [u_k - margin - logsumexp(u_k - margin, u_j: j > k)], best first. [K] -> scalar.

    K = 2 without margin is Bradley-Terry, with margin SimPO.
    """
    total = scores.new_zeros(())
    for k in range(len(scores) - 1):
        head = scores[k] - margin
        total = total - head + torch.logsumexp(torch.cat([head[None], scores[k + 1 :]]), 0)
    return total


def kto_losses(rows: Sequences, chosen: Tensor, rejected: Tensor, config: PreferenceSettings) -> Tensor:
    """KTO (2402.01306): 1 - sigma(beta (h - z)) for chosen, 1 - sigma(beta (z - h)) for rejected, weights 1. [2P].

    z = max(0, mean h over the step), detached: an estimate of KL(pi, ref) on the step's own samples, where the paper
    pairs prompts with other prompts' completions.
    """
    h = log_ratio(rows)
    z = h.detach().mean().clamp(min=0)
    return 1 - torch.cat([torch.sigmoid(config.beta * (h[chosen] - z)), torch.sigmoid(config.beta * (z - h[rejected]))])


def likelihood_loss(rows: Sequences, chosen: Tensor, form: str) -> Tensor:
    """-S or -A of the chosen completions [P]: RPO's adversarial regularizer (2405.16436), CPO's and ORPO's NLL."""
    return -(rows.policy if form == "sum" else mean_logprob(rows))[chosen]


class Preference(Objective):
    """Losses of pairs or rankings of each prompt's completions, as set by `objective.loss` and `objective.pairs`."""

    measures = frozenset({"logprobs"})
    weighs_every_epoch = True
    reads_old = False

    def __init__(self, settings: LearnerSpec) -> None:
        super().__init__(settings)
        assert isinstance(settings.objective, PreferenceSettings)
        self.config: PreferenceSettings = settings.objective
        if self.config.loss in _AVERAGES:
            self.reduction = "sequence_mean"
        self._members = {f"reward_{reward.name}": reward.weight for reward in settings.train_rewards}

    def weigh(self, batch: pa.RecordBatch, measured: Measured) -> Credit:
        assert measured.logprobs is not None
        lengths = schema.completion_lengths(batch)
        candidates = self._candidates(batch, lengths)
        rows = self._sequences(batch, measured.logprobs, candidates)
        pairs = pair_selection.select(self.config.pairs, candidates)
        loss, metrics = self._loss(rows, pairs, candidates)
        slopes = np.zeros(len(lengths))
        if loss.requires_grad:
            slopes = torch.autograd.grad(loss, rows.policy)[0].numpy()
        settled = pairs.metrics.get("settled_ratio", 0.0)
        stop = self.config.pairs.stop_settled_ratio
        return Credit(
            advantages=np.repeat(-slopes * len(lengths), lengths),
            num_rows=len(lengths),
            num_tokens=int(lengths.sum()),
            metrics={**pairs.metrics, "preference_loss": float(loss.detach()), **metrics},
            counts={"pairs_dropped_total": {reason: float(count) for reason, count in pairs.dropped.items()}},
            finished=stop is not None and settled >= stop,
        )

    def assess(self, batch: pa.RecordBatch, measured: Measured) -> dict[str, float]:
        metrics = self.weigh(batch, measured).metrics
        return {"loss": metrics["preference_loss"], **metrics}

    def _candidates(self, batch: pa.RecordBatch, lengths: np.ndarray) -> Candidates:
        rewards = self.rewards(batch)
        judge = f"reward_{self.config.pairs.judge}" if self.config.pairs.judge else None
        tickets = batch.column("ticket").to_numpy()

        def column(name: str) -> np.ndarray:
            return batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)

        known = [name for name in self._members if name in batch.schema.names]
        members = np.stack([self._members[name] * column(name) for name in known] or [rewards])
        return Candidates(
            tickets=tickets,
            seeds=batch.column("seed").to_numpy() if "seed" in batch.schema.names else tickets,
            rewards=rewards,
            judged=column(judge) if judge else rewards,
            lengths=lengths,
            finished=schema.finished(batch),
            members=reward_ensembles.center(members, tickets),
        )

    def _sequences(self, batch: pa.RecordBatch, logprobs: np.ndarray, seen: Candidates) -> Sequences:
        policy = torch.from_numpy(schema.row_sums(logprobs, seen.lengths)).requires_grad_()
        reference = np.zeros(len(seen.lengths))
        if "reference_logprobs" in batch.schema.names:
            reference = schema.row_sums(schema.ragged(batch, "reference_logprobs")[0], seen.lengths)
        lengths, deviation = torch.from_numpy(seen.lengths.astype(np.float64)), seen.members.std(0)
        return Sequences(policy, torch.from_numpy(reference), lengths, torch.from_numpy(deviation))

    def _loss(self, rows: Sequences, pairs: Pairs, seen: Candidates) -> tuple[Tensor, dict[str, float]]:
        """Mean loss over pairs (over prompts for rankings), and what DPO runs are watched by."""
        if len(pairs.chosen) == 0:
            return torch.zeros(()), {}
        config = self.config
        chosen, rejected = torch.from_numpy(pairs.chosen), torch.from_numpy(pairs.rejected)
        if config.loss in RANKING_SCORES:
            loss = self._ranking(rows, seen)
        elif config.loss == "kto":
            loss = kto_losses(rows, chosen, rejected, config).mean()
        else:
            loss = PAIR_LOSSES[config.loss][1](pair_logits(rows, chosen, rejected, config), config).mean()
        if config.likelihood_coefficient:
            loss = loss + config.likelihood_coefficient * likelihood_loss(rows, chosen, config.likelihood).mean()
        return loss, self._watched(rows, chosen, rejected)

    def _ranking(self, rows: Sequences, seen: Candidates) -> Tensor:
        config = self.config
        scores = config.beta * RANKING_SCORES[config.loss](rows)
        if config.exact_length_margin:
            scores = scores + config.beta / rows.lengths
        scores = scores + config.pessimism * rows.uncertainty
        losses = []
        for ticket in np.unique(seen.tickets):
            judged = np.flatnonzero((seen.tickets == ticket) & np.isfinite(seen.judged))
            ranked: list[int] = []  # of rewards no further apart than min_margin only the first
            for row in judged[np.argsort(-seen.judged[judged], kind="stable")]:
                two = seen.judged[[*ranked[-1:], row]]
                if not ranked or (two[0] - two[1] > config.pairs.min_margin and vary(two)):
                    ranked.append(int(row))
            if len(ranked) > 1:
                losses.append(ranking_loss(scores[torch.tensor(ranked)], config.target_margin))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _watched(self, rows: Sequences, chosen: Tensor, rejected: Tensor) -> dict[str, float]:
        scores = RANKING_SCORES | {loss: score for loss, (score, _) in PAIR_LOSSES.items()}
        implicit, ratio = self.config.beta * scores.get(self.config.loss, log_ratio)(rows), log_ratio(rows)
        won, lost = implicit[chosen], implicit[rejected]
        return {
            "chosen_implicit_reward": float(won.mean()),
            "rejected_implicit_reward": float(lost.mean()),
            "implicit_margin": float((won - lost).mean()),
            "preference_accuracy_ratio": float((won > lost).double().mean()),
            "chosen_logprob_nats": float(rows.policy[chosen].mean()),
            "rejected_logprob_nats": float(rows.policy[rejected].mean()),
            "chosen_log_ratio_nats": float(ratio[chosen].mean()),
            "rejected_log_ratio_nats": float(ratio[rejected].mean()),
        }
