"""Settings of the stages around online training: supervised, preference and reward-model training, labels.

A stage trains on rows that come with their completions. `learning()` of each gives the settings of the learner it
runs on: those of a run whose completions are all stored.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from keel.config.base import Section
from keel.config.monitoring import MetricsSettings
from keel.config.objective import PairSettings, PreferenceSettings
from keel.config.offline import (
    CenterSettings,
    CompletionSettings,
    LabelRun,
    MemberSettings,
    NoiseSettings,
    StageCheckpointSettings,
    TextSettings,
    TrainingSettings,
)
from keel.config.prompts import PolicySettings, PromptSettings, SamplingSettings
from keel.config.regularizer import RegularizerSettings
from keel.config.rewards import RewardSettings
from keel.config.run import FailureSettings, RunIdentity, Settings
from keel.config.tracking import TrackingSettings
from keel.config.workers import (
    BufferSettings,
    ClusterSettings,
    DeadlineSettings,
    GeneratorSettings,
    LearnerSettings,
    ReferenceSettings,
    WorkerSettings,
)


class StageSettings(Section):
    """What every stage that trains shares."""

    run: RunIdentity = RunIdentity()
    policy: PolicySettings
    prompts: PromptSettings
    completions: CompletionSettings = CompletionSettings()
    training: TrainingSettings = TrainingSettings()
    learners: LearnerSettings = LearnerSettings()
    checkpoint: StageCheckpointSettings = StageCheckpointSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()
    deadlines: DeadlineSettings = DeadlineSettings()

    @model_validator(mode="after")
    def _ranks_have_rows(self) -> Self:
        fewest = min(self.training.rows_per_step, self.prompts.held_out)
        if fewest < self.learners.count:
            raise ValueError(
                f"learners.count={self.learners.count}: every rank takes a row of every step and evaluation"
                f" (training.rows_per_step, prompts.held_out); expected at most {fewest}"
            )
        return self

    @property
    def run_directory(self) -> str:
        return self.run.directory.replace("{name}", self.run.name)

    def learning(self, steps: int) -> Settings:
        """Settings of the learner, for so many steps."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _learner_can_run(self) -> Self:
        _checked(lambda: self.learning(1))
        return self

    def _learning(self, samples: int, steps: int, **blocks: Any) -> Settings:
        """Settings of a run on stored completions, `samples` a row."""
        own = {name: getattr(self, name) for name in _SHARED}
        exact = self.learners.precision == "fp32"
        return Settings(
            generators=GeneratorSettings(dtype="float32" if exact else "bfloat16"),  # what the model is written in
            run={**self.run.model_dump(), "steps": steps},
            sampling=SamplingSettings(
                samples_per_prompt=samples, max_tokens=self.completions.max_tokens, stored_ratio=1.0
            ),
            buffer=BufferSettings(groups_per_step=self.training.rows_per_step),
            **{**own, "rewards": [RewardSettings(name="label", kind="stored")], **blocks},
        )


class SupervisedSettings(StageSettings):
    """`keel sft`: likelihood of demonstrations. Loss: -log pi averaged over all completion tokens of a step."""

    def learning(self, steps: int) -> Settings:
        return self._learning(1, steps, objective=_LIKELIHOOD, regularizer=_NO_KL, reference=None)


class PreferSettings(StageSettings):
    """`keel prefer`: the DPO family on stored pairs or rankings."""

    objective: PreferenceSettings = PreferenceSettings(kind="preference")
    regularizer: RegularizerSettings = RegularizerSettings(kl={"coefficient": 0.0})
    reference: ReferenceSettings = Field(
        ReferenceSettings(), description="read also by losses that need none: log-ratios are how displacement is seen"
    )
    samples: int = Field(2, ge=2, description="completions of a row: 2 for chosen and rejected, more for rankings")

    @model_validator(mode="after")
    def _regularizer_is_offline(self) -> Self:
        kl = self.regularizer.kl
        if kl.importance_weighted or kl.controller.kind != "fixed":
            raise ValueError(
                "regularizer.kl: nobody samples, so there is no ratio to weigh by and no KL to follow; expected"
                " importance_weighted=false and controller.kind=fixed"
            )
        return self

    def learning(self, steps: int) -> Settings:
        blocks = {"objective": self.objective, "regularizer": self.regularizer, "reference": self.reference}
        return self._learning(self.samples, steps, **blocks)


class RewardModelSettings(StageSettings):
    """`keel reward`: -log sigma(r_chosen - r_rejected - margin), averaged over the pairs of a step."""

    policy: PolicySettings = Field(description="trunk: a language model (score read at the last token) or an encoder")
    completions: TextSettings = TextSettings()
    members: MemberSettings = MemberSettings()
    margin: float = Field(0.0, ge=0, description="subtracted from every pair's difference")
    margin_column: str | None = Field(None, description="column of the source with a margin of each pair (Llama 2)")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels taken as wrong")
    center_penalty: float = Field(0.0, ge=0, description="times (r_chosen + r_rejected)^2, added to the loss (TRL)")
    center: CenterSettings = CenterSettings()

    def learning(self, steps: int) -> Settings:
        """Settings of the cluster it runs on; what a step learns is not an objective of online training."""
        learners = self.learners.model_copy(update={"tokens_per_batch": 2**30})
        return self._learning(2, steps, objective=_LIKELIHOOD, regularizer=_NO_KL, reference=None, learners=learners)

    def scoring(self, rewards: list[RewardSettings]) -> Settings:
        """Settings of a run that scores with these models on the learner's threads and GPUs."""
        scorers = WorkerSettings(threads=self.learners.threads, gpus=self.learners.gpus)
        return self.learning(1).model_copy(update={"rewards": rewards, "scorers": scorers})


class LabelSettings(Section):
    """`keel label`: preference pairs from sampled completions and a judge."""

    run: LabelRun = LabelRun()
    runs: list[str] = Field([], description="run directories whose rollouts are labeled; empty: sample from prompts")
    policy: PolicySettings | None = Field(None, description="samples the completions; null with `runs`")
    prompts: PromptSettings | None = Field(None, description="null with `runs`")
    sampling: SamplingSettings = SamplingSettings()
    max_prompts: int | None = Field(None, ge=1, description="the first so many of the shuffled prompts; null: all")
    judge: RewardSettings = Field(description="a reward; its score orders the completions")
    pairs: PairSettings = PairSettings()
    truncated: Literal["keep", "drop"] = Field(
        "keep",
        description="completions cut at the budget: kept and marked (nobody trains an end behind them), or not",
    )
    noise: NoiseSettings = NoiseSettings()
    reference: ReferenceSettings | None = None
    generators: GeneratorSettings = GeneratorSettings()
    scorers: WorkerSettings = WorkerSettings(threads=1)
    failures: FailureSettings = FailureSettings()
    cluster: ClusterSettings = ClusterSettings()
    deadlines: DeadlineSettings = DeadlineSettings()

    @property
    def run_directory(self) -> str:
        return self.run.directory.replace("{name}", self.run.name)

    @property
    def policy_model(self) -> str:
        return self.policy.model if self.policy else ""

    def sampling_run(self) -> Settings:
        """Settings of an online run that samples and scores like this."""
        shared = ("sampling", "reference", "generators", "scorers", "failures", "cluster", "deadlines")
        own = {name: getattr(self, name) for name in shared}
        wide = LearnerSettings(tokens_per_batch=2**30)  # no learner runs
        return Settings(
            run={**self.run.model_dump(), "steps": 1},
            policy=self.policy or PolicySettings(model="-"),
            prompts=self.prompts or PromptSettings(source="-"),
            objective={"kind": "weighted_likelihood", "weights": "uniform"},
            regularizer=_NO_KL,
            rewards=[self.judge.model_copy(update={"role": "train"})],
            learners=wide,
            **own,
        )

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        sampled = self.policy is not None and self.prompts is not None
        if bool(self.runs) == sampled or (self.runs and (self.policy or self.prompts)):
            raise ValueError(f"runs={self.runs}: expected run directories, or policy and prompts, and not both")
        if self.judge.kind == "reference" and (self.reference is None or (self.runs and self.reference.model is None)):
            raise ValueError(
                "judge.kind=reference: reads a reference's log-probs; expected a reference block, with a model"
            )
        if self.judge.kind == "stored":
            raise ValueError("judge.kind=stored: sampled completions have no stored reward; expected another kind")
        if not self.runs and self.sampling.samples_per_prompt < 2:
            raise ValueError("sampling.samples_per_prompt=1: one completion makes no pair; expected at least 2")
        if self.pairs.selection == "most_disagreeing":
            raise ValueError("pairs.selection=most_disagreeing: one judge never disagrees; expected another selection")
        _checked(self.sampling_run)
        return self


def _checked(build: Callable[[], Settings]) -> None:
    """Raise what is wrong with the run behind a stage as the stage's own mistake, by the stage's names."""
    try:
        build()
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        for theirs, ours in _NAMES.items():
            message = message.replace(theirs, ours)
        raise ValueError(message) from None


COMMANDS: dict[str, type[Section]] = {
    "train": Settings,
    "evaluate": Settings,
    "sft": SupervisedSettings,
    "prefer": PreferSettings,
    "reward": RewardModelSettings,
    "label": LabelSettings,
}
"""What the configuration of each command is."""


def command_of(tree: dict[str, Any]) -> str:
    """Which command a run directory's configuration belongs to, by the blocks that only it has."""
    marks = {"rewards": "train", "judge": "label", "members": "reward", "objective": "prefer"}
    return next((command for block, command in marks.items() if block in tree), "sft")


_LIKELIHOOD = {"kind": "weighted_likelihood", "weights": "uniform", "likelihood": "token_mean"}
_NAMES = {
    "sampling.max_tokens": "completions.max_tokens",
    "sampling.samples_per_prompt": "samples",
    "buffer.groups_per_step": "training.rows_per_step",
}
"""What the learner's settings are called here."""
_SHARED = ("policy", "prompts", "learners", "metrics", "cluster", "deadlines")
_NO_KL = RegularizerSettings(kl={"coefficient": 0.0})
