"""Write two run directories whose curves are known, and compare them as `keel compare` does.

No model is trained: answers have a fixed text, and their log-probs and rewards are drawn so that a prompt's mean
training reward is 0.22 d and its mean gold 0.25 d - b d^2, d = sqrt(KL nats), b = 0.03 under KL control and 0.06 under
entropy, plus the prompt's own level and noise of the sample. The entropy arm goes further in the same steps.

Usage: python benchmarks/compare_synthetic.py FOLDER docs/images/frontier.svg
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from rich.console import Console

from keel import files, schema
from keel.analysis import compare
from keel.observability import evaluations

PROMPTS, TOKENS = 64, 20
KL_NATS = {
    "kl-control": {0: 0.0, 10: 2.0, 20: 5.0, 30: 9.0},
    "entropy": {0: 0.0, 10: 6.0, 20: 14.0, 30: 25.0},
}
TURN = {"kl-control": 0.03, "entropy": 0.06}
TOKENS_PER_STEP = {"kl-control": 1200, "entropy": 1536}


def evaluation(rng: np.random.Generator, level: np.ndarray, kl: float, turn: float) -> pa.RecordBatch:
    """Held-out answers at a KL: one a prompt, of TOKENS tokens; level [PROMPTS] is the prompt's own."""
    distance = np.sqrt(kl)
    nats = rng.normal(kl, 0.3 + 0.4 * kl, PROMPTS)
    sampler = np.full((PROMPTS, TOKENS), -2.5)
    reference = sampler - nats[:, None] / TOKENS
    proxy = level + 0.22 * distance + rng.normal(0, 0.2, PROMPTS)
    gold = level + 0.25 * distance - turn * kl + rng.normal(0, 0.2, PROMPTS)
    columns: dict[str, Any] = {
        "ticket": range(PROMPTS),
        "sample": [0] * PROMPTS,
        "prompt_id": range(PROMPTS),
        "prompt_tokens": [[1]] * PROMPTS,
        "prompt": [f"synthetic prompt {number}" for number in range(PROMPTS)],
        "prompt_messages": ["[]"] * PROMPTS,
        "prompt_columns": ["{}"] * PROMPTS,
        "seed": range(PROMPTS),
        "completion_tokens": [[1] * TOKENS] * PROMPTS,
        "completion_logprobs": sampler.tolist(),
        "weight_versions": [[0] * TOKENS] * PROMPTS,
        "completion": ["synthetic answer"] * PROMPTS,
        "finish_reason": pa.array(["length"] * PROMPTS).cast(schema.GENERATE.field("finish_reason").type),
        "generator": ["none"] * PROMPTS,
        "generate_seconds": [0.0] * PROMPTS,
        "reference_logprobs": reference.tolist(),
        "reward_gold": gold,
        "reward": proxy,
        "failure": [None] * PROMPTS,
        "score_seconds": [0.0] * PROMPTS,
        "scorer": ["none"] * PROMPTS,
    }
    parts = [schema.PROMPT, schema.GENERATE, schema.REFERENCE, pa.schema([schema.reward_field("gold")]), schema.SCORE]
    return schema.build(pa.schema([field for part in parts for field in part]), columns)


def write(folder: Path, name: str, level: np.ndarray, rng: np.random.Generator) -> Path:
    """A run directory as training leaves it: configuration, evaluations, frontier, metrics."""
    directory = folder / name
    (directory / "metrics.jsonl").unlink(missing_ok=True)
    files.write(directory / "config.yaml", yaml.safe_dump({"run": {"name": name}}).encode())
    for step, kl in KL_NATS[name].items():
        evaluations.store(directory, step, evaluation(rng, level, kl, TURN[name]))
        if step:
            line = {"step": step, "time": 0.0, "trained_tokens_total": float(TOKENS_PER_STEP[name] * step)}
            files.append_json(directory / "metrics.jsonl", line)
    return directory


if __name__ == "__main__":
    target, picture = map(Path, sys.argv[1:])
    random = np.random.default_rng(0)
    shared = random.normal(0, 0.5, PROMPTS)
    runs = [write(target, name, shared, random) for name in KL_NATS]
    compare.run([str(run) for run in runs], Console(width=120), as_json=False, picture=picture)
