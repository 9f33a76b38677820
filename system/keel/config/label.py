"""Settings of `keel label`: preference pairs from sampled completions and a judge."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from keel.config.base import CommandSettings, Fraction, RunIdentity, Section
from keel.config.pairs import PairSettings
from keel.config.prompts import PolicySettings, PromptSettings, SamplingSettings
from keel.config.rewards import RewardSettings
from keel.config.run import FailureSettings
from keel.config.stages import SamplingSpec, ScoringSpec
from keel.config.workers import (
    ClusterSettings,
    DeadlineSettings,
    GeneratorSettings,
    ReferenceSettings,
    ScorerSettings,
)


class NoiseSettings(Section):
    """Wrong labels on purpose, as human judges would give them."""

    flip_ratio: Fraction = Field(0.0, description="share of pairs whose labels are exchanged, drawn from run.seed")
    temperature: float = Field(
        0.0, ge=0, description="> 0: the better wins with probability sigma(difference / temperature); 0: always"
    )


class LabelRun(RunIdentity):
    """Name, directory and seed of `keel label`."""

    name: str = Field("label", pattern=r"^[A-Za-z0-9._-]+$", description="run id")


class LabelSettings(CommandSettings):
    """`keel label`: preference pairs from sampled completions and a judge."""

    run: LabelRun = Field(LabelRun(), description="name, directory and seed")
    runs: list[str] = Field([], description="run directories whose rollouts are labeled; empty: sample")
    policy: PolicySettings | None = Field(None, description="model that samples the completions; null with `runs`")
    prompts: PromptSettings | None = Field(None, description="prompts of the completions; null with `runs`")
    sampling: SamplingSettings = Field(SamplingSettings(), description="how completions are sampled")
    max_prompts: int | None = Field(
        None, ge=1, description="the first prompts of the shuffled ones, this many; null: all"
    )
    judge: RewardSettings = Field(description="the reward that orders the completions")
    monitors: list[RewardSettings] = Field(
        [], description="rewards stored beside the judge's; kind reference with source relevance lets a judge read it"
    )
    pairs: PairSettings = Field(PairSettings(), description="which two completions of a prompt become a pair")
    truncated: Literal["keep", "drop"] = Field(
        "keep",
        description="completions cut at the budget: keep and mark them (no end token is trained behind them), or drop",
    )
    noise: NoiseSettings = Field(NoiseSettings(), description="wrong labels on purpose")
    reference: ReferenceSettings | None = Field(None, description="workers that hold the reference policy; null: none")
    generators: GeneratorSettings = Field(GeneratorSettings(), description="workers that sample with vLLM")
    scorers: ScorerSettings = Field(ScorerSettings(), description="workers that compute the judge's rewards")
    failures: FailureSettings = Field(FailureSettings(), description="how many failures are tolerated")
    cluster: ClusterSettings = Field(ClusterSettings(), description="the Ray cluster that is used")
    deadlines: DeadlineSettings = Field(DeadlineSettings(), description="longest waits for single operations")

    def scoring_spec(self) -> ScoringSpec:
        """Settings of the judge and the reference; also of prompts and generators, where completions are sampled."""
        scoring: dict[str, Any] = {
            "deadlines": self.deadlines,
            "rewards": [
                self.judge.model_copy(update={"role": "train"}),
                *(monitor.model_copy(update={"role": "monitor"}) for monitor in self.monitors),
            ],
            "scorers": self.scorers,
            "reference": self.reference,
            "sampling": self.sampling,
            "failures": self.failures,
        }
        if self.policy is None or self.prompts is None:
            return ScoringSpec(**scoring)
        return SamplingSpec(
            run=self.run, policy=self.policy, prompts=self.prompts, generators=self.generators, **scoring
        )

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        sampled = self.policy is not None and self.prompts is not None
        if bool(self.runs) == sampled or (self.runs and (self.policy or self.prompts)):
            raise ValueError(f"runs={self.runs}: expected run directories, or policy and prompts, and not both")
        rewards = {"judge": self.judge} | {f"monitors.{monitor.name}": monitor for monitor in self.monitors}
        if len({reward.name for reward in rewards.values()}) < 1 + len(self.monitors):
            names = [self.judge.name, *(monitor.name for monitor in self.monitors)]
            raise ValueError(f"monitors: two rewards of {', '.join(names)} have one name; expected different names")
        for setting, reward in rewards.items():
            if reward.kind == "stored":
                raise ValueError(
                    f"{setting}.kind=stored: sampled completions have no stored reward; expected another kind"
                )
            if reward.kind == "reference" and (self.reference is None or (self.runs and self.reference.model is None)):
                raise ValueError(
                    f"{setting}.kind=reference: reads a reference's log-probs; expected a reference block, with a model"
                )
        if not self.runs and self.sampling.samples_per_prompt < 2:
            raise ValueError("sampling.samples_per_prompt=1: one completion makes no pair; expected at least 2")
        if self.pairs.selection == "most_disagreeing":
            raise ValueError("pairs.selection=most_disagreeing: one judge never disagrees; expected another selection")
        self.sampling.check_stored()
        return self
