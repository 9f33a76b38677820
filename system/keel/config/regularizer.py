"""Settings of the regularizers: KL and chi-squared to the reference, entropy, answers, the user's, controllers."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from keel.config.base import Section, Source

_GRADIENTS = {
    ("reward", "k2"): "its expected gradient is not that of any KL",
    ("reward", "k3"): "its expected gradient is KL(pi,ref) minus KL(ref,pi)",
    ("reward", "k3_k2"): "a value with another gradient makes no sense where nothing is differentiated",
    ("reward", "exact"): "it is a sum over the vocabulary, to be differentiated",
    ("loss", "k1"): "its expected gradient is zero: no regularization at all",
}
_RIGHT = {"reward": "k1", "loss": "k2, k3, k3_k2 or exact"}
LENGTH_FORMS = ("sequence_mean_exact", "sequence_mean_naive")
"""Forms of the entropy whose temperature beta/|y| depends on the completion."""


TERMS_OF_KEEL = {
    "chi_squared": "regularizer.chi_squared",
    "answer_entropy": "regularizer.answer_entropy",
    "kl_cov": "objective.covariance",
}
"""Labels of the metric objective_term that Keel writes -> the setting."""


class ControllerSettings(Section):
    """How a coefficient moves from step to step. Its state is in metrics.jsonl and in state.json."""

    kind: Literal["fixed", "proportional", "dual", "band", "safe"] = Field(
        "fixed",
        description="proportional: Ziegler's factor 1 + clip(error) n / horizon; dual: exponentiated dual ascent"
        " towards target_nats, at most a factor e a step; band: moved by rate times the nats outside low_nats to"
        " high_nats (entropy only); safe: PID threshold with an entropy gate (KL only)",
    )
    target_nats: float | None = Field(None, gt=0, description="what proportional and dual steer towards")
    target_share_of_start: float | None = Field(
        None, gt=0, description="dual, entropy: in place of target_nats, this times what the first step measures"
    )
    low_nats: float | None = Field(None, ge=0, description="band: the coefficient rises below it")
    high_nats: float | None = Field(None, ge=0, description="band: the coefficient falls above it")
    rate: float = Field(
        0.1, gt=0, description="dual: coefficient *= exp(rate * relative error); band: coefficient -= rate * nats"
    )
    horizon_completions: float = Field(10_000, gt=0, description="proportional: completions for a change of 20 %")
    minimum: float = Field(1e-6, gt=0, description="the coefficient stays above this")
    maximum: float = Field(100.0, gt=0, description="the coefficient stays below this")
    threshold_nats: float = Field(0.3, gt=0, description="safe: KL per token that costs nothing, before PID and phase")
    entropy_floor_nats: float = Field(2.0, gt=0, description="safe: entropy per token below which KL costs more")

    @model_validator(mode="after")
    def _target_is_set(self) -> Self:
        steers = self.kind in ("proportional", "dual")
        if steers and self.target_nats is None and self.target_share_of_start is None:
            raise ValueError(f"target_nats=null: kind={self.kind} steers towards it; expected a number of nats")
        if not steers and self.target_nats is not None:
            raise ValueError(f"target_nats={self.target_nats}: kind={self.kind} ignores it; expected dual, or null")
        if share := self.target_share_of_start:
            if self.kind != "dual":
                raise ValueError(f"target_share_of_start={share}: kind={self.kind} ignores it; expected dual, or null")
            if self.target_nats is not None:
                raise ValueError(
                    f"target_share_of_start={share}: target_nats={self.target_nats} is another target; expected one"
                )
        for name, edge in (("low_nats", self.low_nats), ("high_nats", self.high_nats)):
            if (self.kind == "band") != (edge is not None):
                wanted = "a number of nats" if self.kind == "band" else "band, or null"
                shown = "null" if edge is None else edge
                raise ValueError(f"{name}={shown}: of kind=band, and kind={self.kind}; expected {wanted}")
        if self.low_nats is not None and self.high_nats is not None and self.low_nats > self.high_nats:
            raise ValueError(f"low_nats={self.low_nats}: above high_nats={self.high_nats}; expected less")
        if self.minimum > self.maximum:
            raise ValueError(f"minimum={self.minimum}: above maximum={self.maximum}; expected less")
        return self


class KLSettings(Section):
    """KL to the reference policy."""

    coefficient: float = Field(0.0, ge=0, description="beta, reward units per nat; where a controller starts")
    placement: Literal["reward", "loss"] = Field("reward", description="inside the reward, or inside the loss")
    estimator: Literal["k1", "k2", "k3", "k3_k2", "exact"] = Field(
        "k1",
        description="k1 in the reward; in the loss k2, k3 (GRPO: the forward KL), k3_k2 (k3's value, k2's gradient)"
        " or exact (whole vocabulary)",
    )
    token_share: float = Field(1.0, gt=0, le=1, description="exact: share of the tokens it is computed on, sampled")
    exact_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a step's completions of which the KL over the whole vocabulary is measured, too, outside"
        " the loss (kl_exact_nats); above 0 the learner holds the reference for it",
    )
    importance_weighted: bool = Field(
        False, description="correct for stale samples: learner's log-probs in the reward, ratio pi/sampler in the loss"
    )
    order: Literal["before_baseline", "after_baseline"] = Field(
        "before_baseline", description="KL enters the reward before the group baseline (TRL) or after it (OpenRLHF)"
    )
    controller: ControllerSettings = Field(ControllerSettings(), description="how the coefficient adapts")

    @model_validator(mode="after")
    def _estimator_has_the_right_gradient(self) -> Self:
        if reason := _GRADIENTS.get((self.placement, self.estimator)):
            raise ValueError(
                f"estimator={self.estimator} in the {self.placement}: {reason}; expected {_RIGHT[self.placement]}"
            )
        if self.token_share < 1 and self.estimator != "exact":
            raise ValueError(f"token_share={self.token_share}: estimator={self.estimator} uses all; expected exact")
        if self.estimator == "exact" and self.importance_weighted:
            raise ValueError("importance_weighted=true: exact has no sampled action to weigh; expected k2 or k3")
        if self.controller.kind != "fixed" and self.coefficient == 0:
            raise ValueError(f"coefficient=0.0: controller.kind={self.controller.kind} starts from it; expected more")
        if self.controller.kind == "band":
            raise ValueError("controller.kind=band: is for entropy; expected dual or proportional")
        if share := self.controller.target_share_of_start:
            raise ValueError(f"controller.target_share_of_start={share}: the KL starts at 0; expected target_nats")
        return self

    @property
    def in_reward(self) -> bool:
        return self.coefficient > 0 and self.placement == "reward"

    @property
    def in_loss(self) -> bool:
        return self.coefficient > 0 and self.placement == "loss"

    def check_stored(self, stored_ratio: float) -> None:
        """Raises ValueError for what only completions of a known policy have."""
        if stored_ratio == 1 and self.exact_share > 0:
            raise ValueError(
                f"regularizer.kl.exact_share={self.exact_share}: a KL is of sampled completions, and all of this run's"
                " are stored; expected 0"
            )
        if stored_ratio > 0 and self.importance_weighted:
            raise ValueError(
                f"regularizer.kl.importance_weighted=true: no known policy sampled the stored completions"
                f" (sampling.stored_ratio={stored_ratio}), so there is no ratio to weigh by; expected false"
            )

    @property
    def exact(self) -> bool:
        return self.in_loss and self.estimator == "exact"


class ChiSquaredSettings(Section):
    """Chi-squared divergence to the reference, inside the reward (2403.03185). rho = pi/ref of the completion."""

    coefficient: float = Field(0.0, ge=0, description="lambda, reward units")
    max_ratio: float = Field(
        10.0,
        ge=1,
        description="largest ratio rho = pi/ref of a completion, without unit: clipped there, so the divergence grows"
        " linearly beyond",
    )
    root: bool = Field(
        True,
        description="true: lambda rho / sqrt(chi2), chi2 estimated on the step's rows, the gradient of lambda"
        " sqrt(chi2), as published; false: 2 lambda rho, that of lambda chi2",
    )

    def check_stored(self, stored_ratio: float) -> None:
        """Raises ValueError for completions whose ratio is not that of the policy's samples."""
        if stored_ratio > 0 and self.coefficient > 0:
            raise ValueError(
                f"regularizer.chi_squared.coefficient={self.coefficient}: its gradient is that of a divergence on the"
                f" policy's samples alone, and sampling.stored_ratio={stored_ratio}; expected coefficient 0"
            )


class EntropySettings(Section):
    """Entropy of the policy, as a reward or a bonus."""

    form: Literal["none", "sequence_sum", "sequence_mean_exact", "sequence_mean_naive", "token_bonus"] = Field(
        "none",
        description="in the reward -S; -(S + 1)/|y|, whose optimum is MaxEnt's for the temperature beta/|y|; or -S/|y|,"
        " the naive online analogue of SimPO, which ends at SimPO's fixed point; S = log pi(y|x). In the loss a"
        " differentiable token bonus",
    )
    coefficient: float = Field(0.0, ge=0, description="alpha, reward units per nat (token_bonus: loss units per nat)")
    top_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="token_bonus: share of the vocabulary, its likeliest tokens, to which the policy is renormalized"
        " before its entropy is taken (clamped entropy, AEnt); 1: the plain one",
    )
    importance_weighted: bool = Field(
        False, description="stale samples: -log pi of the learner in place of the sampler's in the reward"
    )
    monitor: bool = Field(
        False, description="measure the full-vocabulary entropy also where no term uses it; false: skipped entirely"
    )
    controller: ControllerSettings = Field(ControllerSettings(), description="how the coefficient adapts")

    @field_validator("form", mode="before")
    @classmethod
    def _form_is_one_of_two(cls, value: Any) -> Any:
        if value == "sequence_mean":
            raise PydanticCustomError(
                "renamed",
                "two forms were meant by it; expected sequence_mean_naive (reward R - (beta/|y|) S, what it was) or"
                " sequence_mean_exact (R - (beta/|y|)(S + 1), the gradient of the objective)",
            )
        return value

    @model_validator(mode="after")
    def _form_and_coefficient_agree(self) -> Self:
        if self.form == "none" and self.coefficient > 0:
            raise ValueError(f"coefficient={self.coefficient}: form=none ignores it; expected a form, or 0")
        if self.top_share < 1 and self.form != "token_bonus":
            raise ValueError(f"top_share={self.top_share}: form={self.form} ignores it; expected token_bonus, or 1")
        kind = self.controller.kind
        if kind not in ("fixed", "dual", "band"):
            raise ValueError(f"controller.kind={kind}: is for KL; expected fixed, dual or band")
        if kind != "fixed" and self.coefficient == 0:
            raise ValueError(f"coefficient=0.0: controller.kind={kind} starts from it; expected more")
        return self

    @property
    def in_reward(self) -> bool:
        return self.coefficient > 0 and self.form in ("sequence_sum", *LENGTH_FORMS)

    @property
    def in_loss(self) -> bool:
        return self.coefficient > 0 and self.form == "token_bonus"

    @property
    def clamped(self) -> bool:
        """Whether the bonus is the entropy among the likeliest tokens."""
        return self.in_loss and self.top_share < 1

    def check_vocabulary(self, reader: str) -> None:
        """Raise ValueError for a clamped bonus beside another term that reads the whole vocabulary."""
        if self.clamped:
            raise ValueError(
                f"regularizer.entropy.top_share={self.top_share}: {reader} already reads the whole vocabulary, and one"
                " term can; expected top_share 1"
            )

    def check_paid_by_token(self, advantage: str) -> None:
        """Raises ValueError for a form that only a whole completion can be paid: a token does not know |y| yet."""
        if self.in_reward and self.form in LENGTH_FORMS:
            raise ValueError(
                f"regularizer.entropy.form={self.form}: {advantage} pays by token, before |y| is known, which pays for"
                " length; expected an advantage of whole completions (rloo, grpo, value_baseline), or sequence_sum"
            )


class AnswerEntropySettings(Section):
    """Entropy of the final answers to a prompt, inside the reward: how often the prompt's other samples agree."""

    coefficient: float = Field(
        0.0,
        description="above 0: pays for rare answers, reward units for an answer that no other sample gives; below 0:"
        " for common ones (EMPO, 2504.05812)",
    )
    extract: Source | None = Field(
        None, description="module:name of a function(text) -> the answer in it, a string; null: the text, stripped"
    )

    def check_samples(self, samples: int, stored_ratio: float) -> None:
        """Raise ValueError for groups that say nothing about the policy's answers."""
        if self.coefficient and samples < 3:
            raise ValueError(
                f"regularizer.answer_entropy.coefficient={self.coefficient}: two samples agree or differ alike, which a"
                f" group baseline cancels (sampling.samples_per_prompt={samples}); expected at least 3 samples"
            )
        if self.coefficient and stored_ratio > 0:
            raise ValueError(
                f"regularizer.answer_entropy.coefficient={self.coefficient}: stored completions are no answers of the"
                f" policy (sampling.stored_ratio={stored_ratio}); expected coefficient 0"
            )


class TermSettings(Section):
    """A regularizer of the user's own."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="label of its metric objective_term")
    source: Source = Field(description="module:name of the function")
    placement: Literal["reward", "loss"] = Field(
        "reward",
        description="reward: function(batch) -> [rows], added to it; loss: function(rows, outputs) -> [tokens]",
    )
    coefficient: float = Field(1.0, description="factor of the term")


class RegularizerSettings(Section):
    """What keeps the policy from over-optimizing its reward."""

    kl: KLSettings = Field(KLSettings(), description="KL to the reference policy")
    chi_squared: ChiSquaredSettings = Field(ChiSquaredSettings(), description="chi-squared to the reference policy")
    entropy: EntropySettings = Field(EntropySettings(), description="entropy of the policy")
    answer_entropy: AnswerEntropySettings = Field(AnswerEntropySettings(), description="entropy of final answers")
    terms: list[TermSettings] = Field([], description="regularizers of your own")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"terms: name {max(names, key=names.count)!r} is used twice; expected unique names")
        for taken in names:
            if taken in TERMS_OF_KEEL:
                raise ValueError(f"terms: name {taken!r} is that of {TERMS_OF_KEEL[taken]}; expected another name")
        return self

    def reward_terms(self) -> list[str]:
        """The settings that put a regularizer into the reward."""
        terms = ["kl.placement=reward"] if self.kl.in_reward else []
        terms += [f"entropy.form={self.entropy.form}"] if self.entropy.in_reward else []
        terms += [f"chi_squared.coefficient={self.chi_squared.coefficient}"] if self.chi_squared.coefficient > 0 else []
        answers = self.answer_entropy.coefficient
        terms += [f"answer_entropy.coefficient={answers}"] if answers else []
        return terms + [f"terms.{term.name}.placement=reward" for term in self.terms if term.placement == "reward"]
