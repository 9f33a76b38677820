"""The same work through Keel and through TRL's RLOOTrainer, one after the other, stage by stage.

Work: SmolLM2-135M-Instruct in bf16, 8 prompts x 4 samples x 48 tokens (no early end), VADER reward, RLOO, KL to the
reference on, Adam at 6e-5, two threads. Medians over the measured steps of all rounds.

Usage: python benchmarks/end_to_end.py [--rounds 1] [--steps 5] [--trl-python .venv-trl/bin/python]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from keel import config, durable, models, sources

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
WARM_UP_STEPS = 2
PROMPTS, SAMPLES, TOKENS, BETA, THREADS = 8, 4, 48, 0.02, 2
Step = dict[str, float]
"""Seconds of a step's stages and of the whole, and its completion tokens."""


def keel(steps: int, scratch: Path) -> list[Step]:
    """Steps of a Keel run, read from its metrics.jsonl; `wall` is the time between two lines."""
    changes = [
        f"run.steps={steps}",
        f"run.directory={scratch / 'keel'}",
        "run.name=benchmark",
        "sampling.stop_token_ids=[]",
        "prompts.held_out=2",
        "metrics.port=0",
    ]
    subprocess.run(
        [sys.executable, "-m", "keel", "train", str(CONFIG), *changes], check=True, stdout=subprocess.DEVNULL
    )
    lines = durable.read_json_lines(scratch / "keel" / "metrics.jsonl")
    pairs = list(itertools.pairwise(lines))[:-1]  # the last step also evaluates and saves
    return [
        {
            "generate": new["generate_seconds_total"] - old["generate_seconds_total"],
            "score": new["score_seconds_total"] - old["score_seconds_total"],
            "train": new["step_seconds"],
            "sync": new["weight_sync_seconds"],
            "wall": new["time"] - old["time"],
            "tokens": new["completion_tokens_total"] - old["completion_tokens_total"],
        }
        for old, new in pairs[WARM_UP_STEPS - 1 :]
    ]


def trl(python: Path, steps: int, scratch: Path) -> list[Step]:
    """Steps of TRL's trainer in its own environment."""
    settings = config.load(CONFIG)
    rows = sources.read(settings.prompts)
    job = {
        "model": str(models.locate(settings.policy.model, "policy.model")),
        "system": settings.prompts.system_prompt,
        "prompts": [row.text for row in rows[: PROMPTS * steps]],
        "rows": PROMPTS * SAMPLES,
        "samples": SAMPLES,
        "tokens": TOKENS,
        "beta": BETA,
        "learning_rate": settings.learners.learning_rate,
        "threads": THREADS,
        "steps": steps,
        "scratch": str(scratch / "trl"),
        "result": str(scratch / "trl.json"),
    }
    (scratch / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(python), str(HERE / "trl_rloo.py"), str(scratch / "job.json")], check=True, env=environment)
    result: dict[str, Any] = json.loads((scratch / "trl.json").read_text())
    timed = zip(result["stages"], result["seconds"], result["tokens"], strict=True)
    return [{**stages, "wall": wall, "tokens": tokens} for stages, wall, tokens in timed][WARM_UP_STEPS:]


def environment(python: Path) -> Path:
    """TRL's own environment, made once."""
    if not python.exists():
        folder = python.parent.parent
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "torch==2.13.0+cpu", "-r", str(HERE / "requirements-trl.txt")], check=True)
    return python


def report(measured: dict[str, list[Step]]) -> str:
    """Medians as a Markdown table, and the ratio of completion tokens per second."""
    rates, lines = {}, ["| system | stage | median (s) |", "|---|---|---|"]
    for system, steps in measured.items():
        medians = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]}
        rates[system] = medians["tokens"] / medians["wall"]
        lines += [f"| {system} | {name} | {value:.1f} |" for name, value in medians.items() if name != "tokens"]
    for system, steps in measured.items():
        lines.append(f"\n{system}: {rates[system]:.0f} completion tokens/s over {len(steps)} steps")
    lines.append(f"ratio Keel / TRL: {rates['Keel'] / rates['TRL']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a round")
    parser.add_argument("--trl-python", type=Path, default=Path(".venv-trl/bin/python"))
    options = parser.parse_args()
    python = environment(options.trl_python)
    measured: dict[str, list[Step]] = {"Keel": [], "TRL": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="keel-benchmark-") as scratch:
            measured["Keel"] += keel(options.steps + WARM_UP_STEPS + 1, Path(scratch))
            measured["TRL"] += trl(python, options.steps + WARM_UP_STEPS, Path(scratch))
    print(report(measured))


if __name__ == "__main__":
    main()
