"""What is optimized: one block per kind of objective, each with the rules between its own settings."""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from keel.config.base import Fraction, Options, Section, Source, one_of
from keel.config.covariance import CovarianceSettings
from keel.config.pairs import PairSettings

GROUP_ADVANTAGES = ("rloo", "group_mean", "grpo", "dr_grpo")
RETURN_ADVANTAGES = ("none", "reinforce_pp", "reinforce_pp_baseline", "gae", "value_baseline")
REFERENCE_LOSSES = ("dpo", "chi_po", "dpo_hinge", "dpo_plackett_luce", "ipo_sum", "ipo_average", "kto")
FREE_LOSSES = ("simpo", "simpo_hinge", "simpo_plackett_luce", "cpo", "orpo")


class ObjectiveSection(Section):
    """Base class of the kinds of objective."""

    epochs: int = Field(1, ge=1, description="optimizer updates on the same batch within one step")

    @property
    def min_samples(self) -> int:
        """Samples a prompt needs to be worth training on."""
        return 2

    @property
    def compared_by(self) -> str:
        """What compares the samples of a prompt."""
        return str(getattr(self, "kind"))  # noqa: B009 - a field of every subclass

    @property
    def by_token(self) -> bool:
        """Whether advantages may differ between the tokens of a completion."""
        return False

    @property
    def takes_reward_terms(self) -> bool:
        """Whether the gradient is linear in the reward, so that a regularizer may be a term of it."""
        return False

    @property
    def needs_policy_samples(self) -> bool:
        """Whether completions must come from the policy, so that stored ones are refused."""
        return False

    @property
    def reads_whole_reward(self) -> str:
        """What needs the KL inside the reward that it sees; empty: nothing does."""
        return ""

    @property
    def reference_reader(self) -> str:
        """The setting that makes the objective read the reference policy; empty: none does."""
        return ""

    @property
    def ensemble_readers(self) -> list[str]:
        """Settings that make the objective read the members of the reward ensemble."""
        return []

    @property
    def reads_deviation(self) -> bool:
        """Whether the deviation of the reward ensemble on one prompt is read."""
        return False

    def check_learner(self, exact_kl: bool, zero_stage: int) -> None:
        """Raise ValueError for a KL term or a ZeRO stage that the objective cannot work with."""

    def check_judges(self, names: list[str]) -> None:
        """Raise ValueError for a judge that is none of these rewards."""


class EntropyAdvantageSettings(Section):
    """EAPO: entropy has its own discount and trace, estimated by its own critic or without one."""

    coefficient: float = Field(0.02, ge=0, description="tau, reward units per nat")
    discount: Fraction = Field(0.9, description="gamma_H; its horizon 1 / (1 - gamma_H) bounds the pay for length")
    gae_lambda: Fraction = Field(0.0, description="lambda_H; 0 is a value like any other. Needs the critic")
    critic: bool = Field(True, description="false: discounted surprise to come minus the group's mean at that place")


class CriticSettings(Section):
    """A learned value of the states before each completion token."""

    trunk: Literal["own", "shared", "detached"] = Field(
        "own",
        description="a model of its own; the policy's hidden states; or those without a gradient into the policy",
    )
    model: str | None = Field(
        None,
        description="own: the model that the trunk starts from; null: the policy. A reward model's linear head is kept",
    )
    head: Literal["linear", "mlp"] = Field("linear", description="mlp: LayerNorm, a quarter of the width, GELU")
    softmin_temperature: float | None = Field(
        None, gt=0, description="two value heads joined by a soft minimum (SAFE: 0.3); null: one head"
    )
    loss: Literal["mse", "huber"] = Field("mse", description="value loss: half the square, or Huber's with delta 0.5")
    clip: float | None = Field(0.2, gt=0, description="values move at most this far from the old ones; null: unclipped")
    clipped: Literal["max", "mean"] = Field("max", description="larger (PPO) or mean (SAFE) of plain and clipped loss")
    coefficient: float = Field(0.1, gt=0, description="coefficient of the value loss")
    entropy_coefficient: float = Field(1.0, gt=0, description="factor of the entropy critic's loss, times coefficient")
    learning_rate: float | None = Field(
        None, gt=0, description="learning rate of the critic, on the policy's schedule; null: the policy's"
    )
    popart: bool = Field(False, description="PopArt: targets normalized by running moments, outputs kept")
    popart_rate: float = Field(0.03, gt=0, le=1, description="how fast these moments move")


class PolicyGradientSettings(ObjectiveSection):
    """Policy gradient: PPO, RLOO, GRPO, REINFORCE++, GSPO, DAPO, EAPO, SAFE."""

    kind: Literal["policy_gradient"] = Field("policy_gradient", description="kind of the objective")
    advantage: str = Field(
        "rloo",
        description="advantage estimator:"
        f" {', '.join(GROUP_ADVANTAGES + RETURN_ADVANTAGES)}, or module:function of your own",
    )
    whiten: Literal["auto", "none", "population", "sample"] = Field(
        "auto",
        description="zero mean, unit deviation over all tokens of the step; auto: population for reinforce_pp*,"
        " sample for gae and value_baseline, none otherwise",
    )
    discount: Fraction = Field(1.0, description="gamma of returns and GAE")
    gae_lambda: Fraction = Field(0.95, description="lambda of GAE")
    normalize_reward: bool = Field(False, description="normalize rewards by running mean and deviation (SAFE)")
    entropy_advantage: EntropyAdvantageSettings | None = Field(None, description="EAPO's second advantage; null: none")
    critic: CriticSettings | None = Field(
        None, description="needed by gae, value_baseline and EAPO's critic; null: none"
    )
    level: Literal["token", "sequence", "sequence_mean"] = Field(
        "token", description="one probability ratio per token, per completion, or its geometric mean (GSPO)"
    )
    clip_low: float | None = Field(None, gt=0, lt=1, description="PPO clip below 1; null: no clipping")
    clip_high: float | None = Field(None, gt=0, description="PPO clip above 1 (DAPO: larger); null: no clipping")
    reduction: Literal["sequence_sum", "sequence_mean", "token_mean", "constant"] = Field(
        "sequence_sum", description="mean over completions of token sums or means; over all tokens; or / max_tokens"
    )
    correction: Literal["none", "token", "sequence"] = Field(
        "token", description="truncated importance weight learner/sampler: per token or per completion"
    )
    correction_cap: float = Field(2.0, ge=1, description="upper bound of that weight")
    covariance: CovarianceSettings | None = Field(None, description="KL-Cov or Clip-Cov; null: neither")

    @field_validator("advantage")
    @classmethod
    def _advantage_is_known(cls, value: str) -> str:
        return one_of(GROUP_ADVANTAGES + RETURN_ADVANTAGES, value)

    @model_validator(mode="after")
    def _level_fits(self) -> Self:
        if self.level != "token" and self.reduction != "sequence_sum":
            raise ValueError(
                f"reduction={self.reduction}: level={self.level} has one term a completion; expected sequence_sum"
            )
        if self.level != "token" and self.correction == "token":
            raise ValueError(
                f"correction=token: level={self.level} has one ratio a completion; expected sequence or none"
            )
        if self.level != "token" and (self.by_token or self.entropy_advantage or self.covariance):
            why = "covariance" if self.covariance else f"advantage={self.advantage}"
            why = "entropy_advantage" if self.entropy_advantage else why
            raise ValueError(f"level={self.level}: {why} differs from token to token; expected token")
        return self

    @model_validator(mode="after")
    def _critic_fits(self) -> Self:
        entropy = self.entropy_advantage
        wanted = f"advantage={self.advantage}" if self.advantage in ("gae", "value_baseline") else ""
        wanted = wanted or ("entropy_advantage.critic=true" if entropy and entropy.critic else "")
        if wanted and self.critic is None:
            raise ValueError(f"critic=null: {wanted} needs a learned value; expected a critic block, {{}} for defaults")
        if self.critic and not wanted:
            raise ValueError(f"critic: nothing reads it at advantage={self.advantage}; expected gae or value_baseline")
        if entropy and not entropy.critic and entropy.gae_lambda > 0:
            raise ValueError(f"entropy_advantage.gae_lambda={entropy.gae_lambda}: needs a critic; expected 0")
        if self.critic and self.critic.popart and self.critic.softmin_temperature:
            raise ValueError("critic.popart=true: two heads under a soft minimum share no scale; expected false")
        return self

    @property
    def compared_by(self) -> str:
        return self.advantage

    @property
    def takes_reward_terms(self) -> bool:
        return True

    @property
    def needs_policy_samples(self) -> bool:
        return True

    @property
    def reads_whole_reward(self) -> str:
        return self.advantage if self.by_token else ""

    @property
    def by_token(self) -> bool:
        return self.advantage in ("reinforce_pp", "reinforce_pp_baseline", "gae")

    @property
    def min_samples(self) -> int:
        alone = self.advantage in ("none", "reinforce_pp", "gae", "value_baseline") or ":" in self.advantage
        return 1 if alone and (self.entropy_advantage is None or self.entropy_advantage.critic) else 2


class PreferenceSettings(ObjectiveSection):
    """The DPO family, on ranked completions of a prompt."""

    kind: Literal["preference"] = Field(description="kind of the objective")
    loss: Literal[REFERENCE_LOSSES + FREE_LOSSES] = Field("dpo", description="loss of ranked completions")  # type: ignore[valid-type]
    beta: float = Field(0.1, gt=0, description="temperature; ipo_*: tau")
    target_margin: float = Field(0.0, ge=0, description="gamma, subtracted from the logit of a pair (SimPO)")
    exact_length_margin: bool = Field(
        False, description="simpo*: add beta (1/|chosen| - 1/|rejected|), which SimPO leaves out of MaxEnt's optimum"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels taken as wrong (cDPO)")
    likelihood_coefficient: float = Field(
        0.0, ge=0, description="factor of -log pi(chosen) (RPO: eta * beta; CPO, ORPO)"
    )
    likelihood: Literal["sum", "average"] = Field("sum", description="of the chosen completion: over its tokens")
    pessimism: float = Field(
        0.0, ge=0, description="factor of the reward ensemble's deviation, added for chosen and subtracted for rejected"
    )
    pairs: PairSettings = Field(PairSettings(), description="which two completions of a prompt become a pair")

    @model_validator(mode="after")
    def _options_fit_the_loss(self) -> Self:
        sigmoid = self.loss in ("dpo", "chi_po", "simpo", "cpo")
        if self.label_smoothing and not sigmoid:
            raise ValueError(f"label_smoothing={self.label_smoothing}: loss={self.loss} has no labels; expected dpo")
        if self.exact_length_margin and not self.loss.startswith("simpo"):
            raise ValueError(f"exact_length_margin=true: loss={self.loss} is not length-normalized; expected simpo")
        margins = self.loss.startswith(("simpo", "dpo")) or self.loss in ("chi_po", "cpo")
        if self.target_margin and not margins:
            raise ValueError(f"target_margin={self.target_margin}: loss={self.loss} has no margin; expected simpo")
        if self.pessimism and not margins:
            raise ValueError(f"pessimism={self.pessimism}: loss={self.loss} has no logit of a pair; expected dpo")
        if self.loss.endswith("plackett_luce") and self.pairs != PairSettings(min_margin=self.pairs.min_margin):
            raise ValueError(f"pairs: loss={self.loss} trains on the whole ranking; expected only min_margin")
        return self

    @property
    def uses_reference(self) -> bool:
        return self.loss in REFERENCE_LOSSES

    @property
    def reference_reader(self) -> str:
        return f"objective.loss={self.loss}" if self.uses_reference else ""

    @property
    def ensemble_readers(self) -> list[str]:
        selection = f"objective.pairs.selection={self.pairs.selection}"
        readers = [selection] if self.pairs.selection == "most_disagreeing" else []
        return readers + ([f"objective.pessimism={self.pessimism}"] if self.pessimism else [])

    @property
    def reads_deviation(self) -> bool:
        return self.pessimism > 0

    def check_judges(self, names: list[str]) -> None:
        if self.pairs.judge is not None and self.pairs.judge not in names:
            raise ValueError(
                f"objective.pairs.judge={self.pairs.judge}: no such reward with role judge or train; expected one of"
                f" {', '.join(names)}"
            )


class WeightedLikelihoodSettings(ObjectiveSection):
    """Likelihood of completions, weighted by their rewards."""

    kind: Literal["weighted_likelihood"] = Field(description="kind of the objective")
    weights: Literal["kl", "chi2", "soft_chi2", "best_of_n", "rejection", "uniform"] = Field(
        "kl",
        description="OptiDICE's per prompt, mean 1 (kl: softmax, as reward-weighted regression and FLAME); the best"
        " sample alone; rejection sampling; or all alike",
    )
    temperature: float = Field(1.0, gt=0, description="alpha, reward units: large stays near the samples")
    likelihood: Literal["sum", "average", "token_mean"] = Field(
        "average",
        description="log-probs over a completion's tokens, or over all tokens of the step (a supervised loss)",
    )
    rejection_temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0], min_length=1, description="eta of each stage of multi-step rejection sampling, falling"
    )
    stage_steps: int = Field(1, ge=1, description="steps of each stage but the last")

    @property
    def min_samples(self) -> int:
        return 1 if self.weights == "uniform" else 2

    @model_validator(mode="after")
    def _temperatures_fall(self) -> Self:
        etas = self.rejection_temperatures
        if any(later >= earlier for earlier, later in itertools.pairwise(etas)):
            raise ValueError(f"rejection_temperatures={etas}: every stage goes further; expected falling numbers")
        return self


class DenseSettings(Section):
    """LCO's dense advantages: coefficient * (log teacher - log reference), for every token of the vocabulary."""

    teacher: str = Field(description="model folder, hub name or wheel:NAME")
    coefficient: float = Field(1.0, gt=0, description="beta, factor of the dense advantages")


class LogitsConvexitySettings(ObjectiveSection):
    """LCO: regression of the logits onto those of an improved policy."""

    kind: Literal["logits_convexity"] = Field(description="kind of the objective")
    form: Literal["mse", "log_cosh", "kl"] = Field("kl", description="distance of the logits to their target")
    advantage: Literal[GROUP_ADVANTAGES] = Field("rloo", description="sparse: advantage estimator of the sampled token")  # type: ignore[valid-type]
    normalize_advantage: bool = Field(True, description="divide A by the step's deviation: exp(A / eta) saturates")
    temperature: float = Field(1.0, gt=0, description="eta: the target's logits are the anchor's + A / eta")
    anchor: Literal["behavior", "reference"] = Field("behavior", description="policy when the step began, or reference")
    target: Literal["advantage", "ratio"] = Field(
        "advantage", description="ratio: the sampled token's probability times ratio_up or ratio_down (first version)"
    )
    ratio_up: float = Field(1.8, gt=1, description="ratio: for positive advantages")
    ratio_down: float = Field(0.9, gt=0, lt=1, description="ratio: for negative advantages")
    dense: DenseSettings | None = Field(None, description="advantages of the whole vocabulary; null: sparse ones")
    reduction: Literal["sequence_sum", "sequence_mean", "token_mean", "constant"] = Field(
        "token_mean", description="mean over completions of token sums or means; over all tokens; or / max_tokens"
    )

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target == "ratio" and (self.form != "kl" or self.dense or self.anchor != "behavior"):
            raise ValueError("target=ratio: moves one probability of the behavior; expected form=kl, sparse, behavior")
        return self

    @property
    def compared_by(self) -> str:
        return self.advantage

    @property
    def takes_reward_terms(self) -> bool:
        return self.dense is None

    @property
    def needs_policy_samples(self) -> bool:
        return True

    @property
    def reference_reader(self) -> str:
        return "objective.dense" if self.dense else "objective.anchor=reference" if self.anchor == "reference" else ""

    def check_learner(self, exact_kl: bool, zero_stage: int) -> None:
        if exact_kl:
            raise ValueError(
                "regularizer.kl.estimator=exact: logits_convexity already reads the whole vocabulary towards its"
                " anchor; expected k2, or objective.anchor=reference"
            )
        if zero_stage == 3 and self.epochs > 1 and self.anchor == "behavior":
            raise ValueError(
                "learners.zero_stage=3: objective.anchor=behavior with epochs > 1 keeps a copy of the output head,"
                " which no rank holds whole; expected 1 or 2"
            )


class CustomObjectiveSettings(ObjectiveSection):
    """An objective of your own."""

    kind: Literal["custom"] = Field(description="kind of the objective")
    source: Source = Field(description="module:class, derived from keel.algorithms.objective.Objective")
    options: Options = Field({}, description="what the class reads from settings.objective.options")

    @property
    def takes_reward_terms(self) -> bool:
        return True

    @property
    def reads_whole_reward(self) -> str:
        return "your objective"


def _with_kind(value: Any) -> Any:
    return {"kind": "policy_gradient", **value} if isinstance(value, dict) else value


ObjectiveSettings = Annotated[
    Annotated[
        PolicyGradientSettings
        | PreferenceSettings
        | WeightedLikelihoodSettings
        | LogitsConvexitySettings
        | CustomObjectiveSettings,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_with_kind),
]
"""One of the kinds; without `kind` it is policy_gradient."""
