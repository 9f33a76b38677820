"""What every objective is: credit for the whole step in numpy, then a loss for each micro-batch in torch.

    measured   learner's log-probs and values of the whole step, if `measures` asks for them   (policy_learner.py)
    credit     = weigh(batch, measured)      alike on every rank: advantages, targets, denominators
    loss       = surrogate(rows, outputs, credit) + KL and entropy terms that live in the loss
    adapt      after the step: coefficients move

Your own objective derives from `Objective` and overrides `weigh` and `surrogate`. Shares of the loss add up over
micro-batches and ranks because every denominator is one of the whole step. Shapes as in `types.py`. The KL that the
reward pays (k1) is `penalty`; estimators of a KL in the loss are in `regularizers.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import schema, user_code
from keel.algorithms import advantages, coefficients, regularizers
from keel.algorithms.coefficients import Observation
from keel.algorithms.reward_shaping import preference_as_reward, reference_scores, shape
from keel.algorithms.types import Credit, LossTerms, Measured, Outputs, Rows, VocabularyTerm
from keel.config.run import LearnerSpec


class Objective:
    """Regularizers, their coefficients, and the frame into which every kind of objective puts its surrogate."""

    measures: frozenset[str] = frozenset()
    """What `weigh` reads of Measured: logprobs, values."""
    weighs_every_epoch = False
    """Credit depends on the current policy, so every update of a step computes it again."""
    reads_old = True
    """Several updates of a step need the log-probs it began with (`Rows.old`)."""
    vocabulary: VocabularyTerm | None = None
    kl_multiplier = 1.0
    """Factor on the KL coefficient, beside its controller's: an action of the guard. `multiply_kl` sets it."""
    heads: Sequence[str] = ()
    """Names of the critic's outputs, K of them."""

    def __init__(self, settings: LearnerSpec) -> None:
        self.settings = settings
        self.kl, self.entropy = settings.active_kl, settings.regularizer.entropy
        self.max_tokens = settings.sampling.max_tokens
        self.needs = frozenset(settings.needed_columns())
        self.epochs: int = settings.objective.epochs
        self.reduction: str = getattr(settings.objective, "reduction", "sequence_sum")
        start = settings.regularizer.kl.coefficient
        self.kl_coefficient = coefficients.coefficient(self.kl.controller, start, sign=1.0)
        start = self.entropy.coefficient
        self.entropy_coefficient = coefficients.coefficient(self.entropy.controller, start, sign=-1.0)
        terms = settings.regularizer.terms
        self._terms = [(t, user_code.import_symbol(t.source, f"regularizer.terms.{t.name}.source")) for t in terms]
        source = settings.regularizer.answer_entropy.extract
        setting = "regularizer.answer_entropy.extract"
        self._answer_in: Callable[[str], str] = user_code.import_symbol(source, setting) if source else str.strip
        if self.kl.exact:
            self.vocabulary = regularizers.ExactKL(self.kl.token_share)
        elif self.entropy.clamped:
            self.vocabulary = regularizers.ClampedEntropy(self.entropy.top_share)
        if self.entropy.in_reward and self.entropy.importance_weighted:
            self.measures |= {"logprobs"}
        self.multiply_kl(1.0)

    def multiply_kl(self, factor: float) -> None:
        """Take the guard's factor on the KL coefficient. One that is raised from 0 asks for what its term reads."""
        self.kl_multiplier = factor
        if self.kl_in_reward and self.kl.importance_weighted:
            self.measures |= {"logprobs"}

    @property
    def kl_strength(self) -> float:
        """The KL coefficient in force."""
        return self.settings.raised_kl(self.kl_coefficient.value, self.kl_multiplier)

    @property
    def kl_in_reward(self) -> bool:
        """Whether the reward pays a KL now; where only the guard raises its coefficient from 0, after that."""
        return self.kl.in_reward and self._kl_began

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL now."""
        return self.kl.in_loss and self._kl_began

    @property
    def _kl_began(self) -> bool:
        return self.settings.regularizer.kl.coefficient > 0 or self.kl_multiplier > 1

    @property
    def needs_vocabulary(self) -> bool:
        """Whether the vocabulary term is computed at all: an exact KL is not before the guard raises it from 0."""
        return self.kl_in_loss or not self.kl.exact

    @property
    def needs_entropy(self) -> bool:
        """Whether the full-vocabulary entropy is computed at all."""
        return self.entropy.monitor or (self.entropy.in_loss and not self.entropy.clamped)

    def weigh(self, batch: pa.RecordBatch, measured: Measured) -> Credit:
        """Advantages of all tokens of the step, the same on every rank."""
        raise NotImplementedError

    def credited(self, batch: pa.RecordBatch, measured: Measured) -> Credit:
        """Add what all objectives share to `weigh`. Raises ValueError unless every token has a finite advantage."""
        credit = self.weigh(batch, measured).checked(int(schema.completion_lengths(batch).sum()))
        row_terms = {name: float(values.mean()) for name, values in self.row_terms(batch).items()}
        terms = {"objective_term": {**credit.metrics.get("objective_term", {}), **row_terms}} if row_terms else {}
        return dataclasses.replace(
            credit,
            selected=self.selected(batch, measured.version),
            metrics={**credit.metrics, **terms},
            num_sampled_tokens=int(schema.completion_lengths(batch)[schema.sampled(batch)].sum()),
        )

    def assess(self, batch: pa.RecordBatch, measured: Measured) -> dict[str, float]:
        """Numbers of held-out rows; `loss` is what early stopping watches: -log pi a token, nats."""
        assert measured.logprobs is not None
        return {"loss": -float(measured.logprobs.mean())}

    def surrogate(self, rows: Rows, outputs: Outputs, credit: Credit) -> tuple[Tensor, dict[str, float]]:
        """The micro-batch's share of the loss without regularizers, and shares of further metrics.

        Here: a weighted likelihood, -sum_t A_t log pi_t / rows, for objectives whose whole idea is in the weights.
        """
        loss = -(rows.advantages * outputs.logprobs).sum() / credit.num_rows
        return loss, {"policy_loss": loss.item()}

    def loss(self, rows: Rows, outputs: Outputs, credit: Credit) -> LossTerms:
        """The micro-batch's share of the loss: surrogate, then every regularizer under its own name."""
        total, sums = self.surrogate(rows, outputs, credit)
        if self.kl_in_loss:
            tokens = self._kl_tokens(rows, outputs)
            total = total + self.kl_strength * self.reduce(tokens, rows, credit)
            for name, part in self._apart("kl_loss", "log_ratio_loss", tokens, rows):
                nats = self.reduce(part, rows, credit).item()
                sums |= {name: self.kl_strength * nats, f"{name}_nats": nats}
        if outputs.entropies is not None:
            sums |= self._entropies(outputs.entropies, rows, credit)
        if self.entropy.in_loss:
            tokens = outputs.vocabulary if self.entropy.clamped else outputs.entropies
            assert tokens is not None
            mean = tokens.sum() / credit.num_tokens
            total = total - self.entropy_coefficient.value * mean
            sums["entropy_loss"] = -self.entropy_coefficient.value * mean.item()
            if self.entropy.clamped:
                sums |= self._entropies(tokens, rows, credit, "clamped_")
        for term, function in self._terms:
            if term.placement == "loss":
                values = function(rows=rows, outputs=outputs)
                if values.shape != outputs.logprobs.shape:
                    shapes = f"{tuple(values.shape)}; expected {tuple(outputs.logprobs.shape)}, one number a token"
                    raise ValueError(f"regularizer term {term.name}: shape {shapes}")
                share = term.coefficient * self.reduce(values, rows, credit)
                total = total + share
                sums[f"objective_term/{term.name}"] = share.item()
        return LossTerms(total, sums | {"loss": total.item()})

    def _apart(self, name: str, name_of_stored: str, tokens: Tensor, rows: Rows) -> list[tuple[str, Tensor]]:
        """A metric's values on sampled completions and, under its other name, on stored ones, each [N], detached.

        Which of both there are is a matter of the configuration, so all ranks and micro-batches agree.
        """
        tokens, ratio = tokens.detach(), self.settings.sampling.stored_ratio
        if ratio in (0, 1):
            return [(name_of_stored if ratio else name, tokens)]
        stored = torch.zeros_like(tokens) if rows.stored is None else rows.stored[rows.row_of_item].to(tokens)
        return [(name, tokens * (1 - stored)), (name_of_stored, tokens * stored)]

    def _entropies(self, entropies: Tensor, rows: Rows, credit: Credit, prefix: str = "") -> dict[str, float]:
        """Entropy as a mean over sampled tokens, and over stored ones under a name of its own."""
        names = (f"{prefix}policy_entropy_nats", f"{prefix}teacher_forced_entropy_nats")
        sampled = credit.num_tokens if credit.num_sampled_tokens is None else credit.num_sampled_tokens
        counts = dict(zip(names, (sampled, credit.num_tokens - sampled), strict=True))
        if self.settings.sampling.stored_ratio == 1:
            counts = dict.fromkeys(names, credit.num_tokens)
        parts = self._apart(*names, entropies, rows)
        return {name: part.sum().item() / counts[name] for name, part in parts if counts[name]}

    def _kl_tokens(self, rows: Rows, outputs: Outputs) -> Tensor:
        if self.kl.exact:
            assert outputs.vocabulary is not None
            return outputs.vocabulary
        assert rows.reference is not None
        if self.kl.importance_weighted:
            assert rows.sampler is not None
            cap = getattr(self.settings.objective, "correction_cap", regularizers.MAX_WEIGHT)
            return regularizers.weighted_kl(self.kl.estimator, outputs.logprobs, rows.reference, rows.sampler, cap)
        return regularizers.KL_LOSSES[self.kl.estimator](outputs.logprobs, rows.reference)

    def reduce(self, terms: Tensor, rows: Rows, credit: Credit) -> Tensor:
        """Sum of terms [N] divided by counts of the whole step, as `reduction` says.

        Surrogate and regularizers weigh a token alike, so a coefficient means the same at every length.
        """
        match self.reduction:
            case "sequence_mean":
                return (terms / rows.lengths[rows.row_of_item]).sum() / credit.num_rows
            case "token_mean":
                return terms.sum() / credit.num_tokens
            case "constant":
                return terms.sum() / (credit.num_rows * self.max_tokens)
        return terms.sum() / credit.num_rows

    def visible(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Select the columns an objective may read: an objective that could read a monitor would hack it, too."""
        allowed = {*schema.PROMPT.names, *schema.GENERATE.names, *schema.REFERENCE.names, *schema.SCORE.names}
        for reward in self.settings.rewards:
            if reward.role != "monitor":
                allowed |= set(schema.reward_columns(reward.name))
        allowed -= {f"reward_{reward.name}" for reward in self.settings.rewards if reward.role == "monitor"}
        return batch.select([name for name in batch.schema.names if name in allowed])

    def rewards(self, batch: pa.RecordBatch) -> np.ndarray:
        """Training reward of each row after shaping, float64 [rows]."""
        raw = batch.column("reward").to_numpy(zero_copy_only=False).astype(np.float64)
        config = self.settings.shaping
        if config.reference_scores is not None:
            columns = batch.column("prompt_columns").to_pylist()
            raw = preference_as_reward(raw, reference_scores(columns, config.reference_scores))
        return shape(raw, schema.completion_lengths(batch), schema.finished(batch), self.max_tokens, config)

    def penalty(self, batch: pa.RecordBatch, measured: Measured) -> np.ndarray:
        """KL term of the reward at each token: coefficient * (log pi - log ref), float64 [tokens]; 0 where none is.

        importance_weighted: with the learner's log-probs in place of the sampler's, as stale samples need.
        """
        logprobs, _ = self._logprobs(batch, measured, self.kl.importance_weighted)
        if not self.kl_in_reward:
            return np.zeros(len(logprobs))
        reference, _ = schema.ragged(batch, "reference_logprobs")
        return self.kl_strength * (logprobs.astype(np.float64) - reference)

    def bonus(self, batch: pa.RecordBatch, measured: Measured) -> np.ndarray:
        """Entropy term of the reward at each token, float64 [tokens]; 0 where none is."""
        logprobs, lengths = self._logprobs(batch, measured, self.entropy.importance_weighted)
        if not self.entropy.in_reward:
            return np.zeros(len(logprobs))
        return self.entropy_coefficient.value * regularizers.entropy_reward(self.entropy.form, logprobs, lengths)

    def _logprobs(self, batch: pa.RecordBatch, measured: Measured, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
        """Flat log-probs and lengths: the sampler's, or the learner's for an importance-weighted term."""
        logprobs, lengths = schema.ragged(batch, "completion_logprobs")
        return (measured.logprobs if weighted and measured.logprobs is not None else logprobs), lengths

    def row_terms(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Terms of a completion's reward by name: chi-squared, answers, the user's, times coefficient; [rows]."""
        terms = {}
        config = self.settings.regularizer.chi_squared
        if config.coefficient > 0:
            logprobs, lengths = schema.ragged(batch, "completion_logprobs")
            reference, _ = schema.ragged(batch, "reference_logprobs")
            log_ratios = regularizers.sequence_kl(logprobs, reference, lengths)
            penalty = regularizers.chi_squared_penalty(log_ratios, config.max_ratio, config.root)
            terms["chi_squared"] = -config.coefficient * penalty
        if strength := self.settings.regularizer.answer_entropy.coefficient:
            answers = [self._answer(text) for text in batch.column("completion").to_pylist()]
            agreement = regularizers.answer_agreement(answers, batch.column("ticket").to_numpy())
            terms["answer_entropy"] = -strength * agreement
        for term, function in self._terms:
            if term.placement == "reward":
                values = finite(function(batch), batch.num_rows, f"regularizer term {term.name}")
                terms[term.name] = term.coefficient * values
        return terms

    def _answer(self, text: str) -> str:
        """The final answer in a completion. Raises ValueError where the user's function returns no string."""
        answer = self._answer_in(text)
        if not isinstance(answer, str):
            raise ValueError(f"regularizer.answer_entropy.extract: {answer!r} returned; expected a string for any text")
        return answer

    def regularized_rewards(self, batch: pa.RecordBatch, measured: Measured) -> np.ndarray:
        """Reward of each row with every regularizer that lives in it: KL, entropy, row terms. float64 [rows]."""
        by_token = self.bonus(batch, measured) - self.penalty(batch, measured)
        rows = schema.row_sums(by_token, schema.completion_lengths(batch))
        return self.rewards(batch) + rows + sum(self.row_terms(batch).values())

    @staticmethod
    def reward_metrics(
        regularized: np.ndarray, kl: np.ndarray, bonus: np.ndarray, tickets: np.ndarray
    ) -> dict[str, float]:
        """What regularizers did to the reward of the step, from the regularized reward and its terms, each [rows]."""
        return {
            "regularized_reward": float(regularized.mean()),
            "reward_kl_term": float(-kl.mean()),
            "reward_entropy_term": float(bonus.mean()),
            "uniform_groups": float(advantages.num_uniform_groups(regularized, tickets)),
        }

    def selected(self, batch: pa.RecordBatch, version: int) -> np.ndarray | None:
        """bool [tokens] where the vocabulary term is computed; None: everywhere."""
        if not isinstance(self.vocabulary, regularizers.ExactKL):
            return None
        seeds = batch.column("seed").to_numpy()
        return self.vocabulary.select(seeds, schema.completion_lengths(batch), version)

    def adapt(self, batch: pa.RecordBatch, sums: Mapping[str, float] = MappingProxyType({})) -> None:
        """Move the coefficients by what the step says. Called once a step, with the same arguments everywhere.

        batch: the step's samples; sums: what `loss` told of them, over all ranks, at the step's first update.
        Stored completions move nothing: what the policy thinks of them is neither its entropy nor its KL.
        """
        sampled = schema.sampled(batch)
        if not sampled.any():
            return
        batch = batch if sampled.all() else schema.select(batch, sampled)
        logprobs, lengths = schema.ragged(batch, "completion_logprobs")
        surprise = -schema.row_sums(logprobs, lengths)
        kl = np.zeros(len(lengths))
        if "reference_logprobs" in batch.schema.names:
            kl = regularizers.sequence_kl(logprobs, schema.ragged(batch, "reference_logprobs")[0], lengths)
        tokens, reward = float(lengths.sum()), float(self.rewards(batch).mean())
        entropy = surprise.mean() if self.entropy.form == "sequence_sum" else (surprise / lengths).mean()
        entropy = sums["clamped_policy_entropy_nats"] if self.entropy.clamped else entropy
        shared = (len(lengths), float(kl.sum() / tokens), float(surprise.sum() / tokens), reward)
        self.kl_coefficient.update(Observation(float(kl.mean()), *shared))
        self.entropy_coefficient.update(Observation(float(entropy), *shared))

    def coefficients(self) -> dict[str, float]:
        """Every number that adapts, by metric name, as it is in force at this step."""
        values = {"kl_coefficient": self.kl_strength, "entropy_coefficient": self.entropy_coefficient.value}
        if isinstance(self.kl_coefficient, coefficients.Safe):
            values |= {f"safe_{name}": value for name, value in self.kl_coefficient.seen.items()}
        return values

    def state(self) -> dict[str, Any]:
        """Everything that changes the run and is not in the weights, as JSON."""
        return {"kl": self.kl_coefficient.state(), "entropy": self.entropy_coefficient.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.kl_coefficient.restore(state["kl"])
        self.entropy_coefficient.restore(state["entropy"])


Build = Callable[[LearnerSpec], Objective]


def finite(values: Any, rows: int, source: str) -> np.ndarray:
    """What a function of the user's returned, as float64 [rows]. Raises ValueError unless that is what it is."""
    result = np.asarray(values, np.float64)
    if result.shape != (rows,) or not np.isfinite(result).all():
        raise ValueError(f"{source}: expected {rows} finite numbers, one a row")
    return result
