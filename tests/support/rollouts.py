"""Hand-made rollouts: valid record batches whose every number follows from tickets and lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from keel import schema

VOCABULARY = 50
METADATA = {"keel.schema_version": schema.SCHEMA_VERSION, "keel.run": "test", "keel.tokenizer": "words"}


def prompts(tickets: Sequence[int], samples: int = 2) -> pa.RecordBatch:
    """Prompt rows as prompts.py writes them, `samples` a ticket; prompt lengths 1, 2, 3, 1, ... by ticket."""
    rows = [(ticket, sample) for ticket in tickets for sample in range(samples)]
    columns: dict[str, Any] = {
        "ticket": [ticket for ticket, _ in rows],
        "sample": [sample for _, sample in rows],
        "prompt_id": [ticket % 7 for ticket, _ in rows],
        "prompt_tokens": [[ticket % VOCABULARY] * (1 + ticket % 3) for ticket, _ in rows],
        "prompt": [f"prompt {ticket}" for ticket, _ in rows],
        "prompt_messages": ["[]"] * len(rows),
        "prompt_columns": [f'{{"answer": "{ticket}"}}' for ticket, _ in rows],
        "seed": [1000 * ticket + sample for ticket, sample in rows],
    }
    return schema.build(schema.PROMPT, columns).replace_schema_metadata(METADATA)


def generated(
    batch: pa.RecordBatch,
    version: int = 0,
    logprobs: Sequence[Sequence[float]] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
) -> Any:
    """The rows with a completion each: random of 1 to 5 tokens by seed, or as long as the given log-probs or tokens."""
    if tokens is not None:
        logprobs = logprobs or [[-1.0] * len(row) for row in tokens]
    seeds = batch.column("seed").to_pylist()
    if logprobs is None:
        draws = [np.random.default_rng(seed) for seed in seeds]
        logprobs = [(-draw.random(draw.integers(1, 6))).tolist() for draw in draws]
    lengths = [len(row) for row in logprobs]
    columns: dict[str, Any] = {
        "completion_tokens": tokens
        or [[(seed + t) % VOCABULARY for t in range(n)] for seed, n in zip(seeds, lengths, strict=True)],
        "completion_logprobs": [list(row) for row in logprobs],
        "weight_versions": [[version] * length for length in lengths],
        "completion": [f"answer {seed}" for seed in seeds],
        "finish_reason": pa.array(["stop" if n < 5 else "length" for n in lengths]).cast(
            schema.GENERATE.field("finish_reason").type
        ),
        "generator": ["generator-0"] * len(seeds),
        "generate_seconds": [0.5] * len(seeds),
    }
    return schema.append(batch, schema.build(schema.GENERATE, columns))


def referenced(batch: pa.RecordBatch, reference: Sequence[Sequence[float]] | None = None) -> pa.RecordBatch:
    """The rows with reference log-probs: the given ones, or the sampler's minus 0.1."""
    if reference is None:
        reference = [[x - 0.1 for x in row] for row in batch.column("completion_logprobs").to_pylist()]
    return schema.append(batch, schema.build(schema.REFERENCE, {"reference_logprobs": list(reference)}))


def scored(
    batch: pa.RecordBatch,
    rewards: Sequence[float | None] | None = None,
    extra: Mapping[str, Sequence[float | None]] | None = None,
) -> pa.RecordBatch:
    """The rows with a reward (None: failed with reason `broken`), by default a number that follows from the seed."""
    if rewards is None:
        rewards = [(seed % 11) / 10 for seed in batch.column("seed").to_pylist()]
    columns: dict[str, Any] = {
        **{f"reward_{name}": list(values) for name, values in (extra or {}).items()},
        "reward": list(rewards),
        "failure": ["broken" if reward is None else None for reward in rewards],
        "score_seconds": [0.25] * batch.num_rows,
        "scorer": ["rule"] * batch.num_rows,
    }
    fields = [schema.reward_field(name) for name in (extra or {})]
    return schema.append(batch, schema.build(pa.schema(fields + list(schema.SCORE)), columns))


def rollouts(
    tickets: Sequence[int], samples: int = 2, version: int = 0, failed: Sequence[tuple[int, int]] = ()
) -> pa.RecordBatch:
    """What a generator and the scorers make of these tickets; `failed` (ticket, sample) have no reward."""
    batch = referenced(generated(prompts(tickets, samples), version))
    rows = zip(batch.column("ticket").to_pylist(), batch.column("sample").to_pylist(), strict=True)
    return scored(batch, [None if row in set(failed) else 0.1 * row[1] for row in rows])
