"""Blocks of settings that stages are made of: rows, length of a run, members and zero of reward models, noise."""

from typing import Literal, Self

from pydantic import Field, model_validator

from keel.config.base import Fraction, Section
from keel.config.run import CheckpointSettings, RunIdentity


class CompletionSettings(Section):
    """What a row must hold to be trained on."""

    max_tokens: int = Field(128, ge=1, description="completion budget in tokens, end token included")
    unusable: Literal["drop", "refuse"] = Field(
        "drop",
        description="rows with an empty or too long completion, or whose completions are equal: dropped and counted by"
        " reason, or refused with the first one's place",
    )


class TextSettings(CompletionSettings):
    max_tokens: int = Field(512, ge=1, description="prompt and completion together, as the reward model reads them")


class TrainingSettings(Section):
    """How long, and on how much at a time."""

    rows_per_step: int = Field(32, ge=1, description="pairs or demonstrations a step trains on")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="end after so many steps at the latest")
    evaluate_every_steps: int = Field(0, ge=0, description="held-out loss; 0: before the first and after the last")
    patience: int = Field(
        0,
        ge=0,
        description="end after so many evaluations without a lower held-out loss; keep the best; 0: never",
    )

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> Self:
        if self.patience and not self.evaluate_every_steps:
            raise ValueError(
                f"patience={self.patience}: counts evaluations, but evaluate_every_steps=0; expected a number of steps"
            )
        return self

    def steps(self, rows: int) -> int:
        """Optimizer steps for so many training rows, at least one."""
        steps = max(1, round(rows * self.epochs / self.rows_per_step))
        return min(steps, self.max_steps) if self.max_steps else steps


class StageCheckpointSettings(CheckpointSettings):
    every_steps: int = Field(0, ge=0, description="0: none; a stage that broke off begins anew")


class CenterSettings(Section):
    """Bradley-Terry scores have no zero: which completions score 0 on average afterwards."""

    rows: Literal["all", "chosen", "rejected", "none"] = Field("all", description="of the training pairs")
    max_rows: int = Field(512, ge=1, description="texts that are averaged at most")
    source: str | None = Field(
        None, description="prompt-completion rows that score 0 instead (demonstrations); forms as prompts.source"
    )


class MemberSettings(Section):
    """An ensemble of reward models."""

    count: int = Field(1, ge=1, description="members: other seeds of head and order")
    bootstrap: bool = Field(True, description="each of several members draws its pairs with replacement")


class NoiseSettings(Section):
    """Wrong labels on purpose: what a judge of people would bring."""

    flip_ratio: Fraction = Field(0.0, description="share of pairs whose labels are exchanged, drawn from run.seed")
    temperature: float = Field(
        0.0, ge=0, description="> 0: the better wins with probability sigma(difference / temperature); 0: always"
    )


class LabelRun(RunIdentity):
    name: str = Field("label", pattern=r"^[A-Za-z0-9._-]+$", description="run id")
