"""What is optimised: objective, regulariser and rewards, with the rules between their settings."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A block of settings: unknown keys are refused, values are frozen once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ObjectiveSettings(Section):
    advantage: Literal["rloo", "group_mean", "grpo", "dr_grpo"] = Field(
        "rloo", description="baseline within a group; grpo also divides by the group's standard deviation"
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="one probability ratio per token, or per completion"
    )
    clip_low: float | None = Field(None, gt=0, lt=1, description="PPO clip below 1; null: no clipping")
    clip_high: float | None = Field(None, gt=0, description="PPO clip above 1; null: no clipping")
    reduction: Literal["sequence_sum", "sequence_mean", "token_mean", "constant"] = Field(
        "sequence_sum", description="mean over completions of token sums or means; over all tokens; or / max_tokens"
    )
    epochs: int = Field(1, ge=1, description="optimizer updates on the same batch within one step")
    correction: Literal["none", "token", "sequence"] = Field(
        "token", description="truncated importance weight learner/sampler: per token or per completion"
    )
    correction_cap: float = Field(2.0, ge=1, description="upper bound of that weight")

    @model_validator(mode="after")
    def _level_fits(self) -> Self:
        if self.level == "sequence" and self.reduction != "sequence_sum":
            raise ValueError(
                f"reduction={self.reduction}: level=sequence has one term a completion; expected sequence_sum"
            )
        if self.level == "sequence" and self.correction == "token":
            raise ValueError("correction=token: level=sequence has one ratio a completion; expected sequence or none")
        return self


class KLSettings(Section):
    coefficient: float = Field(0.0, ge=0, description="beta, reward units per nat")
    placement: Literal["reward", "loss"] = Field("reward", description="inside the reward (k1) or inside the loss (k2)")
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="k1 in the reward, k2 in the loss")
    order: Literal["before_baseline", "after_baseline"] = Field(
        "before_baseline", description="KL enters the reward before the group baseline (TRL) or after it (OpenRLHF)"
    )

    @model_validator(mode="after")
    def _estimator_has_the_right_gradient(self) -> Self:
        right = {"reward": "k1", "loss": "k2"}[self.placement]
        if self.estimator != right:
            reason = {
                ("reward", "k2"): "its expected gradient is not that of any KL",
                ("reward", "k3"): "its expected gradient is KL(pi,ref) minus KL(ref,pi)",
                ("loss", "k1"): "its expected gradient is zero: no regularisation at all",
                ("loss", "k3"): "its gradient is that of the forward KL(ref,pi) and explodes when pi << ref",
            }[self.placement, self.estimator]
            raise ValueError(f"estimator={self.estimator} in the {self.placement}: {reason}; expected {right}")
        return self


class EntropySettings(Section):
    form: Literal["none", "sequence_sum", "sequence_mean", "token_bonus"] = Field(
        "none",
        description="-log pi(y|x) in the reward, summed or averaged; or a differentiable token bonus in the loss",
    )
    coefficient: float = Field(0.0, ge=0, description="alpha, reward units per nat (token_bonus: loss units per nat)")

    @model_validator(mode="after")
    def _form_and_coefficient_agree(self) -> Self:
        if self.form == "none" and self.coefficient > 0:
            raise ValueError(f"coefficient={self.coefficient}: form=none ignores it; expected a form, or 0")
        return self


class RegulariserSettings(Section):
    kl: KLSettings = KLSettings()
    entropy: EntropySettings = EntropySettings()


class RewardSettings(Section):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="column reward_<name> and metric label")
    kind: Literal["rule", "model", "reference", "http"] = Field("rule", description="who computes it")
    source: str = Field("", description="rule: module:function; model: folder or hub name; http: URL; reference: empty")
    role: Literal["train", "monitor"] = Field("train", description="monitors are never visible to the objective")
    weight: float = Field(1.0, description="factor in the weighted sum `reward`; monitors ignore it")
    timeout_seconds: Seconds = Field(30, description="http: deadline of one attempt")
    retries: int = Field(2, ge=0, description="http: further attempts after a failed one")

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in ("std", "kl_term", "entropy_term", "component"):
            raise ValueError(f"name={self.name}: reward_{self.name} is a metric of the run; expected another name")
        return self

    @model_validator(mode="after")
    def _source_fits_kind(self) -> Self:
        if (self.kind == "reference") != (self.source == ""):
            raise ValueError(f"source={self.source!r}: kind={self.kind} expects " + _SOURCE_FORMS[self.kind])
        if self.kind == "rule" and self.source.count(":") != 1:
            raise ValueError(f"source={self.source!r}: expected module:function")
        return self


_SOURCE_FORMS = {
    "rule": "module:function",
    "model": "a folder or hub name",
    "http": "a URL",
    "reference": "no source (it is the mean log-prob of the completion under the reference policy)",
}
