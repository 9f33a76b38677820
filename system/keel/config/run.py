"""Settings of an online run: its blocks, and the rules between settings of different blocks.

Blocks with a file of their own are imported from there; learning rate, optimizer, ZeRO and the counts of workers are in
`workers.py`.

Plain pydantic models without a heavy import: `keel --help`, `--dry-run` and `keel schema` load keel.config alone.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from keel.config.base import CommandSettings, Fraction, RunIdentity, Seconds, Section
from keel.config.guard import GuardSettings
from keel.config.monitoring import MetricsSettings, TrackingSettings
from keel.config.objective import ObjectiveSettings, PolicyGradientSettings
from keel.config.prompts import EvaluationPromptSpec, PolicySettings, PromptSettings, SamplingSettings
from keel.config.regularizer import KLSettings, RegularizerSettings
from keel.config.rewards import EnsembleSettings, RewardSettings, ShapingSettings
from keel.config.workers import (
    BufferSettings,
    ClusterSettings,
    DeadlineSettings,
    GeneratorSettings,
    LearnerSettings,
    ReferenceSettings,
    ScorerSettings,
)


class RunSettings(RunIdentity):
    """Name, directory, seed and length of an online run."""

    steps: int = Field(30, ge=1, description="optimizer steps, one weight version each")


class FailureSettings(Section):
    """How many failures a run tolerates."""

    max_failed_ratio: Fraction = Field(0.5, description="the run stops when a larger share of a step's samples fail")
    retries: int = Field(2, ge=0, description="further attempts for tickets whose generator or scorer died")
    max_rebuilds: int = Field(
        3,
        ge=0,
        description="times in a row, without a step, that learner and buffer are rebuilt after a loss",
    )
    degrade_after_seconds: Seconds = Field(
        60, description="longest wait for all configured workers; afterwards the run continues with those that serve"
    )


class EvaluationSettings(Section):
    """When a run evaluates its policy, and what `keel evaluate` does beyond that."""

    every_steps: int = Field(
        10, ge=0, description="steps between evaluations; 0: only before the first and after the last step"
    )
    source: str | None = Field(
        None,
        description="where prompts.held_out prompts for evaluation come from, forms as prompts.source (a function is"
        " called without options); null: from prompts.source",
    )
    split: str | None = Field(None, description="split of evaluation.source; null: that of prompts.split")
    samples_per_prompt: int = Field(1, ge=1, description="keel evaluate: sampled answers to a prompt")
    greedy: bool = Field(True, description="keel evaluate: also the most probable answer")
    against: str | None = Field(
        None,
        description="keel evaluate: the opponent, a model, run directory or column:NAME of the prompts; null: none",
    )
    judge: str | None = Field(
        None,
        description="keel evaluate: reward that decides which answer wins or passes; null: the training reward",
    )
    pass_threshold: float | None = Field(None, description="keel evaluate: an answer passes with this score; null: off")
    pass_at: list[int] = Field([1, 2, 4, 8], description="keel evaluate: k of pass@k, as far as there are samples")


class CheckpointSettings(Section):
    """When checkpoints are written, and how many are kept."""

    every_steps: int = Field(10, ge=0, description="steps between checkpoints; 0: only after the last step")
    keep: int = Field(2, ge=1, description="number of checkpoints kept, the newest ones")


class ParitySettings(Section):
    """How far the log-probs of learner and sampler may differ."""

    max_gap_nats: float = Field(0.1, gt=0, description="mean |learner - sampler| log-prob the start-up test allows")
    max_step_gap_nats: float = Field(
        0.5,
        gt=0,
        description="the same gap in a later step, over the tokens that the version under training sampled",
    )
    on_step_gap: Literal["warn", "stop"] = Field("stop", description="what a step with a larger gap does to the run")


class LearnerSpec(CommandSettings):
    """The settings that a learner trains by: those of an online run, or what an offline stage derives from its own."""

    budget_setting: ClassVar[str] = "sampling.max_tokens"
    """Name of the setting that holds the completion budget."""

    run: RunSettings = Field(RunSettings(), description="name, directory, seed and length of the run")
    policy: PolicySettings = Field(description="the model that is trained")
    prompts: PromptSettings = Field(description="prompts of training and evaluation")
    sampling: SamplingSettings = Field(SamplingSettings(), description="how completions are sampled")
    objective: ObjectiveSettings = Field(
        PolicyGradientSettings(), description="the objective, one of five kinds; without `kind`, policy_gradient"
    )
    regularizer: RegularizerSettings = Field(
        RegularizerSettings(), description="KL to the reference, entropy, and terms of your own"
    )
    rewards: list[RewardSettings] = Field(min_length=1, description="rewards that train, judge or monitor")
    ensemble: EnsembleSettings = Field(
        EnsembleSettings(), description="how several training rewards become the one that is optimized"
    )
    shaping: ShapingSettings = Field(ShapingSettings(), description="penalties for length and missing ends")
    reference: ReferenceSettings | None = Field(
        ReferenceSettings(), description="workers that hold the reference policy; null: none"
    )
    learners: LearnerSettings = Field(LearnerSettings(), description="ranks that train the policy with DeepSpeed")
    deadlines: DeadlineSettings = Field(DeadlineSettings(), description="longest waits for single operations")

    @property
    def groups_per_step(self) -> int:
        """Prompts a step trains on."""
        raise NotImplementedError

    @property
    def weights_dtype(self) -> Literal["bfloat16", "float32"]:
        """Number format of published and exported weights."""
        raise NotImplementedError

    @property
    def evaluation_prompts(self) -> EvaluationPromptSpec | None:
        """The source of the prompts for evaluation; None: they are held out of the training prompts."""
        return None

    @property
    def max_model_tokens(self) -> int:
        return self.prompts.max_tokens + self.sampling.max_tokens

    @property
    def train_rewards(self) -> list[RewardSettings]:
        return [reward for reward in self.rewards if reward.role == "train"]

    @property
    def active_kl(self) -> KLSettings:
        """The KL settings, with a coefficient above 0 wherever the run may come to have one."""
        return self.regularizer.kl

    def raised_kl(self, coefficient: float, multiplier: float) -> float:
        """The KL coefficient in force where the guard's factor is `multiplier`."""
        return coefficient * multiplier

    @property
    def learner_holds_reference(self) -> bool:
        """Whether the learner has a frozen reference beside the policy: something there reads its whole vocabulary."""
        kl, convex = self.active_kl, self.objective.kind == "logits_convexity"
        return kl.exact or kl.exact_share > 0 or (convex and bool(self.objective.reference_reader))

    def reference_readers(self) -> list[str]:
        """Settings that make the objective read the reference policy."""
        kl, active = self.regularizer.kl.coefficient, self.active_kl.coefficient
        reader = f"regularizer.kl.coefficient={kl}" if kl > 0 else f"guard.raise_kl.min_coefficient={active}"
        readers = [reader] * (active > 0) + [reader for reader in [self.objective.reference_reader] if reader]
        chi_squared = self.regularizer.chi_squared.coefficient
        return readers + [f"regularizer.chi_squared.coefficient={chi_squared}"] * (chi_squared > 0)

    def needed_columns(self) -> dict[str, str]:
        """Rollout columns the objective reads -> the setting that asks for them."""
        readers = self.reference_readers()
        return {"reference_logprobs": readers[0]} if readers else {}

    def written_columns(self) -> set[str]:
        return {"reference_logprobs"} if self.reference else set()

    @model_validator(mode="after")
    def _columns_are_written(self) -> Self:
        for column, setting in self.needed_columns().items():
            if column not in self.written_columns():
                raise ValueError(f"{setting} needs column {column} but reference is null; expected a reference block")
        if (share := self.regularizer.kl.exact_share) > 0 and not self.reference:
            raise ValueError(f"regularizer.kl.exact_share={share}: reference is null; expected a reference block")
        for reward in self.rewards:
            if reward.kind == "reference" and not self.reference:
                raise ValueError(
                    f"rewards.{reward.name}: kind=reference but reference is null; expected a reference block"
                )
        return self

    @model_validator(mode="after")
    def _rewards_can_train(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if duplicate := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rewards: name {sorted(duplicate)[0]!r} is used twice; expected unique names")
        if not any(reward.role == "train" for reward in self.rewards):
            raise ValueError("rewards: none has role train; expected at least one that does")
        return self

    @model_validator(mode="after")
    def _samples_are_enough(self) -> Self:
        samples, wanted = self.sampling.samples_per_prompt, self.objective.min_samples
        if samples < wanted:
            raise ValueError(
                f"sampling.samples_per_prompt={samples}: {self.objective.compared_by} compares samples of one prompt;"
                " expected at least 2"
            )
        return self

    @model_validator(mode="after")
    def _regularizers_fit_the_objective(self) -> Self:
        objective, kl = self.objective, self.active_kl
        terms = self.regularizer.model_copy(update={"kl": kl}).reward_terms()
        if terms and not objective.takes_reward_terms:
            raise ValueError(
                f"regularizer.{terms[0]}: objective.kind={objective.kind} has no gradient that is linear in the reward,"
                " so a term in it is no regularizer; expected placement=loss or form=token_bonus"
            )
        if kl.in_reward and kl.order == "after_baseline" and objective.reads_whole_reward:
            raise ValueError(
                "regularizer.kl.order=after_baseline: the KL is part of the reward before"
                f" {objective.reads_whole_reward} sees it; expected before_baseline"
            )
        if objective.by_token:
            self.regularizer.entropy.check_paid_by_token(f"objective.advantage={objective.compared_by}")
        objective.check_learner(kl.exact, self.learners.zero_stage)
        if kl.exact or objective.kind == "logits_convexity":
            reader = "regularizer.kl.estimator=exact" if kl.exact else "objective.kind=logits_convexity"
            self.regularizer.entropy.check_vocabulary(reader)
        return self

    @model_validator(mode="after")
    def _ensemble_has_members(self) -> Self:
        ensemble, members = self.ensemble, len(self.train_rewards)
        spread = ensemble.form in ("lower_bound", "variance", "kl_dro") and ensemble.center
        if (self.objective.reads_deviation or spread) and self.sampling.samples_per_prompt < 3:
            raise ValueError(
                f"sampling.samples_per_prompt={self.sampling.samples_per_prompt}: ensemble members centered per prompt"
                " deviate alike on two samples, so their spread says nothing; expected at least 3"
            )
        for reader in [f"ensemble.form={ensemble.form}"] * (ensemble.form != "sum") + self.objective.ensemble_readers:
            if members < 2:
                raise ValueError(f"{reader}: the ensemble has {members} rewards of role train; expected at least 2")
        self.objective.check_judges([reward.name for reward in self.rewards if reward.role != "monitor"])
        return self

    @model_validator(mode="after")
    def _stored_completions_fit(self) -> Self:
        ratio = self.sampling.stored_ratio
        self.regularizer.kl.check_stored(ratio)
        self.regularizer.chi_squared.check_stored(ratio)
        self.regularizer.answer_entropy.check_samples(self.sampling.samples_per_prompt, ratio)
        for reward in self.train_rewards:
            if reward.kind == "stored" and ratio < 1:
                raise ValueError(
                    f"rewards.{reward.name}.kind=stored: completions that are generated have none"
                    f" (sampling.stored_ratio={ratio}); expected stored_ratio 1, or another kind"
                )
        if ratio > 0 and self.objective.needs_policy_samples:
            raise ValueError(
                f"sampling.stored_ratio={ratio}: objective.kind={self.objective.kind} needs samples of the policy;"
                " expected preference or weighted_likelihood"
            )
        self.sampling.check_stored()
        if self.shaping.overlong_buffer_tokens > self.sampling.max_tokens:
            raise ValueError(
                f"shaping.overlong_buffer_tokens={self.shaping.overlong_buffer_tokens}: longer than"
                f" sampling.max_tokens={self.sampling.max_tokens}; expected at most that"
            )
        return self

    @model_validator(mode="after")
    def _rows_fit_a_batch(self) -> Self:
        if self.max_model_tokens > self.learners.tokens_per_batch:
            raise ValueError(
                f"learners.tokens_per_batch={self.learners.tokens_per_batch}: one row may have prompts.max_tokens +"
                f" {self.budget_setting}={self.max_model_tokens} tokens; expected at least that"
            )
        return self


class Settings(LearnerSpec):
    """One run. `keel schema` prints this as JSON schema."""

    failures: FailureSettings = Field(FailureSettings(), description="how many failures the run tolerates")
    buffer: BufferSettings = Field(BufferSettings(), description="how many prompts a step takes, and how stale")
    generators: GeneratorSettings = Field(GeneratorSettings(), description="workers that sample with vLLM")
    scorers: ScorerSettings = Field(ScorerSettings(), description="workers that compute rewards")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="evaluation on held-out prompts")
    checkpoint: CheckpointSettings = Field(CheckpointSettings(), description="checkpoints of the run")
    guard: GuardSettings = Field(
        GuardSettings(), description="what watches the run for over-optimization, and what it does about it"
    )
    parity: ParitySettings = Field(ParitySettings(), description="allowed gap between learner and sampler")
    metrics: MetricsSettings = Field(MetricsSettings(), description="HTTP endpoint of the metrics")
    tracking: TrackingSettings = Field(TrackingSettings(), description="experiment trackers")
    cluster: ClusterSettings = Field(ClusterSettings(), description="the Ray cluster that the run uses")

    @property
    def groups_per_step(self) -> int:
        return self.buffer.groups_per_step

    @property
    def weights_dtype(self) -> Literal["bfloat16", "float32"]:
        return self.generators.dtype

    @property
    def active_kl(self) -> KLSettings:
        return self.guard.active_kl(self.regularizer.kl)

    def raised_kl(self, coefficient: float, multiplier: float) -> float:
        return self.guard.raise_kl.raised(coefficient, multiplier)

    @property
    def evaluation_prompts(self) -> EvaluationPromptSpec | None:
        config = self.evaluation
        if config.source is None:
            return None
        other = {"source": config.source, "split": config.split or self.prompts.split, "options": {}}
        return EvaluationPromptSpec(**{**self.prompts.model_dump(), **other})

    @property
    def in_ticket_order(self) -> bool:
        """Whether batches go to workers by ticket, as synchronous training needs to be repeatable."""
        return self.buffer.max_staleness == 0

    @property
    def reference_iteration_steps(self) -> int | None:
        """Steps after which the policy of now becomes the reference; None where the reference stays the initial one."""
        return self.reference.iteration_steps if self.reference else None

    @property
    def groups_per_batch(self) -> int:
        """Tickets that share a generator batch: a number of the configuration, never of timing."""
        return self.groups_per_batch_of(self.generators.count)

    def groups_per_batch_of(self, generators: int) -> int:
        """The same for another number of generators: a step's groups divided among them, unless set."""
        return self.buffer.groups_per_batch or -(-self.buffer.groups_per_step // generators)

    @model_validator(mode="after")
    def _evaluation_split_has_a_source(self) -> Self:
        if self.evaluation.split is not None and self.evaluation.source is None:
            raise ValueError(f"evaluation.split={self.evaluation.split}: evaluation.source is null; expected a source")
        return self

    @model_validator(mode="after")
    def _evaluation_has_a_judge(self) -> Self:
        names, judge = [reward.name for reward in self.rewards], self.evaluation.judge
        if judge is not None and judge not in names:
            raise ValueError(f"evaluation.judge={judge}: no such reward; expected one of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _guard_fits_the_run(self) -> Self:
        names = [reward.name for reward in self.rewards]
        self.guard.check(names, self.regularizer.kl, self.prompts.held_out)
        return self

    @model_validator(mode="after")
    def _batches_fill_a_step(self) -> Self:
        if self.groups_per_batch > self.buffer.groups_per_step * (1 + self.buffer.max_staleness):
            raise ValueError(
                f"buffer.groups_per_batch={self.groups_per_batch}: a batch larger than (1 + max_staleness) *"
                f" groups_per_step={self.buffer.groups_per_step} is never admitted; expected at most that"
            )
        rows = self.buffer.groups_per_step * self.sampling.samples_per_prompt
        if rows < self.learners.count:
            raise ValueError(f"learners.count={self.learners.count}: a step has {rows} rows; expected at most {rows}")
        return self

    @model_validator(mode="after")
    def _sampler_is_another_policy(self) -> Self:
        if isinstance(self.objective, PolicyGradientSettings) and self.objective.covariance:
            self.objective.covariance.check_sampler(self.objective.epochs, self.buffer.max_staleness)
        return self

    @model_validator(mode="after")
    def _refills_have_a_baseline(self) -> Self:
        if self.buffer.dynamic_sampling_refills and self.sampling.samples_per_prompt < 2:
            raise ValueError(
                "sampling.samples_per_prompt=1: buffer.dynamic_sampling_refills replaces every group of one"
            )
        return self
