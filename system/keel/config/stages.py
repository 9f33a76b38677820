"""Settings of the stages that train beside online training: supervised, preference and reward-model training.

A stage trains on rows that come with their completions. Its `learning()` gives the settings of the learner that it
runs on: those of an online run whose completions are all stored.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from keel.config.base import CommandSettings, RunIdentity, Section
from keel.config.monitoring import MetricsSettings, TrackingSettings
from keel.config.objective import PreferenceSettings
from keel.config.prompts import PolicySettings, PromptSettings, SamplingSettings
from keel.config.regularizer import RegularizerSettings
from keel.config.rewards import RewardSettings
from keel.config.run import CheckpointSettings, Settings
from keel.config.workers import (
    BufferSettings,
    ClusterSettings,
    DeadlineSettings,
    GeneratorSettings,
    LearnerSettings,
    ReferenceSettings,
    WorkerSettings,
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

    def learning(self, steps: int) -> Settings:
        """Settings of the learner for this number of steps."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _learner_can_run(self) -> Self:
        check_run(lambda: self.learning(1))
        return self

    def _learning(self, samples: int, steps: int, **blocks: Any) -> Settings:
        """Settings of a run on stored completions, `samples` a row."""
        shared = {name: getattr(self, name) for name in _SHARED}
        exact = self.learners.precision == "fp32"
        return Settings(
            generators=GeneratorSettings(dtype="float32" if exact else "bfloat16"),  # what the model is written in
            run={**self.run.model_dump(), "steps": steps},
            sampling=SamplingSettings(
                samples_per_prompt=samples, max_tokens=self.completions.max_tokens, stored_ratio=1.0
            ),
            buffer=BufferSettings(groups_per_step=self.training.rows_per_step),
            **{**shared, "rewards": [RewardSettings(name="label", kind="stored")], **blocks},
        )


class SupervisedSettings(StageSettings):
    """`keel sft`: likelihood of demonstrations. Loss: -log pi averaged over all completion tokens of a step."""

    def learning(self, steps: int) -> Settings:
        return self._learning(1, steps, objective=_LIKELIHOOD, regularizer=NO_KL, reference=None)


class PreferSettings(StageSettings):
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

    def learning(self, steps: int) -> Settings:
        blocks = {"objective": self.objective, "regularizer": self.regularizer, "reference": self.reference}
        return self._learning(self.samples, steps, **blocks)


class RewardModelSettings(StageSettings):
    """`keel reward`: -log sigma(r_chosen - r_rejected - margin), averaged over the pairs of a step."""

    policy: PolicySettings = Field(description="trunk: a language model (score read at the last token) or an encoder")
    completions: TextSettings = Field(TextSettings(), description="which pairs are trained on")
    members: MemberSettings = Field(MemberSettings(), description="members of an ensemble")
    margin: float = Field(0.0, ge=0, description="margin subtracted from the difference of every pair, in reward units")
    margin_column: str | None = Field(None, description="column of the source with a margin of each pair (Llama 2)")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels taken as wrong")
    center_penalty: float = Field(0.0, ge=0, description="coefficient of (r_chosen + r_rejected)^2 in the loss (TRL)")
    center: CenterSettings = Field(CenterSettings(), description="the zero of the scores")

    def learning(self, steps: int) -> Settings:
        """Settings of the cluster it runs on; what a step learns is not an objective of online training."""
        learners = self.learners.model_copy(update={"tokens_per_batch": 2**30})
        return self._learning(2, steps, objective=_LIKELIHOOD, regularizer=NO_KL, reference=None, learners=learners)

    def scoring(self, rewards: list[RewardSettings]) -> Settings:
        """Settings of a run that scores with these models on the learner's threads and GPUs."""
        scorers = WorkerSettings(threads=self.learners.threads, gpus=self.learners.gpus)
        return self.learning(1).model_copy(update={"rewards": rewards, "scorers": scorers})


def check_run(build: Callable[[], Settings]) -> None:
    """Raise the mistake of the run behind a stage as one of the stage, with the names of its settings."""
    try:
        build()
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        for learner_setting, stage_setting in _NAMES.items():
            message = message.replace(learner_setting, stage_setting)
        raise ValueError(message) from None


_LIKELIHOOD = {"kind": "weighted_likelihood", "weights": "uniform", "likelihood": "token_mean"}
_NAMES = {
    "sampling.max_tokens": "completions.max_tokens",
    "sampling.samples_per_prompt": "samples",
    "buffer.groups_per_step": "training.rows_per_step",
}
"""Settings of the learner -> the settings of a stage that they come from."""
_SHARED = ("policy", "prompts", "learners", "metrics", "cluster", "deadlines")
NO_KL = RegularizerSettings(kl={"coefficient": 0.0})
