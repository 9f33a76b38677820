"""Draw the curves of two runs side by side and print one held-out answer of each.

Usage: python benchmarks/contrast.py runs/quickstart runs/quickstart-maxent docs/images/contrast.svg
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from keel import files
from keel.observability import evaluations

PANELS = {
    "reward": "reward (VADER)",
    "kl_nats": "KL to the reference (nats)",
    "policy_entropy_nats": "entropy (nats a token)",
    "length_tokens": "length (tokens)",
}


def curves(run: Path) -> list[dict[str, Any]]:
    return files.read_json_lines(run / "metrics.jsonl")


def draw(runs: list[Path], target: Path) -> None:
    """One panel a metric, one line a run."""
    plt.rcParams["svg.hashsalt"] = "keel"  # the same picture for the same numbers
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.2))
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for run in runs:
            lines = curves(run)
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=run.name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def table(runs: list[Path]) -> str:
    """Every fifth step of each run as Markdown."""
    rows = [
        "| run | step | reward | KL (nats) | entropy (nats/token) | length | distinct | log-prob under reference |",
        "|" + "---|" * 8,
    ]
    for run in runs:
        for line in curves(run):
            if line["step"] == 1 or line["step"] % 5 == 0:
                part = line["reward_component"]
                cells = [line[name] for name in PANELS] + [part["distinct"], part["fluency"]]
                rows.append(f"| {run.name} | {line['step']} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(rows)


def answers(runs: list[Path], row: int) -> str:
    """The same held-out prompt before training and at the end of each run."""
    steps = {run: int(evaluations.frontier(run)[-1]["step"]) for run in runs}
    first = evaluations.load(runs[0], 0)
    lines = [f"prompt: {first.column('prompt')[row].as_py()}", f"before: {text(first, row)}"]
    lines += [f"{run.name}, step {step}: {text(evaluations.load(run, step), row)}" for run, step in steps.items()]
    return "\n".join(lines)


def text(batch: Any, row: int) -> str:
    return f"({batch.column('reward')[row].as_py():+.2f}) " + " ".join(batch.column("completion")[row].as_py().split())


if __name__ == "__main__":
    *folders, picture = map(Path, sys.argv[1:])
    draw(folders, picture)
    print(table(folders))
    for number in (0, 20, 40):
        print("\n" + answers(folders, number))
