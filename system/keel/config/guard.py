"""Settings of the guard: which checkpoint is the best, what detectors watch, and what a run does when one fires."""

from typing import Literal, Self

from pydantic import Field, model_validator

from keel.config.base import Fraction, Section
from keel.config.regularizer import KLSettings

Action = Literal["warn", "raise_kl", "lower_lr", "roll_back", "stop"]
STEP_DETECTORS = ("kl_slope", "kl_curvature", "grad_norm")
"""Detectors that read training steps; the others read evaluations."""


class WatchSettings(Section):
    """One detector; the block is null where it is switched off."""

    actions: list[Action] = Field(
        ["warn"], min_length=1, description="what a firing does, beside its event, its metric and its line"
    )


class DivergenceSettings(WatchSettings):
    """Proxy up, gold down."""

    min_fall: float = Field(0.0, ge=0, description="reward units that gold fell below its peak, at least")


class DisagreementSettings(WatchSettings):
    """Members of a reward ensemble part."""

    highest_ratio: float = Field(1.5, gt=1, description="largest spread of the members, as a multiple of the start's")


class SlopeSettings(WatchSettings):
    """The KL rises fast."""

    max_nats: float = Field(0.03, gt=0, description="largest rise of the KL a step, nats a token")


class CurvatureSettings(WatchSettings):
    """The KL rises faster and faster."""

    max_nats: float = Field(0.001, ge=0, description="largest growth of that rise a step, nats a token")


class EntropyDriftSettings(WatchSettings):
    """Entropy collapses or blows up."""

    lowest_ratio: float = Field(0.3, ge=0, lt=1, description="smallest entropy a token, as a multiple of the start's")
    highest_ratio: float = Field(1.5, gt=1, description="largest entropy a token, as a multiple of the start's")


class ReferenceNllSettings(WatchSettings):
    """Completions leave what the reference writes."""

    max_outside_ratio: Fraction = Field(0.1, description="largest share of completions outside the start's 99 % band")


class LengthDriftSettings(WatchSettings):
    """Completions grow or shrink."""

    lowest_ratio: float = Field(0.5, ge=0, lt=1, description="smallest mean length, as a multiple of the start's")
    highest_ratio: float = Field(1.5, gt=1, description="largest mean length, as a multiple of the start's")


class RepetitionSettings(WatchSettings):
    """Completions repeat themselves."""

    max_rise: Fraction = Field(0.1, description="largest rise of the share of repeated 3-grams over the start's")


class TemplateCollapseSettings(WatchSettings):
    """Answers to different prompts become the same."""

    max_rise: Fraction = Field(
        0.01, description="largest rise of the share of 3-grams that answers to two prompts have in common"
    )


class GradNormSettings(WatchSettings):
    """The gradient grows."""

    highest_ratio: float = Field(2.0, gt=1, description="largest gradient norm, as a multiple of a window earlier")


class RaiseKlSettings(Section):
    """The action raise_kl."""

    factor: float = Field(2.0, gt=1, description="factor on the KL coefficient, at each firing")
    cap: float = Field(16.0, gt=1, description="largest product of these factors")
    min_coefficient: float | None = Field(
        None,
        gt=0,
        description="smallest KL coefficient after the first firing, reward units per nat; later ones multiply it: the"
        " way to have a KL only once a detector fires (regularizer.kl.coefficient=0); null: none",
    )

    def raised(self, coefficient: float, multiplier: float) -> float:
        """The coefficient in force: times the multiplier, and at least min_coefficient once a firing moved that."""
        if self.min_coefficient is None or multiplier == 1:
            return coefficient * multiplier
        return max(coefficient, self.min_coefficient / min(self.factor, self.cap)) * multiplier


class LowerLrSettings(Section):
    """The action lower_lr."""

    factor: float = Field(0.5, gt=0, lt=1, description="factor on the learning rate, at each firing")
    floor: float = Field(0.0625, gt=0, lt=1, description="smallest product of these factors")


class GuardSettings(Section):
    """What watches a run for over-optimization while it goes, and what it does about it."""

    keep_best: bool = Field(True, description="never delete the best checkpoint by `monitor`")
    monitor: str | None = Field(
        None, description="reward that decides which evaluation is the best; null: the one called gold, if there is one"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the intervals by which detectors decide")
    min_rows: int = Field(
        8,
        ge=2,
        description="fewest held-out completions by which detectors that read evaluations decide: an interval of two"
        " equal ones has no width",
    )
    window_steps: int = Field(10, ge=4, description="steps of a window of the detectors that read training steps")
    pause_steps: int = Field(10, ge=1, description="steps after a firing in which the same detector does not fire")
    proxy_gold_divergence: DivergenceSettings | None = Field(
        DivergenceSettings(), description="gold is below its peak while the training reward is above its own there"
    )
    ensemble_disagreement: DisagreementSettings | None = Field(
        DisagreementSettings(), description="members of the reward ensemble differ more than at the start"
    )
    kl_slope: SlopeSettings | None = Field(SlopeSettings(), description="KL to the reference rises fast")
    kl_curvature: CurvatureSettings | None = Field(
        CurvatureSettings(), description="KL to the reference rises faster and faster"
    )
    entropy: EntropyDriftSettings | None = Field(EntropyDriftSettings(), description="entropy collapses or blows up")
    reference_nll: ReferenceNllSettings | None = Field(
        ReferenceNllSettings(), description="completions leave the band of the start under the reference"
    )
    length: LengthDriftSettings | None = Field(LengthDriftSettings(), description="mean length drifts")
    repetition: RepetitionSettings | None = Field(RepetitionSettings(), description="completions repeat themselves")
    template_collapse: TemplateCollapseSettings | None = Field(
        TemplateCollapseSettings(), description="answers to different prompts become the same"
    )
    grad_norm: GradNormSettings | None = Field(GradNormSettings(), description="the gradient norm grows")
    raise_kl: RaiseKlSettings = Field(RaiseKlSettings(), description="what the action raise_kl does")
    lower_lr: LowerLrSettings = Field(LowerLrSettings(), description="what the action lower_lr does")
    max_roll_backs: int = Field(3, ge=1, description="times that roll_back acts; the next one stops the run")

    def watches(self) -> dict[str, WatchSettings]:
        """The detectors that are on, by name."""
        blocks = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: block for name, block in blocks.items() if isinstance(block, WatchSettings)}

    def check(self, rewards: list[str], kl: KLSettings, held_out: int) -> None:
        """Hold monitor and actions to the rest of the run. Raises ValueError."""
        if self.monitor is not None and self.monitor not in rewards:
            raise ValueError(f"guard.monitor={self.monitor}: no such reward; expected one of {', '.join(rewards)}")
        for name, watch in self.watches().items():
            if name not in STEP_DETECTORS and held_out < self.min_rows and set(watch.actions) != {"warn"}:
                raise ValueError(
                    f"guard.{name}.actions: it never acts on prompts.held_out={held_out} completions, fewer than"
                    f" guard.min_rows={self.min_rows}; expected at least that, or warn"
                )
            if "raise_kl" in watch.actions and self.active_kl(kl).coefficient == 0:
                raise ValueError(
                    f"guard.{name}.actions: raise_kl multiplies regularizer.kl.coefficient, which is 0; expected one"
                    " above 0, guard.raise_kl.min_coefficient (what the first firing raises it to), or another action"
                )
            if "raise_kl" in watch.actions and kl.controller.kind != "fixed":
                raise ValueError(
                    f"regularizer.kl.controller.kind={kl.controller.kind}: adapts the coefficient until what"
                    f" guard.{name}.actions=raise_kl multiplied it by is undone; expected fixed, or another action"
                )
            if "roll_back" in watch.actions and (not self.keep_best or self.monitor_of(rewards) is None):
                raise ValueError(
                    f"guard.{name}.actions: roll_back returns to the best checkpoint, and none is kept; expected a"
                    " reward called gold, or guard.monitor, and guard.keep_best=true"
                )

    def active_kl(self, kl: KLSettings) -> KLSettings:
        """The KL settings as a firing leaves them where the coefficient is 0 until then; else unchanged."""
        least = self.raise_kl.min_coefficient
        raises = any("raise_kl" in watch.actions for watch in self.watches().values())
        if kl.coefficient > 0 or least is None or not raises:
            return kl
        return kl.model_copy(update={"coefficient": least})

    def monitor_of(self, rewards: list[str]) -> str | None:
        """The reward that decides what is best; None: the run has none."""
        return self.monitor or ("gold" if "gold" in rewards else None)

    @model_validator(mode="after")
    def _a_roll_back_changes_something(self) -> Self:
        for name, watch in self.watches().items():
            if "roll_back" in watch.actions and not {"raise_kl", "lower_lr"} & set(watch.actions):
                raise ValueError(
                    f"{name}.actions: roll_back alone takes the same steps again; expected raise_kl or lower_lr with it"
                )
        return self
