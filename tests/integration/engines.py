"""Run as a process of its own: load weights into vLLM engines and compare them with fresh ones, bit for bit.

Then more prompt tokens at once than the engine reads in one go.

Usage: engines.py FOLDER     FOLDER/CASE/{start,target} are model folders; prints one JSON object
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from keel import schema
from keel.config.workers import GeneratorSettings
from keel.learner import model_files, weights
from keel.protocols import GenerateRequest, Sampling
from keel.rollout.generator import VllmGenerator

SAMPLING = Sampling(temperature=0.8, top_p=1.0, max_tokens=16, stop_token_ids=(2,))
ROWS = 6


def prompts() -> object:
    columns = {
        "ticket": list(range(ROWS)),
        "sample": [0] * ROWS,
        "prompt_id": list(range(ROWS)),
        "prompt_tokens": [[3 + row, 20, 30 + row, 40] for row in range(ROWS)],
        "prompt": ["x"] * ROWS,
        "prompt_messages": ["[]"] * ROWS,
        "prompt_columns": ["{}"] * ROWS,
        "seed": [1000 + row for row in range(ROWS)],
    }
    return schema.build(schema.PROMPT, columns)


def sample(generator: VllmGenerator) -> dict[str, list[object]]:
    batch, _ = generator.generate(GenerateRequest(prompts(), (SAMPLING,)))
    return {name: batch.column(name).to_pylist() for name in ("completion_tokens", "completion_logprobs")}


def compare(case: Path) -> dict[str, bool | int]:
    """Load target's weights into an engine started from start; compare with an engine started from target."""
    settings = GeneratorSettings(kv_cache_bytes=2**26, threads=1)
    loaded = VllmGenerator(str(case / "start"), settings, 64, "loaded")
    before = sample(loaded)
    packed = weights.pack(load_file(case / "target" / "model.safetensors").items(), 7, "bfloat16")
    receipt = loaded.load_weights(packed)
    after = sample(loaded)
    fresh = sample(VllmGenerator(str(case / "target"), settings, 64, "fresh"))
    assert (receipt.version, receipt.digest) == (7, packed.digest)
    return {"moved": before != after, "identical": after == fresh, "version": loaded.version}


def many_long_prompts(case: Path) -> dict[str, bool | int]:
    """64 seeded prompts of 120 tokens, where the engine reads 4096 tokens at once: one would be read in two parts."""
    settings = GeneratorSettings(kv_cache_bytes=2**27, threads=1)
    rows = 64
    columns = {
        "ticket": list(range(rows)),
        "sample": [0] * rows,
        "prompt_id": list(range(rows)),
        "prompt_tokens": [[3 + (row + place) % 40 for place in range(120)] for row in range(rows)],
        "prompt": ["x"] * rows,
        "prompt_messages": ["[]"] * rows,
        "prompt_columns": ["{}"] * rows,
        "seed": list(range(rows)),
    }
    batch, _ = VllmGenerator(str(case / "start"), settings, 200, "long").generate(
        GenerateRequest(schema.build(schema.PROMPT, columns), (SAMPLING,))
    )
    return {"rows": batch.num_rows}


def main(folder: Path) -> None:
    # before the first engine: vLLM puts its own wrappers around transformers' classes, which are then no models any more
    shapes = {path: model_files.parameter_shapes(path) for path in folder.glob("*/*")}
    model_files.parameter_shapes = lambda path, named="": shapes[path]
    answers = {case.name: compare(case) for case in sorted(folder.iterdir())}
    answers["long"] = many_long_prompts(folder / "llama-True")
    weights._repack_heads = lambda model: None
    answers["no-repack"] = compare(folder / "llama-True")
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
