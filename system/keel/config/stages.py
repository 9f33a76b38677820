"""Settings of the stages that train beside online training: supervised, preference and reward-model training.

A stage trains on rows that come with their completions. `learner_spec()` gives the settings of the learner it runs on,
`scoring_spec()` those of generators and scorers.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from keel.config.base import CommandSettings, RunIdentity, Section
from keel.config.monitoring import MetricsSettings, TrackingSettings
from keel.config.objective import PreferenceSettings
from keel.config.prompts import EvaluationPromptSpec, PolicySettings, PromptSettings, SamplingSettings
from keel.config.regularizer import RegularizerSettings
from keel.config.rewards import EnsembleSettings, RewardSettings
from keel.config.run import CheckpointSettings, FailureSettings, LearnerSpec
from keel.config.workers import (
    ClusterSettings,
    DeadlineSettings,
    GeneratorSettings,
    LearnerSettings,
    ReferenceSettings,
    ScorerSettings,
)


class CompletionSettings(Section):
    """Which rows are trained on."""

    max_tokens: int = Field(128, ge=1, description="completion budget in tokens, end token included")
    unusable: Literal["drop", "refuse"] = Field(
        "drop",
        description="rows with an empty or too long completion, or with equal completions: drop and count them by"
        " reason, or refuse the source at the first one",
    )


class TextSettings(CompletionSettings):
    """Which pairs a reward model is trained on."""

    max_tokens: int = Field(512, ge=1, description="prompt and completion together, as the reward model reads them")


class TrainingSettings(Section):
    """Length of a stage, its batch, and its evaluations."""

    rows_per_step: int = Field(32, ge=1, description="pairs or demonstrations in a step")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="largest number of steps; null: as many as the epochs need")
    evaluate_every_steps: int = Field(
        0,
        ge=0,
        description="steps between held-out losses; 0: only before the first and after the last step",
    )
    patience: int = Field(
        0,
        ge=0,
        description="evaluations without a lower held-out loss that end the stage, with its best model; 0: never",
    )

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> Self:
        if self.patience and not self.evaluate_every_steps:
            raise ValueError(
                f"patience={self.patience}: counts evaluations, but evaluate_every_steps=0; expected a number of steps"
            )
        return self

    def steps(self, rows: int) -> int:
        """Optimizer steps for a number of training rows, at least one."""
        steps = max(1, round(rows * self.epochs / self.rows_per_step))
        return min(steps, self.max_steps) if self.max_steps else steps


class StageCheckpointSettings(CheckpointSettings):
    """When a stage writes checkpoints, and how many are kept."""

    every_steps: int = Field(
        0, ge=0, description="steps between checkpoints; 0: none, and an interrupted stage starts from the beginning"
    )


class CenterSettings(Section):
    """The zero of a reward model, which Bradley-Terry leaves open: these completions score 0 on average."""

    rows: Literal["all", "chosen", "rejected", "none"] = Field("all", description="of the training pairs")
    max_rows: int = Field(512, ge=1, description="largest number of texts in the average")
    source: str | None = Field(
        None, description="prompt-completion rows that score 0 instead (demonstrations); forms as prompts.source"
    )


class MemberSettings(Section):
    """The members of a reward-model ensemble."""

    count: int = Field(1, ge=1, description="number of members; they differ in the seed of head and order")
    bootstrap: bool = Field(True, description="each of several members draws its pairs with replacement")
    average_weights: bool = Field(
        False,
        description="WARM: write one model, whose weights are the mean of the members'; these then start from the same"
        " head, too, and differ in their pairs alone",
    )

    @model_validator(mode="after")
    def _average_is_of_several(self) -> Self:
        if self.average_weights and self.count == 1:
            raise ValueError("average_weights=true: count=1 is its own mean; expected a count of 2 or more")
        return self

    def head_seed(self, run_seed: int, member: int) -> int:
        """Seed of a member's untrained head: weights can be averaged only between models of one start."""
        return run_seed * 1000 + (0 if self.average_weights else member)


class StageSettings(CommandSettings):
    """Settings that all stages which train have in common."""

    run: RunIdentity = Field(RunIdentity(), description="name, directory and seed of the stage")
    policy: PolicySettings = Field(description="the model that is trained")
    prompts: PromptSettings = Field(description="the source of rows: prompts with their completions")
    completions: CompletionSettings = Field(CompletionSettings(), description="which rows are trained on")
    training: TrainingSettings = Field(TrainingSettings(), description="length, batch and evaluations")
    learners: LearnerSettings = Field(LearnerSettings(), description="ranks that train with DeepSpeed")
    checkpoint: StageCheckpointSettings = Field(StageCheckpointSettings(), description="checkpoints of the stage")
    metrics: MetricsSettings = Field(MetricsSettings(), description="HTTP endpoint of the metrics")
    tracking: TrackingSettings = Field(TrackingSettings(), description="experiment trackers")
    cluster: ClusterSettings = Field(ClusterSettings(), description="the Ray cluster that the stage uses")
    deadlines: DeadlineSettings = Field(DeadlineSettings(), description="longest waits for single operations")

    @model_validator(mode="after")
    def _ranks_have_rows(self) -> Self:
        fewest = min(self.training.rows_per_step, self.prompts.held_out)
        if fewest < self.learners.count:
            raise ValueError(
                f"learners.count={self.learners.count}: every rank takes a row of every step and evaluation"
                f" (training.rows_per_step, prompts.held_out); expected at most {fewest}"
            )
        return self


class OfflineSpec(LearnerSpec):
    """A learner on stored completions, whose reward is the order in which a row holds them."""

    budget_setting: ClassVar[str] = "completions.max_tokens"

    rows_per_step: int

    @property
    def groups_per_step(self) -> int:
        return self.rows_per_step

    @property
    def weights_dtype(self) -> Literal["bfloat16", "float32"]:
        return "float32" if self.learners.precision == "fp32" else "bfloat16"


class PolicyStageSettings(StageSettings):
    """What the stages that train a policy share."""

    def learner_spec(self, steps: int) -> OfflineSpec:
        """The settings of the learner for this many steps."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _learner_can_run(self) -> Self:
        try:
            self.learner_spec(1)
        except ValidationError as error:  # of rules that all learners share; they name settings of this stage
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def _spec(self, samples: int, steps: int, **blocks: Any) -> OfflineSpec:
        """The learner's settings for rows of `samples` completions."""
        return OfflineSpec(
            run={**self.run.model_dump(), "steps": steps},
            policy=self.policy,
            prompts=self.prompts,
            sampling=SamplingSettings(
                samples_per_prompt=samples, max_tokens=self.completions.max_tokens, stored_ratio=1.0
            ),
            rewards=[RewardSettings(name="label", kind="stored")],
            learners=self.learners,
            deadlines=self.deadlines,
            rows_per_step=self.training.rows_per_step,
            **blocks,
        )


class ScoringSpec(Section):
    """The settings that scorers work by where no online run is trained."""

    deadlines: DeadlineSettings
    rewards: list[RewardSettings] = Field([], description="what the scorers compute")
    scorers: ScorerSettings = ScorerSettings(threads=2)
    reference: ReferenceSettings | None = None
    sampling: SamplingSettings = SamplingSettings()
    ensemble: EnsembleSettings = EnsembleSettings()
    failures: FailureSettings = FailureSettings()
    in_ticket_order: bool = True


class SamplingSpec(ScoringSpec):
    """The settings that prompts, generators and scorers work by where no online run is trained."""

    run: RunIdentity
    policy: PolicySettings
    prompts: PromptSettings
    generators: GeneratorSettings

    @property
    def evaluation_prompts(self) -> EvaluationPromptSpec | None:
        return None

    @property
    def max_model_tokens(self) -> int:
        return self.prompts.max_tokens + self.sampling.max_tokens


class SupervisedSettings(PolicyStageSettings):
    """`keel sft`: likelihood of demonstrations. Loss: -log pi averaged over all completion tokens of a step."""

    def learner_spec(self, steps: int) -> OfflineSpec:
        likelihood = {"kind": "weighted_likelihood", "weights": "uniform", "likelihood": "token_mean"}
        no_kl = RegularizerSettings(kl={"coefficient": 0.0})
        return self._spec(1, steps, objective=likelihood, regularizer=no_kl, reference=None)


class PreferSettings(PolicyStageSettings):
    """`keel prefer`: the DPO family on stored pairs or rankings."""

    objective: PreferenceSettings = Field(PreferenceSettings(kind="preference"), description="the loss")
    regularizer: RegularizerSettings = Field(
        RegularizerSettings(kl={"coefficient": 0.0}), description="KL to the reference, entropy, and terms of your own"
    )
    reference: ReferenceSettings = Field(
        ReferenceSettings(),
        description="workers that hold the reference policy; losses that need none get log-ratios as metrics",
    )
    samples: int = Field(2, ge=2, description="completions of a row: 2 for chosen and rejected, more for rankings")

    @model_validator(mode="after")
    def _regularizer_is_offline(self) -> Self:
        kl = self.regularizer.kl
        if kl.importance_weighted or kl.controller.kind != "fixed":
            raise ValueError(
                "regularizer.kl: nothing is sampled, so there is no ratio to weigh by and no KL to follow; expected"
                " importance_weighted=false and controller.kind=fixed"
            )
        return self

    def learner_spec(self, steps: int) -> OfflineSpec:
        blocks = {"objective": self.objective, "regularizer": self.regularizer, "reference": self.reference}
        return self._spec(self.samples, steps, **blocks)

    def reference_spec(self) -> ScoringSpec:
        """Settings of the scorers that read rows under the reference."""
        return ScoringSpec(deadlines=self.deadlines, reference=self.reference)


class RewardModelSettings(StageSettings):
    """`keel reward`: -log sigma(r_chosen - r_rejected - margin), averaged over the pairs of a step."""

    policy: PolicySettings = Field(description="trunk: a language model (score read at the last token) or an encoder")
    completions: TextSettings = Field(TextSettings(), description="which pairs are trained on")
    members: MemberSettings = Field(
        MemberSettings(),
        description="how many reward models are trained, of which pairs, and whether their weights become one",
    )
    margin: float = Field(0.0, ge=0, description="margin subtracted from the difference of every pair, in reward units")
    margin_column: str | None = Field(None, description="column of the source with a margin of each pair (Llama 2)")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels taken as wrong")
    center_penalty: float = Field(0.0, ge=0, description="coefficient of (r_chosen + r_rejected)^2 in the loss (TRL)")
    center: CenterSettings = Field(CenterSettings(), description="the zero of the scores")

    @property
    def scorers(self) -> ScorerSettings:
        """The scorers of held-out pairs take the threads and GPUs of the learner, which has ended then."""
        learners = self.learners
        return ScorerSettings(threads=learners.threads, gpus=learners.gpus, tokens_per_batch=learners.tokens_per_batch)

    def scoring_spec(self, rewards: Sequence[RewardSettings]) -> ScoringSpec:
        return ScoringSpec(deadlines=self.deadlines, rewards=list(rewards), scorers=self.scorers)
