"""Settings of the stages around online training: supervised, preference and reward-model training, labels.

A stage trains on rows that come with their completions. `learner_spec()` gives the settings of the learner it runs on,
`scoring_spec()` those of generators and scorers.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

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
from keel.config.rewards import EnsembleSettings, RewardSettings
from keel.config.run import FailureSettings, LearnerSpec, RunIdentity, Settings
from keel.config.tracking import TrackingSettings
from keel.config.workers import (
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
    scorers: WorkerSettings = WorkerSettings()
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

    def learner_spec(self, steps: int) -> OfflineSpec:
        blocks = {"objective": self.objective, "regularizer": self.regularizer, "reference": self.reference}
        return self._spec(self.samples, steps, **blocks)

    def reference_spec(self) -> ScoringSpec:
        """Settings of the scorers that read rows under the reference."""
        return ScoringSpec(deadlines=self.deadlines, reference=self.reference)


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

    @property
    def scorers(self) -> WorkerSettings:
        """The scorers of held-out pairs take the threads and GPUs of the learner, which has ended then."""
        return WorkerSettings(threads=self.learners.threads, gpus=self.learners.gpus)

    def scoring_spec(self, rewards: Sequence[RewardSettings]) -> ScoringSpec:
        return ScoringSpec(deadlines=self.deadlines, rewards=list(rewards), scorers=self.scorers)


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

    def scoring_spec(self) -> ScoringSpec:
        """Settings of the judge and the reference; also of prompts and generators, where completions are sampled."""
        scoring: dict[str, Any] = {
            "deadlines": self.deadlines,
            "rewards": [self.judge.model_copy(update={"role": "train"})],
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
        self.sampling.check_stored()
        return self


AnySettings = Settings | StageSettings | LabelSettings
"""The configuration of one command."""
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
