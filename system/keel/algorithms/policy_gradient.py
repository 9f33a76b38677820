"""Policy gradient: advantage x clipped ratio x truncated importance weight, a critic where there is one.

    reward   r_t = -beta (log pi - log ref)_t - alpha log pi_t, at the last token + score          (terms in the reward)
    A        of R = sum_t r_t within its group, or of the r_t that follow a token (returns, GAE)
             + tau A^H, EAPO's advantage of the entropy still to come
    loss     = reduce_t [ -min(rho A, clip(rho) A) w ] + c_V L_V + the regularizers that live in the loss
             + beta KL(mu, pi) at the tokens of largest covariance (KL-Cov); A = 0 at some of a band (Clip-Cov)

    rho = pi / pi_old, per token, per completion, or its geometric mean;  pi_old: the learner when the step began
    w   = min(pi_old / mu, cap), mu: the sampler's log-probs as stored; detached (truncated importance weight)

Published algorithms are settings of these: RLOO (2402.14740), REINFORCE, REINFORCE++ (2501.03262) with and without
baseline, PPO (1707.06347), GRPO (2402.03300), Dr. GRPO (2503.20783), GSPO (2507.18071), DAPO (2503.14476), SAFE
(2602.04651), EAPO (2407.18143). Recipes in docs/use/algorithms.md has the exact switches of each.
"""

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import schema, user_code
from keel.algorithms import advantages, critics, regularizers, token_covariance
from keel.algorithms.objective import Objective, finite
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config.covariance import CovarianceSettings
from keel.config.objective import CriticSettings, EntropyAdvantageSettings, PolicyGradientSettings
from keel.config.run import LearnerSpec
from keel.errors import ConfigError
from keel.text import one_line

_WHITENED = {"reinforce_pp": "population", "reinforce_pp_baseline": "population", "gae": "sample"}
_WHITENED |= {"value_baseline": "sample"}


class PolicyGradient(Objective):
    """`weigh` the whole step in numpy, then `loss` of each micro-batch in torch."""

    def __init__(self, settings: LearnerSpec) -> None:
        super().__init__(settings)
        assert isinstance(settings.objective, PolicyGradientSettings)
        self.config: PolicyGradientSettings = settings.objective
        if self.config.level == "sequence_mean":
            # a geometric mean has the slope of a token mean, and so have regularizers
            self.reduction = "sequence_mean"
        auto = _WHITENED.get(self.config.advantage, "none")
        self.whitened = auto if self.config.whiten == "auto" else self.config.whiten
        self.group = advantages.GROUP.get(self.config.advantage)
        self.user_advantage, self._advantage_setting = None, f"objective.advantage={self.config.advantage}"
        if ":" in self.config.advantage:
            self.user_advantage = user_code.import_symbol(self.config.advantage, "objective.advantage")
            self._probe(self.user_advantage)
        self.moments = critics.RunningMoments()
        self.heads = ["value"] * (self.config.advantage in ("gae", "value_baseline"))
        self.heads += ["entropy"] * bool(self.config.entropy_advantage and self.config.entropy_advantage.critic)
        self.popart = {head: critics.PopArt() for head in self.heads}
        self.measures |= {"values"} if self.heads else set()
        self.measures |= {"logprobs"} if self.config.covariance else set()

    def _probe(self, function: Any) -> None:
        """Call the user's advantage once, to refuse before Ray starts what would fail at the first step."""
        try:
            finite(function(np.array([0.0, 1.0, 0.5]), np.array([0, 0, 1])), 3, self._advantage_setting)
        except Exception as error:  # the user's code may raise anything; here it is bad input
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"{self._advantage_setting}: fails on 3 rewards of 2 prompts ({reason})") from None

    def weigh(self, batch: pa.RecordBatch, measured: Measured) -> Credit:
        """Advantages of all tokens of the step, regularizers that live in the reward included."""
        missing = self.needs - set(batch.schema.names)
        assert not missing, missing
        logprobs, lengths = schema.ragged(batch, "completion_logprobs")
        rewards, penalty, bonus = self.rewards(batch), self.penalty(batch, measured), self.bonus(batch, measured)
        scores = self.moments.normalize(rewards) if self.config.normalize_reward else rewards
        scores = scores + sum(self.row_terms(batch).values())
        parts = (scores, penalty, bonus, lengths)
        row_penalty, row_bonus = schema.row_sums(penalty, lengths), schema.row_sums(bonus, lengths)
        regularized = scores + row_bonus - row_penalty
        values = self._values(measured, len(logprobs))
        flat, targets = self._advantages(batch, parts, values)
        if self.config.entropy_advantage:
            flat = flat + self._entropy_advantage(batch, self.config.entropy_advantage, values, targets)
        metrics = {
            **self.reward_metrics(regularized, row_penalty, row_bonus, batch.column("ticket").to_numpy()),
            "advantage_std": float(flat.std()),
            "shaping_term": float(rewards.mean() - batch.column("reward").to_numpy(zero_copy_only=False).mean()),
            **self._judge_values(values, targets),
        }
        if self.whitened != "none":
            weighed = self.kl_strength * self.kl_in_reward * schema.row_sums(logprobs, lengths)
            size = advantages.magnitude(scores, weighed, row_penalty, row_bonus, *values.values())
            flat = self._whiten(flat, lengths, size)
        target_columns, old = self._normalized(targets, values)
        credit = Credit(flat, len(lengths), len(flat), metrics, {}, target_columns, old)
        covariance = self.config.covariance
        return _by_covariance(credit, batch, measured, covariance) if covariance else credit

    def _whiten(self, flat: np.ndarray, lengths: np.ndarray, size: float) -> np.ndarray:
        """Whitened over tokens where advantages differ between those of a completion, else over completions.

        One action has one vote: over tokens, long completions would decide what the mean of the step is.
        """
        entropy = self.config.entropy_advantage
        by_token = self.config.by_token or (entropy is not None and entropy.coefficient > 0)
        values = flat if by_token else flat[np.cumsum(lengths) - 1]
        white = advantages.whiten(values, ddof=1 if self.whitened == "sample" else 0, size=size)
        return white if by_token else np.repeat(white, lengths)

    def _advantages(
        self, batch: pa.RecordBatch, parts: tuple[np.ndarray, ...], values: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Advantage of every token before whitening, and what each value head should have said."""
        scores, penalty, bonus, lengths = parts
        tickets = batch.column("ticket").to_numpy()
        ends = np.cumsum(lengths) - 1
        if self.config.by_token:
            if self.config.advantage == "reinforce_pp_baseline":
                scores = advantages.by_ticket(advantages.group_mean, scores, tickets)
            rewards = bonus - penalty
            rewards[ends] += scores
            if self.config.advantage != "gae":
                return advantages.returns(rewards, lengths, self.config.discount), {}
            estimates = advantages.gae(rewards, values["value"], lengths, self.config.discount, self.config.gae_lambda)
            return estimates, {"value": estimates + values["value"]}
        kl = schema.row_sums(penalty, lengths)
        before = self.kl.order == "before_baseline"
        rows = scores + schema.row_sums(bonus, lengths) - (kl if before else 0.0)
        targets = {}
        if self.config.advantage == "value_baseline":
            starts = ends - lengths + 1
            targets["value"] = np.full(len(penalty), np.nan)
            targets["value"][starts] = rows
            rows = rows - values["value"][starts]
        elif self.user_advantage is not None:
            rows = finite(self.user_advantage(rows, tickets), len(rows), self._advantage_setting)
        elif self.group is not None:
            rows = advantages.by_ticket(self.group, rows, tickets)
        return np.repeat(rows - (0.0 if before else kl), lengths), targets

    def _entropy_advantage(
        self,
        batch: pa.RecordBatch,
        config: EntropyAdvantageSettings,
        values: dict[str, np.ndarray],
        targets: dict[str, np.ndarray],
    ) -> np.ndarray:
        """tau A^H: GAE of -log pi under the sampler with its own discount and trace, or its critic-free form."""
        logprobs, lengths = schema.ragged(batch, "completion_logprobs")
        surprise = -logprobs.astype(np.float64)
        if not config.critic:
            to_come, tickets = advantages.returns(surprise, lengths, config.discount), batch.column("ticket").to_numpy()
            return config.coefficient * advantages.center_by_position(to_come, lengths, tickets)
        estimates = advantages.gae(surprise, values["entropy"], lengths, config.discount, config.gae_lambda)
        targets["entropy"] = estimates + values["entropy"]
        return config.coefficient * estimates

    def _values(self, measured: Measured, num_tokens: int) -> dict[str, np.ndarray]:
        """Each head's values of the step in the unit of its targets."""
        if not self.heads:
            return {}
        assert measured.values is not None and measured.values.shape == (num_tokens, len(self.heads))
        raw = measured.values.astype(np.float64)
        return {head: self.popart[head].value(raw[:, column]) for column, head in enumerate(self.heads)}

    def _normalized(
        self, targets: dict[str, np.ndarray], values: dict[str, np.ndarray]
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Targets and old values [tokens, K] in the unit the heads are trained in, after PopArt saw the targets."""
        if not targets:
            return None, None
        config = self.config.critic
        assert config is not None
        for head, art in self.popart.items():
            if config.popart:
                art.update(targets[head][np.isfinite(targets[head])], config.popart_rate)
        arts = [(head, self.popart[head]) for head in self.heads]  # without PopArt mean 0, deviation 1
        units = [
            np.stack([(x[head] - art.mean) / art.deviation for head, art in arts], axis=1) for x in (targets, values)
        ]
        return units[0], units[1]

    def _judge_values(self, values: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> dict[str, Any]:
        metrics: dict[str, Any] = defaultdict(dict)
        for head, target in targets.items():
            known = np.isfinite(target)
            metrics["explained_variance"][head] = critics.explained_variance(values[head][known], target[known])
            metrics["value_mean"][head] = float(values[head][known].mean())
        return metrics

    def surrogate(self, rows: Rows, outputs: Outputs, credit: Credit) -> tuple[Tensor, dict[str, float]]:
        logprobs = outputs.logprobs
        old = logprobs.detach() if rows.old is None else rows.old
        assert rows.sampler is not None
        weight, clamped_weights = self._importance_weight(old - rows.sampler, rows)
        terms, clipped, clamped = self._terms_of(logprobs - old, weight, rows)
        num_terms = credit.num_tokens if self.config.level == "token" else credit.num_rows
        loss = self.reduce(terms, rows, credit) if self.config.level == "token" else terms.sum() / credit.num_rows
        sums = {
            "policy_loss": loss.item(),
            "clip_ratio": clipped / num_terms,
            "clamped_log_ratios": float(clamped + clamped_weights),
            "importance_weight": weight.sum().item() / num_terms,
            "truncated_weight_ratio": (weight >= self.config.correction_cap).sum().item() / num_terms,
        }
        if rows.penalized is not None:
            loss = loss + self._kl_to_sampler(rows, logprobs, credit, sums)
        if self.config.critic:
            value_terms = self._value_terms(self.config.critic, rows, outputs, credit)
            loss = loss + torch.stack(list(value_terms.values())).sum()
            sums |= {f"critic_loss/{head}": term.item() for head, term in value_terms.items()}
        return loss, sums

    def _kl_to_sampler(self, rows: Rows, logprobs: Tensor, credit: Credit, sums: dict[str, float]) -> Tensor:
        """KL-Cov's share of the loss: beta (pi/mu - 1 - log pi/mu), KL(mu, pi) on samples of mu, at its tokens."""
        assert rows.penalized is not None and rows.sampler is not None and self.config.covariance is not None
        tokens = rows.penalized * regularizers.kl_k3(rows.sampler, logprobs)
        term = self.config.covariance.coefficient * self.reduce(tokens, rows, credit)
        sums["objective_term/kl_cov"] = term.item()
        return term

    def _value_terms(self, config: CriticSettings, rows: Rows, outputs: Outputs, credit: Credit) -> dict[str, Tensor]:
        """Each head's share of its loss, coefficient included, over all its targets of the step."""
        assert outputs.values is not None and rows.targets is not None and rows.old_values is not None
        assert credit.targets is not None
        terms = {}
        for column, head in enumerate(self.heads):
            art, target = self.popart[head], rows.targets[:, column]
            known = target.isfinite()
            raw = outputs.values[known, column]
            predicted = art.scale * raw + art.shift if config.popart else raw
            old = rows.old_values[known, column]
            errors = critics.value_loss(predicted, old, target[known], config.loss, config.clip, config.clipped)
            weight = config.coefficient * (config.entropy_coefficient if head == "entropy" else 1.0)
            terms[head] = weight * errors.sum() / int(np.isfinite(credit.targets[:, column]).sum())
        return terms

    def _importance_weight(self, log_ratio: Tensor, rows: Rows) -> tuple[Tensor, int]:
        """min(pi_old / mu, cap) for every term of the surrogate, and how many exponents were clamped."""
        by_completion = self.config.level != "token"
        if self.config.correction == "none":
            return torch.ones_like(rows.lengths if by_completion else log_ratio), 0
        per_row = self.config.correction == "sequence"
        exponent, clamped = regularizers.clamp(rows.sum_by_row(log_ratio) if per_row else log_ratio)
        weight = exponent.exp().clamp(max=self.config.correction_cap)
        return (weight[rows.row_of_item] if per_row and not by_completion else weight), clamped

    def _terms_of(self, log_ratio: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, int, int]:
        """-min(rho A, clip(rho) A) w of every term ([N] tokens or [B] rows); clipped and clamped terms counted."""
        credit = rows.advantages
        if self.config.level != "token":
            credit, log_ratio = credit[rows.first_items()], rows.sum_by_row(log_ratio)
        if self.config.level == "sequence_mean":
            log_ratio = log_ratio / rows.lengths
        exponent, clamped = regularizers.clamp(log_ratio)
        ratio = exponent.exp()
        low, high = self.config.clip_low, self.config.clip_high
        bounded = ratio.clamp(1 - low if low else None, 1 + high if high else None) if low or high else ratio
        objective = torch.minimum(ratio * credit, bounded * credit)
        clipped = int((bounded * credit < ratio * credit).sum())
        return -objective * weight, clipped, clamped

    def coefficients(self) -> dict[str, Any]:
        values: dict[str, Any] = super().coefficients()
        if self.config.normalize_reward:
            state = self.moments
            values |= {"normalizer_mean": state.mean, "normalizer_std": state.deviation}
        if self.config.critic and self.config.critic.popart:
            values["popart_mean"] = {head: art.mean for head, art in self.popart.items()}
            values["popart_std"] = {head: art.deviation for head, art in self.popart.items()}
        return values

    def state(self) -> dict[str, Any]:
        popart = {head: dataclasses.asdict(art) for head, art in self.popart.items()}
        return {**super().state(), "moments": dataclasses.asdict(self.moments), "popart": popart}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.moments = critics.RunningMoments(**state["moments"])
        self.popart = {head: critics.PopArt(**numbers) for head, numbers in state["popart"].items()}


def _by_covariance(credit: Credit, batch: pa.RecordBatch, measured: Measured, config: CovarianceSettings) -> Credit:
    """The credit of the step with KL-Cov's tokens marked, or Clip-Cov's without an advantage.

    Covariances are those of the advantages as trained on and of the policy when the step began, in all its updates.
    """
    assert measured.logprobs is not None
    covariance = token_covariance.covariances(measured.logprobs, credit.advantages)
    lengths = schema.completion_lengths(batch)
    order = token_covariance.draws(batch.column("seed").to_numpy(), lengths, measured.version)
    selected = token_covariance.selected(covariance, order, config)
    metrics = {**credit.metrics, "covariance_selected_ratio": float(selected.mean())}
    if config.form == "clip_cov":
        cut = np.where(selected, 0.0, credit.advantages)
        return dataclasses.replace(credit, advantages=cut, metrics=metrics)
    return dataclasses.replace(credit, penalized=selected, metrics=metrics)
