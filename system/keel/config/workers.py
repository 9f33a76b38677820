"""Settings of the actors: sizes, numerics, deadlines, and the Ray they run on."""

import os
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from keel.config import passed_options
from keel.config.base import Fraction, Seconds, Section


class BufferSettings(Section):
    """How many prompts a step takes, and how stale their samples may be."""

    groups_per_step: int = Field(8, ge=1, description="prompts a step trains on")
    groups_per_batch: int | None = Field(
        None, ge=1, description="tickets that share a generator batch; null: groups_per_step / generators.count"
    )
    max_staleness: int = Field(0, ge=0, description="versions a sample may be late; 0 is synchronous training")
    dynamic_sampling_refills: int = Field(
        0, ge=0, description="times a step replaces groups whose rewards are all equal (DAPO); 0: trains on them"
    )


_OF_RAY = {"CPU": "the setting threads", "GPU": "the setting gpus"}
"""Resources that Ray itself names -> what to use instead."""


class WorkerSettings(Section):
    """Number and size of the workers of a role."""

    count: int = Field(1, ge=1, description="number of workers (Ray actors)")
    threads: int = Field(2, ge=1, description="CPU threads an actor computes with, also its Ray CPU request")
    gpus: float = Field(0, ge=0, description="GPUs an actor asks Ray for: a share of one, or a whole number")
    resources: dict[str, float] = Field(
        {}, description="custom Ray resources an actor asks for, as nodes of the cluster offer them: {highmem: 1}"
    )

    @model_validator(mode="after")
    def _resources_are_custom(self) -> Self:
        for name, amount in self.resources.items():
            setting = f"resources.{name}={amount:g}"
            if name in (*_OF_RAY, "memory", "object_store_memory", "") or name.startswith(("node:", "bundle")):
                instead = _OF_RAY.get(name, "a resource that nodes were started with")
                raise ValueError(f"{setting}: Ray's own; expected {instead}")
            if amount <= 0 or (amount > 1 and amount != int(amount)):
                raise ValueError(f"{setting}: expected a share above 0 and below 1, or a whole number")
        return self

    @model_validator(mode="after")
    def _gpus_are_whole(self) -> Self:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus={self.gpus}: Ray shares no more than one; expected at most 1, or a whole number")
        return self


class GeneratorSettings(WorkerSettings):
    """Workers that sample completions with vLLM."""

    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights and arithmetic of the sampler")
    kv_cache_bytes: int = Field(2**30, ge=2**26, description="size of one generator's key-value cache")
    max_sequences: int = Field(64, ge=1, description="largest number of sequences decoded together")
    enforce_eager: bool = Field(True, description="no torch.compile (20 s faster start, ~20 % slower decoding)")
    engine: dict[str, Any] = Field(
        {},
        description="further arguments of vLLM's engine by their own names: {max_num_batched_tokens: 8192}; those that"
        " Keel sets are refused",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that share one generator's model, on one node; each asks for `gpus`, which is 1 then"
    )

    @model_validator(mode="after")
    def _engine_is_keels(self) -> Self:
        passed_options.check_vllm(self.engine)
        return self

    @model_validator(mode="after")
    def _ranks_have_a_gpu_each(self) -> Self:
        if self.tensor_parallel > 1 and self.gpus != 1:
            why = "vLLM's Ray executor refuses CPUs" if not self.gpus else "vLLM gives each of its ranks one whole GPU"
            raise ValueError(f"tensor_parallel={self.tensor_parallel}: gpus={self.gpus:g}, and {why}; expected gpus=1")
        return self


class ReferenceSettings(WorkerSettings):
    """Workers that compute log-probs under the frozen reference policy."""

    model: str | None = Field(None, description="the reference model; null: the policy before training")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights and arithmetic of the reference")
    tokens_per_batch: int = Field(4096, ge=1, description="tokens of one forward pass, padding included")
    shared_prompt_tokens: int = Field(512, ge=0, description="as learners.shared_prompt_tokens")
    ref_policy: Literal["initial", "previous"] = Field(
        "initial", description="previous: every iteration_steps the current policy becomes the reference; KL compounds"
    )
    iteration_steps: int | None = Field(None, ge=1, description="length of an iteration of ref_policy=previous")

    @model_validator(mode="after")
    def _iteration_has_a_length(self) -> Self:
        if (self.ref_policy == "previous") != (self.iteration_steps is not None):
            raise ValueError(
                f"iteration_steps={self.iteration_steps}: ref_policy={self.ref_policy}; expected a number of steps"
                " with previous, null with initial"
            )
        return self


class ScorerSettings(WorkerSettings):
    """Workers that compute rewards; all but threads and GPUs is read by reward models alone."""

    threads: int = Field(1, ge=1, description="CPU threads an actor computes with, also its Ray CPU request")
    dtype: Literal["bfloat16", "float32"] = Field("float32", description="weights and arithmetic of reward models")
    tokens_per_batch: int = Field(
        4096, ge=1, description="tokens of one forward pass of a reward model, padding included; a longer text is alone"
    )


class LearnerSettings(WorkerSettings):
    """Ranks that train the policy with DeepSpeed."""

    zero_stage: Literal[1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16: fp32 master weights, bf16 arithmetic")
    learning_rate: float = Field(1e-6, gt=0, description="AdamW's learning rate after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine fall to 0 at the last step"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises linearly from 0")
    adam_betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the first and the second moment"
    )
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="bound to which the global gradient norm is clipped")
    tokens_per_batch: int = Field(4096, ge=1, description="tokens of one micro-batch on one rank, padding included")
    shared_prompt_tokens: int = Field(
        512, ge=0, description="samples of a prompt go behind one copy of it while they fit this many tokens; 0: never"
    )
    packed_tokens: int = Field(
        0,
        ge=0,
        description="largest sequence that rows of different prompts share, masked from each other; 0: never",
    )
    activation_checkpointing: bool | None = Field(
        None,
        description="layers keep their input alone and run forward again in the backward pass: less memory, a forward"
        " pass more; null: for models of at least a billion parameters",
    )
    head_chunk_tokens: int = Field(512, ge=1, description="completion tokens that go through the output head at once")
    head_kept_bytes: int = Field(
        2**28, ge=0, description="bytes of logits kept for the backward pass; the rest is recomputed"
    )

    deepspeed: dict[str, Any] = Field(
        {},
        description="further options of DeepSpeed by their own names: {zero_optimization: {overlap_comm: true}}; those"
        " that Keel sets are refused",
    )

    @model_validator(mode="after")
    def _deepspeed_is_keels(self) -> Self:
        passed_options.check_deepspeed(self.deepspeed)
        return self

    @property
    def rate_depends_on_steps(self) -> bool:
        """Whether the learning rate of a step depends on the length of the run."""
        return self.schedule != "constant"


class ClusterSettings(Section):
    """The Ray cluster that a run uses."""

    address: str | None = Field(
        None,
        description="Ray address; null: that of the environment's RAY_ADDRESS (set inside a Ray job), else an embedded"
        " Ray on this machine; local: always an embedded one",
    )
    cpus: int | None = Field(
        None,
        ge=1,
        description="CPUs the embedded Ray offers; null: twice what the workers request, for scaling",
    )
    wait_for_nodes: bool = Field(
        False, description="nodes may still join: wait for resources instead of refusing what the cluster does not hold"
    )
    object_store_bytes: int = Field(2**30, ge=2**27, description="shared memory of the embedded Ray")
    min_memory_bytes: int = Field(2**32, ge=0, description="free memory without which the run is refused")
    driver_cpus: float = Field(0, ge=0, description="keel submit: CPUs of a node that the driver of the job asks for")
    driver_resources: dict[str, float] = Field(
        {}, description="keel submit: further Ray resources of the node that the driver of the job asks for"
    )

    @property
    def address_to_join(self) -> str | None:
        """The Ray cluster a run joins; None: it starts an embedded one."""
        address = self.address or os.environ.get("RAY_ADDRESS") or None
        return None if address == "local" else address


class DeadlineSettings(Section):
    """Longest waits for single operations."""

    placement_seconds: Seconds = Field(
        86_400,
        description="one worker, or one learner rank, waits for resources while no other of its role serves",
    )
    start_seconds: Seconds = Field(600, description="start of a worker until its model is loaded")
    generate_seconds: Seconds = Field(600, description="one generator batch")
    score_seconds: Seconds = Field(600, description="one batch through one scorer")
    step_seconds: Seconds = Field(1800, description="one learner step, or a checkpoint")
    load_seconds: Seconds = Field(300, description="one weight load into all generators")
