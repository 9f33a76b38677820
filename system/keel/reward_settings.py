"""Settings of rewards: who computes them, how several become one, what length and end of a completion do to it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from keel.section import Seconds, Section


class EnsembleSettings(Section):
    """How several training rewards, read as members of one ensemble, become one."""

    form: Literal["sum", "mean", "lower_bound", "worst", "variance"] = Field(
        "sum",
        description="sum: weighted sum; mean; lower_bound: mean - c std; worst: smallest; variance: mean - c variance",
    )
    coefficient: float = Field(1.0, ge=0, description="c, population standard deviation or variance over members")
    centre: bool = Field(
        True, description="spread and worst case are those of members centred per prompt: their zero is arbitrary"
    )


class MembersSettings(EnsembleSettings):
    """How the members of one reward-model folder become one reward; each was centred when it was trained."""

    form: Literal["sum", "mean", "lower_bound", "worst", "variance"] = Field(
        "mean", description="as ensemble.form, over the members of the folder"
    )
    centre: bool = Field(False, description="as ensemble.centre; members of keel reward have their zero already")


class RewardSettings(Section):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="column reward_<name> and metric label")
    kind: Literal["rule", "model", "reference", "http", "stored"] = Field("rule", description="who computes it")
    source: str = Field(
        "", description="rule: module:function; model: folder or hub name; http: URL; reference, stored: empty"
    )
    role: Literal["train", "judge", "monitor"] = Field(
        "train", description="judge: orders pairs, no part of the reward; monitors are never visible to the objective"
    )
    weight: float = Field(1.0, description="factor in the weighted sum `reward`; judges and monitors ignore it")
    ensemble: MembersSettings = Field(
        MembersSettings(),
        description="model: how the members of an ensemble folder become one reward",
    )
    timeout_seconds: Seconds = Field(30, description="http: deadline of one attempt")
    retries: int = Field(2, ge=0, description="http: further attempts after a failed one")

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in ("std", "kl_term", "entropy_term", "component"):
            raise ValueError(f"name={self.name}: reward_{self.name} is a metric of the run; expected another name")
        return self

    @model_validator(mode="after")
    def _source_fits_kind(self) -> Self:
        if (self.kind in ("reference", "stored")) != (self.source == ""):
            raise ValueError(f"source={self.source!r}: kind={self.kind} expects " + _SOURCE_FORMS[self.kind])
        if self.kind == "rule" and self.source.count(":") != 1:
            raise ValueError(f"source={self.source!r}: expected module:function")
        return self


_SOURCE_FORMS = {
    "rule": "module:function",
    "model": "a folder or hub name",
    "http": "a URL",
    "reference": "no source (it is the mean log-prob of the completion under the reference policy)",
    "stored": "no source (it is what the prompt source says of the completion)",
}


class ShapingSettings(Section):
    """What length and end of a completion do to its reward, before baselines and regularisers."""

    overlong_buffer_tokens: int = Field(
        0, ge=0, description="DAPO: in the last so many tokens of the budget the penalty grows to its whole; 0: none"
    )
    overlong_penalty: float = Field(1.0, ge=0, description="reward units at the full budget")
    missing_end_penalty: float = Field(0.0, ge=0, description="subtracted from completions that did not end (TRL)")
    missing_end_reward: float | None = Field(
        None, description="the reward of completions that did not end, whatever they scored; null: their own"
    )
