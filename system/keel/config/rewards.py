"""Settings of rewards: what computes them, how several become one, what length and end of a completion do to it."""

import re
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, model_validator

from keel.config.base import Seconds, Section, TemplateOptions

ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
RELEVANCE = "relevance"
"""The source of a reward of kind reference that says how much a completion depends on its prompt."""
_SECRET = re.compile(rf"([A-Za-z]{{1,10}} )?{ENVIRONMENT.pattern}")


EnsembleForm = Literal["sum", "mean", "lower_bound", "worst", "variance", "kl_dro"]


class EnsembleSettings(Section):
    """How several training rewards, read as members of one ensemble, become one."""

    form: EnsembleForm = Field(
        "sum",
        description="sum: weighted sum; mean; lower_bound: mean - c std; worst: smallest; variance: mean - c variance;"
        " kl_dro: -c log mean exp(-reward / c), between worst (c near 0) and mean (c large)",
    )
    coefficient: float = Field(1.0, ge=0, description="c, population standard deviation or variance over members")
    center: bool = Field(
        True, description="spread and worst case are those of members centered per prompt: their zero is arbitrary"
    )

    @model_validator(mode="after")
    def _dro_has_a_temperature(self) -> Self:
        if self.form == "kl_dro" and self.coefficient == 0:
            raise ValueError("coefficient=0.0: form=kl_dro divides by it; expected more than 0, or form=worst")
        return self


class MembersSettings(EnsembleSettings):
    """How the members of one reward-model folder become one reward; each was centered when it was trained."""

    form: EnsembleForm = Field("mean", description="as ensemble.form, over the members of the folder")
    center: bool = Field(False, description="as ensemble.center; members of keel reward have their zero already")


class RewardSettings(Section):
    """One reward: a function, a model, the reference, or an HTTP server."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="column reward_<name> and metric label")
    kind: Literal["rule", "model", "reference", "http", "stored"] = Field("rule", description="what computes it")
    source: str = Field(
        "",
        description="rule: module:function; model: folder or hub name; http: URL; reference: empty or relevance;"
        " stored: empty",
    )
    role: Literal["train", "judge", "monitor"] = Field(
        "train", description="judge: orders pairs, no part of the reward; monitors are never visible to the objective"
    )
    weight: float = Field(1.0, description="factor in the weighted sum `reward`; judges and monitors ignore it")
    ensemble: MembersSettings = Field(
        MembersSettings(),
        description="model: how the members of an ensemble folder become one reward",
    )
    chat_template_options: TemplateOptions = Field(
        {},
        description="model: keywords of its tokenizer's chat template; a model of keel reward has its own",
    )
    timeout_seconds: Seconds = Field(30, description="http: deadline of one attempt, from name look-up to last byte")
    retries: int = Field(2, ge=0, description="http: further attempts after a failed one, after growing pauses")
    headers: dict[str, str] = Field(
        {},
        description="http: further headers; a value is ${NAME}, or a word and ${NAME} (Bearer ${TOKEN}): the variable"
        " is read from the environment of the scorer at every call and is never written anywhere",
    )
    ca_file: str | None = Field(
        None, description="http: certificates (PEM) that alone are trusted, for a private authority; null: public ones"
    )
    max_response_bytes: int = Field(2**22, ge=2, description="http: a longer reply is a failed attempt")

    @model_validator(mode="after")
    def _no_secret_is_written(self) -> Self:
        """First of all rules: the others name the value of `source`."""
        if re.search(r"://[^/?#]*@", self.source):
            raise ValueError("source: the URL holds user:password@; expected a URL without, and headers with ${NAME}")
        for value in self.headers.values():
            if not _SECRET.fullmatch(value):
                raise ValueError(
                    "headers: a value is written out (not shown here); expected ${NAME}, or a word and ${NAME}, with"
                    " the secret in the environment variable NAME"
                )
        if not all(re.fullmatch(r"[A-Za-z0-9-]+", name) for name in self.headers):
            raise ValueError("headers: a name holds other characters than letters, digits and -; expected a header")
        if self.headers and self.kind != "http":
            raise ValueError(f"headers: kind={self.kind} sends none; expected kind=http")
        return self

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in ("std", "kl_term", "entropy_term", "component"):
            raise ValueError(f"name={self.name}: reward_{self.name} is a metric of the run; expected another name")
        return self

    @model_validator(mode="after")
    def _source_fits_kind(self) -> Self:
        without = self.kind == "stored" or (self.kind == "reference" and self.source != RELEVANCE)
        if without != (self.source == ""):
            raise ValueError(f"source={self.source!r}: kind={self.kind} expects " + _SOURCE_FORMS[self.kind])
        if self.kind == "rule" and self.source.count(":") != 1:
            raise ValueError(f"source={self.source!r}: expected module:function")
        return self


_SOURCE_FORMS = {
    "rule": "module:function",
    "model": "a folder or hub name",
    "http": "a URL",
    "reference": "no source (the mean log-prob of the completion under the reference policy), or relevance",
    "stored": "no source (it is what the prompt source says of the completion)",
}


def needs_relevance(rewards: Iterable[RewardSettings]) -> bool:
    """Whether the reference policy must also read every completion after another prompt."""
    return any(reward.kind == "reference" and reward.source == RELEVANCE for reward in rewards)


class ShapingSettings(Section):
    """What reference scores, length and end of a completion do to its reward, before baselines and regularizers."""

    reference_scores: str | None = Field(
        None,
        description="PAR: column of prompts.source with the training reward of answers of the start policy to that"
        " prompt, a number or a list; the reward becomes mean_m sigmoid(reward - score_m). null: as it is",
    )
    overlong_buffer_tokens: int = Field(
        0,
        ge=0,
        description="DAPO: length of the end of the budget over which the penalty grows to its full size; 0: none",
    )
    overlong_penalty: float = Field(1.0, ge=0, description="reward units at the full budget")
    missing_end_penalty: float = Field(0.0, ge=0, description="subtracted from completions that did not end (TRL)")
    missing_end_reward: float | None = Field(
        None, description="reward of completions that did not end, in place of their score; null: their score"
    )
