"""The same work through Keel and through TRL's RLOOTrainer, one after the other, stage by stage.

Work of a step: configs/quickstart.yaml without end tokens, so that both sample every token: SmolLM2-135M-Instruct in
bf16, 8 prompts x 4 samples x 48 tokens, VADER reward, RLOO, KL to the reference, Adam, two threads. Both get the same
prompts in the same order. Reported are medians over the measured steps of all rounds, after two steps of warm-up.

Usage: python benchmarks/end_to_end.py [--rounds 2] [--steps 5]     makes .venv-trl at the first call

TRL 1.16.0 generates with transformers (its vLLM mode cannot load weights on a CPU), keeps the optimizer in bf16 (Keel:
fp32 master weights) and is given gradient_checkpointing=False, which is faster than its default.
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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from keel import files
from keel.config import loader
from keel.config.run import Settings
from keel.learner import loading
from keel.rollout.prompts import Prompts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
PINS = HERE / "requirements-trl.txt"
TRL_VENV = ROOT / ".venv-trl"
CHANGES = ["run.name=benchmark", "sampling.stop_token_ids=[]", "prompts.held_out=2", "metrics.port=0"]
WARM_UP_STEPS = 2
STAGES = {
    "generate": "sample the completions",
    "score": "rewards and reference log-probs",
    "recompute": "log-probs of the sampling policy (Keel has the sampler's)",
    "train": "forward, backward, optimizer",
    "sync": "weights to the generators (TRL samples from the trained module)",
}


@dataclass(frozen=True)
class Step:
    """One measured step."""

    stages: dict[str, float]
    """Seconds of each of STAGES, disjoint; 0 where the system has no such stage."""
    wall: float
    """Seconds from the end of the step before to the end of this one."""
    tokens: float
    """Completion tokens sampled and trained on."""


def keel(settings: Settings, steps: int, scratch: Path) -> list[Step]:
    """Steps of `keel train`, read from its metrics.jsonl."""
    # one step more than TRL: the last one also evaluates and saves, and is left out
    changes = [*CHANGES, f"run.steps={steps + 1}", f"run.directory={scratch / 'run'}"]
    command = [sys.executable, "-m", "keel", "train", str(CONFIG), *changes]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = files.read_json_lines(scratch / "run" / "metrics.jsonl")[WARM_UP_STEPS - 1 : steps]

    def step(old: dict[str, float], new: dict[str, float]) -> Step:
        def spent(total: str) -> float:
            return new[total] - old[total]

        stages = {
            "generate": spent("generate_seconds_total"),
            "score": spent("score_seconds_total"),
            "train": new["step_seconds"],
            "sync": new["weight_sync_seconds"],
        }
        return Step(dict.fromkeys(STAGES, 0.0) | stages, spent("time"), spent("trained_tokens_total"))

    return list(itertools.starmap(step, itertools.pairwise(lines)))


def trl(python: Path, settings: Settings, steps: int, scratch: Path) -> list[Step]:
    """Steps of TRL's trainer, run by the Python of its own environment."""
    samples, learners = settings.sampling.samples_per_prompt, settings.learners
    folder = loading.locate(settings.policy.model, "policy.model")
    prompts = Prompts(settings, loading.load_tokenizer(folder, "policy.model"))
    batch = prompts.batch(range(settings.buffer.groups_per_step * steps))
    job = {
        "model": str(folder),
        "system_prompt": settings.prompts.system_prompt,
        "prompts": batch.column("prompt").to_pylist()[::samples],
        "rows": settings.buffer.groups_per_step * samples,
        "samples": samples,
        "tokens": settings.sampling.max_tokens,
        "beta": settings.regularizer.kl.coefficient,
        "learning_rate": learners.learning_rate,
        "adam_betas": learners.adam_betas,
        "max_grad_norm": learners.max_grad_norm,
        "steps": steps,
        "scratch": str(scratch / "trl"),
        "result": str(scratch / "trl.json"),
    }
    (scratch / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": str(learners.threads), "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(HERE / "trl_rloo.py"), str(scratch / "job.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    measured = [Step(**step) for step in json.loads((scratch / "trl.json").read_text())]
    return [Step(dict.fromkeys(STAGES, 0.0) | step.stages, step.wall, step.tokens) for step in measured[WARM_UP_STEPS:]]


def environment() -> Path:
    """Python of TRL's own environment. The stamp is written last: what broke off is made again from nothing."""
    python, stamp = TRL_VENV / "bin" / "python", TRL_VENV / "setup-done"
    wanted = PINS.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing TRL into {TRL_VENV.name} (a minute or two)", file=sys.stderr)
        venv.create(TRL_VENV, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(PINS)]
        subprocess.run(command, check=True)
        stamp.write_text(wanted)
    return python


def report(rounds: list[dict[str, list[Step]]]) -> str:
    """Medians of both systems as a Markdown table, the rate of every round, and the ratio of the rates."""
    systems = list(rounds[0])
    steps = {system: [step for one in rounds for step in one[system]] for system in systems}

    def row(name: str, value: Callable[[Step], float], note: str) -> str:
        cells = [f"{statistics.median(map(value, steps[system])):.2f}" for system in systems]
        return f"| {name} | {' | '.join(cells)} | {note} |"

    lines = [f"| median seconds | {' | '.join(systems)} | what |", "|---|" + "---:|" * len(systems) + "---|"]
    lines += [row(name, partial(seconds, name), note) for name, note in STAGES.items()]
    lines.append(row("other", lambda step: step.wall - sum(step.stages.values()), "the rest of the step"))
    lines.append(row("step", lambda step: step.wall, "from step to step"))
    lines.append(row("tokens", lambda step: step.tokens, "completion tokens of a step"))
    lines.append("")
    for system in systems:
        each = ", ".join(f"{rate(one[system]):.1f}" for one in rounds)
        lines.append(f"{system}: {rate(steps[system]):.1f} completion tokens/s (rounds: {each})")
    lines.append(f"ratio {' / '.join(systems)}: {rate(steps[systems[0]]) / rate(steps[systems[1]]):.2f}")
    return "\n".join(lines)


def seconds(stage: str, step: Step) -> float:
    return step.stages[stage]


def rate(steps: list[Step]) -> float:
    """Completion tokens per second: median over steps."""
    return statistics.median(step.tokens / step.wall for step in steps)


def main() -> None:
    """Install TRL when needed, run the rounds, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="Keel and TRL in turn, this often (default 1)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each in a round (default 5)")
    options = parser.parse_args()
    python = environment()
    settings = loader.load(CONFIG, CHANGES)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"load average {load:.1f}: something else is running, the numbers will be off", file=sys.stderr)
    steps, rounds = options.steps + WARM_UP_STEPS, []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="keel-benchmark-") as scratch:
            ours = keel(settings, steps, Path(scratch))
            rounds.append({"Keel": ours, "TRL": trl(python, settings, steps, Path(scratch))})
    print(report(rounds))


if __name__ == "__main__":
    main()
