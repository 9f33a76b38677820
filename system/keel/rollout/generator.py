"""vLLM behind the Generator protocol: token ids in, token ids and log-probs out, one engine in this process.

`vllm.LLM` runs in-process, one process an actor. With `tensor_parallel` vLLM's own Ray executor starts an actor for
each GPU inside the generator's placement group; it refuses CPUs, and no such engine was run here. The class is the only
thing the rest of Keel sees, so an `AsyncLLM` engine can take its place on GPUs.
"""

import ast
import contextlib
import difflib
import importlib.util
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import schema
from keel.config.workers import GeneratorSettings
from keel.errors import ConfigError
from keel.learner import model_files, weights
from keel.learner.model_text import ModelText
from keel.protocols import GenerateRequest, LoadReceipt, Sampling, StageReceipt, Weights


def environment(settings: GeneratorSettings) -> dict[str, str]:
    """Variables of the engine's process. Ranks of a tensor parallel engine go into the bundles behind the actor's."""
    ranks = settings.tensor_parallel
    bundles = {"VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, range(1, ranks + 1)))} if ranks > 1 else {}
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, no serialization
        "OMP_NUM_THREADS": str(settings.threads),
        **bundles,
    }


def engine_arguments(folder: str, settings: GeneratorSettings, max_model_tokens: int) -> dict[str, Any]:
    """What vLLM is told. One GPU or none: the worker in the engine's process; more: a Ray actor for each."""
    ranks = settings.tensor_parallel
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": "ray"} if ranks > 1 else {}
    return {
        "model": folder,
        "load_format": "safetensors",  # a pickle is never opened
        "dtype": settings.dtype,
        "max_model_len": max_model_tokens,
        "max_num_seqs": settings.max_sequences,
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        "enforce_eager": settings.enforce_eager,
        "enable_chunked_prefill": settings.gpus > 0,  # on CPU a seeded prompt read in two parts is an error of vLLM's
        "logprobs_mode": "processed_logprobs",  # after temperature and top-p: the distribution that was sampled
        "generation_config": "vllm",  # no sampling default of the model's may slip in
        "disable_log_stats": True,
        "seed": 0,
        **parallel,
        **settings.engine,
    }


def check_engine(settings: GeneratorSettings) -> None:
    """Raise ConfigError for a name in `generators.engine` that vLLM's EngineArgs lacks. Its source is read, not run."""
    package = importlib.util.find_spec("vllm") if settings.engine else None
    if package is None or package.origin is None:
        return
    tree = ast.parse((Path(package.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf8"))
    (arguments,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs")
    fields = [node.target for node in arguments.body if isinstance(node, ast.AnnAssign)]
    known = {field.id for field in fields if isinstance(field, ast.Name)}
    for name in settings.engine:
        if name not in known:
            near = " or ".join(difflib.get_close_matches(name, known)) or "a name of vllm.EngineArgs"
            raise ConfigError(f"generators.engine.{name}: vLLM's engine has no such argument; expected {near}")


class VllmGenerator:
    """One vLLM engine on one model folder. Not thread-safe: one call at a time, as a Ray actor gives it."""

    def __init__(
        self,
        folder: str,
        settings: GeneratorSettings,
        max_model_tokens: int,
        name: str,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        os.environ |= environment(settings)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import torch
        from transformers import AutoTokenizer
        from vllm import LLM

        from keel.learner import forward_contract

        self.name = name
        self.dtype = settings.dtype
        self.version = 0
        self._expected = model_files.parameter_shapes(Path(folder))
        self._text = ModelText(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), template_options)
        self._files = contextlib.ExitStack()  # as long as the engine
        folder = str(self._files.enter_context(model_files.served(Path(folder))))
        arguments = engine_arguments(folder, settings, max_model_tokens)
        if not settings.gpus and not forward_contract.verdict(Path(folder), max_model_tokens).shared:
            # vLLM caches the state of recurrent layers where a chunk of a prompt ends, and here no prompt is cut
            arguments["enable_prefix_caching"] = False
        self._engine: Any = LLM(**arguments)
        torch.set_num_threads(settings.threads)  # vLLM may have set 1

    def generate(self, request: GenerateRequest) -> tuple[pa.RecordBatch, StageReceipt]:
        """The rows with the generate columns appended; row i's tokens depend on its seed, not on its neighbors."""
        started = time.monotonic()
        prompts, sampling = request.prompts, request.sampling
        rows, seeds = prompts.column("prompt_tokens").to_pylist(), prompts.column("seed").to_pylist()
        given = request.given if request.given is not None else [[]] * len(rows)
        outputs = self._engine.generate(
            [{"prompt_token_ids": row + known} for row, known in zip(rows, given, strict=True)],
            [_params(sampling, seed, bool(known)) for seed, known in zip(seeds, given, strict=True)],
            use_tqdm=False,
        )
        pairs = zip(outputs, given, strict=True)
        completions = [
            _read(output, known, sampling) if known else _sampled(output.outputs[0]) for output, known in pairs
        ]
        seconds = time.monotonic() - started
        columns = self._columns(completions, seconds)
        chat = [messages != "[]" for messages in prompts.column("prompt_messages").to_pylist()]
        texts = self._text.texts(columns["completion_tokens"], sampling.stop_token_ids, chat)
        batch = schema.append(prompts, schema.build(schema.GENERATE, {**columns, "completion": texts}))
        schema.check(batch)
        tokens = int(schema.lengths(batch, "completion_tokens").sum())
        return batch, StageReceipt(batch.num_rows, tokens, seconds, self.name)

    def load_weights(self, new: Weights) -> LoadReceipt:
        """Serve a new policy version from now on. Raises WeightError; the caller then replaces this generator."""
        receipt = weights.load_engine(self._engine, new, self._expected, self.dtype)
        self.version = new.version
        return receipt

    def _columns(self, completions: list["_Completion"], seconds: float) -> dict[str, Any]:
        tokens = [completion.tokens for completion in completions]
        lengths = np.array([len(row) for row in tokens])
        logprobs = [value for completion in completions for value in completion.logprobs]
        versions = np.full(int(lengths.sum()), self.version)
        reasons = pa.array([completion.finish_reason for completion in completions]).dictionary_encode()
        return {
            "completion_tokens": tokens,
            "completion_logprobs": schema.from_ragged(np.array(logprobs, np.float32), lengths, schema.NATS),
            "weight_versions": schema.from_ragged(versions, lengths, schema.TOKENS),
            "finish_reason": reasons.cast(schema.GENERATE.field("finish_reason").type),
            "generator": [schema.STORED if completion.given else self.name for completion in completions],
            "generate_seconds": [seconds] * len(tokens),
        }


@dataclass(frozen=True)
class _Completion:
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    given: bool


def _sampled(completion: Any) -> _Completion:
    tokens = list(completion.token_ids)
    # by token id: the first entry of a position need not be the sampled token
    logprobs = [entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True)]
    return _Completion(tokens, logprobs, completion.finish_reason, given=False)


def _read(output: Any, tokens: list[int], sampling: Sampling) -> _Completion:
    """A completion that was given: its log-probs are those of the last tokens of the prompt."""
    entries = output.prompt_logprobs[-len(tokens) :]
    logprobs = [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)]
    ended = "stop" if tokens[-1] in sampling.stop_token_ids else "length"
    return _Completion(tokens, logprobs, ended, given=True)


def _params(sampling: Sampling, seed: int, given: bool) -> Any:
    """What vLLM is told of a row; of a given completion it only reads the log-probs, as those of a prompt."""
    from vllm import SamplingParams

    if given:
        return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # the end tokens are ours to name; a sampled one is kept and counts as an action
        logprobs=0,
        seed=seed,
        detokenize=False,
    )
