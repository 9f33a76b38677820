"""Run as a process of its own: load exported folders in vLLM, say one token, score token rows.

Usage: pooling.py JOB.json     {"policies": {NAME: FOLDER}, "rewards": {NAME: [FOLDER, [[ids, second], ...]]}}
Prints one JSON object, {NAME: answer}: tokens of a greedy completion; raw scores, or why vLLM has none.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, PoolingParams, SamplingParams

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**26,
    "disable_log_stats": True,
    "seed": 0,
}


def sampled_tokens(folder: str) -> list[int]:
    engine = LLM(model=folder, max_model_len=64, **ENGINE)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
    answer = engine.generate([{"prompt_token_ids": [5, 20, 30]}], params, use_tqdm=False)
    return list(answer[0].outputs[0].token_ids)


def scores(folder: str, rows: list[tuple[list[int], int]]) -> list[float]:
    """One raw score a row; the second segment of an encoder's pair begins at `second`."""
    engine = LLM(model=folder, runner="pooling", max_model_len=128, **ENGINE)
    params = [
        PoolingParams(
            use_activation=False,
            extra_kwargs={"compressed_token_type_ids": second} if second < len(ids) else None,
        )
        for ids, second in rows
    ]
    prompts = [{"prompt_token_ids": ids} for ids, _ in rows]
    result = engine.encode(prompts, pooling_params=params, pooling_task="classify", use_tqdm=False)
    return [float(output.outputs.data.reshape(-1)[0]) for output in result]


def main(job: dict[str, Any]) -> None:
    answers: dict[str, Any] = {}
    for name, folder in job["policies"].items():
        answers[name] = sampled_tokens(folder)
        gc.collect()
    for name, (folder, rows) in job["rewards"].items():
        try:
            answers[name] = scores(folder, [tuple(row) for row in rows])
        except Exception as error:  # the test says which may
            answers[name] = f"{type(error).__name__}: {error}"
        gc.collect()
    print(json.dumps(answers))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
