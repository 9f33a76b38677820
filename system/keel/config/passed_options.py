"""Options that reach DeepSpeed and vLLM under their own names, but for those that Keel owns.

An option that Keel sets itself is refused with the setting to use in its place: it would change what a number means, or
break what a run is proved by. DeepSpeed passes over names that it does not know, so they are refused here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

DEEPSPEED_OWNED = {
    "train_batch_size": "a step has the rows of buffer.groups_per_step",
    "train_micro_batch_size_per_gpu": "the setting learners.tokens_per_batch",
    "gradient_accumulation_steps": "a step adds up all of its micro-batches",
    "managed_gradient_accumulation": "a step adds up all of its micro-batches",
    "optimizer": "the settings learners.learning_rate, adam_betas, adam_epsilon and weight_decay",
    "scheduler": "the settings learners.schedule and warmup_steps",
    "gradient_clipping": "the setting learners.max_grad_norm",
    "bf16": "the setting learners.precision",
    "fp16": "the setting learners.precision",
    "torch_autocast": "the setting learners.precision",
    "zero_optimization.stage": "the setting learners.zero_stage",
    "zero_optimization.offload_optimizer": "checkpoints of an offloaded state have not been tried",
    "zero_optimization.offload_param": "checkpoints of an offloaded state have not been tried",
    "checkpoint": "Keel writes its own, for any number of ranks",
    "activation_checkpointing": "the setting learners.activation_checkpointing",
    "pipeline": "a rank holds all layers",
    "tensor_parallel": "a rank holds all layers",
    "gradient_allreduce_op": "shares of the loss add up over ranks",
}
DEEPSPEED_PASSED = frozenset(
    {
        "aio",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "tensorboard",
        "wall_clock_breakdown",
        "wandb",
        "zero_optimization",
    }
)

VLLM_OWNED = {
    "model": "the setting policy.model",
    "tokenizer": "the tokenizer of policy.model is the one that is trained with",
    "dtype": "the setting generators.dtype",
    "seed": "a row has a seed of its own",
    "max_model_len": "prompts.max_tokens and sampling.max_tokens",
    "max_num_seqs": "the setting generators.max_sequences",
    "kv_cache_memory_bytes": "the setting generators.kv_cache_bytes",
    "enforce_eager": "the setting generators.enforce_eager",
    "tensor_parallel_size": "the setting generators.tensor_parallel",
    "distributed_executor_backend": "the setting generators.tensor_parallel",
    "load_format": "a file that holds code is never opened",
    "trust_remote_code": "code of a model's author is never run",
    "hf_overrides": "learner and sampler are one model",
    "generation_config": "sampling has its own settings",
    "override_generation_config": "sampling has its own settings",
    "logprobs_mode": "log-probs are those of the distribution that was sampled",
    "max_logprobs": "Keel asks for that of the sampled token",
    "logits_processors": "log-probs are those of the distribution that was sampled",
    "skip_tokenizer_init": "Keel sends token ids, stop texts need the tokenizer",
    "enable_lora": "weights are loaded whole",
    "disable_log_stats": "Keel has its own metrics",
    "weight_transfer_config": "weights are loaded from Keel's buffer, with their proof",
    "enable_sleep_mode": "a generator's memory stays its own",
}


def problems(options: Mapping[str, Any], owned: Mapping[str, str], name: str) -> Iterator[str]:
    """One line for every option that Keel owns; a dot in a name of `owned` goes into a block."""
    for option, instead in owned.items():
        node: Any = options
        for part in option.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            yield f"{name}.{option}={node}: {instead}; expected no such option"


def check_deepspeed(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of `learners.deepspeed` that Keel owns, or that DeepSpeed would not read."""
    for problem in problems(options, DEEPSPEED_OWNED, "deepspeed"):
        raise ValueError(problem)
    for option in options:
        if option not in DEEPSPEED_PASSED:
            raise ValueError(f"deepspeed.{option}: expected one of {', '.join(sorted(DEEPSPEED_PASSED))}")


def check_vllm(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of `generators.engine` that Keel owns."""
    for problem in problems(options, VLLM_OWNED, "engine"):
        raise ValueError(problem)


def merged(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The base with options in place of its own; a block is merged option by option."""
    result = dict(base)
    for name, value in options.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result
