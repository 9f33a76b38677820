"""What `keel plan` predicts against what runs take: one run is measured, the step time of others is predicted.

A tiny random model (keel.learner.tiny) on the CPU, 4 prompts x 8 answers x 128 tokens a step, a reward that sleeps: so
two cores hold a run of which one stage is long without computing. `measured` runs give the rates, every case is
predicted from the rates of its `measured` run alone; what the case changes in the reward's sleep is added to the
scorer's seconds by hand.

Usage: python benchmarks/plan_validation.py RUNS [--only CASE ...]     runs what is missing in the folder RUNS,
       then writes benchmarks/results/plan_validation.json from all runs that are there
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from keel import files

PACE = "KEEL_BENCHMARK_PACE_SECONDS"
HERE = Path(__file__).resolve().parent
STEPS = 12
WARM_UP_STEPS = 2
CORES = len(os.sched_getaffinity(0))


def paced(completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Share of the tokens with an id below 100, after a sleep."""
    time.sleep(float(os.environ.get(PACE, "0")))
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


@dataclass(frozen=True)
class Case:
    overrides: list[str] = field(default_factory=list)
    pace_seconds: float = 0.6
    measured: str = "base"
    """The run whose rates predict this one."""


CASES = {
    "base": Case(),
    "base again": Case(["run.seed=1"]),
    "staleness 1": Case(["buffer.max_staleness=1"]),
    "staleness 2": Case(["buffer.max_staleness=2"]),
    "two generators": Case(["generators.count=2"]),
    "two generators, two scorers": Case(["generators.count=2", "scorers.count=2"]),
    "two generators, staleness 1, batches of one group": Case(
        ["generators.count=2", "buffer.max_staleness=1", "buffer.groups_per_batch=1"]
    ),
    "groups_per_step 8": Case(["buffer.groups_per_step=8"]),
    "groups_per_step 12, two batches, staleness 1": Case(
        ["buffer.groups_per_step=12", "buffer.groups_per_batch=6", "buffer.max_staleness=1"]
    ),
    "slow reward": Case(pace_seconds=2.5),
    "slow reward, staleness 1, two scorers, two batches": Case(
        ["buffer.max_staleness=1", "scorers.count=2", "buffer.groups_per_batch=2"], pace_seconds=2.5
    ),
    "two ranks": Case(["learners.count=2"]),
    "no sleep": Case(pace_seconds=0.0, measured="no sleep"),
    "no sleep, staleness 1": Case(["buffer.max_staleness=1"], pace_seconds=0.0, measured="no sleep"),
    "no sleep, two generators, staleness 1": Case(
        ["buffer.max_staleness=1", "generators.count=2"], pace_seconds=0.0, measured="no sleep"
    ),
}


def folder_of(runs: Path, name: str) -> Path:
    return runs / name.replace(", ", "-").replace(" ", "-")


def train(runs: Path, name: str) -> None:
    """One run of a case by the command line."""
    import yaml

    from keel.cli import doctor
    from keel.learner import tiny

    case, folder = CASES[name], folder_of(runs, name)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was ended
    folder.mkdir(parents=True)
    model = runs / "model"
    if not model.is_dir():
        tiny.write(model)
    path = doctor.self_test_config(folder, str(model))
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree["run"] |= {"name": "plan-validation", "steps": STEPS}
    tree["sampling"] |= {"samples_per_prompt": 8, "max_tokens": 128, "stop_token_ids": []}
    tree["rewards"] = [{"name": "paced", "source": "plan_validation:paced"}]
    tree["buffer"] = {"groups_per_step": 4}
    tree["evaluation"] = tree["checkpoint"] = {"every_steps": 0}
    path.write_text(yaml.safe_dump(tree))
    paths = [str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {PACE: str(case.pace_seconds), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "keel", "train", str(path), *case.overrides]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr, timeout=280)


def result(runs: Path, name: str) -> dict[str, Any]:
    """Measured and predicted numbers of a case."""
    from keel.analysis import measurement
    from keel.analysis.plan import Machine, predict
    from keel.cluster.capacity import configured
    from keel.config import loader

    case = CASES[name]
    measured = CASES[case.measured]
    rates = measurement.measured([folder_of(runs, case.measured) / "run"])
    if case.pace_seconds:  # a sleeping reward leaves the cores to others
        scorer = rates.scorer
        fixed = scorer.fixed_seconds + case.pace_seconds - measured.pace_seconds
        rates = rates.model_copy(
            update={"scorer": scorer.model_copy(update={"fixed_seconds": fixed, "cpu_ratio": 0.0})}
        )
    settings = loader.load(folder_of(runs, name) / "run" / "config.yaml")
    found = predict(settings, rates, configured(settings), Machine(cores=float(CORES)), steps=100)
    seconds, busy = _measured(folder_of(runs, name) / "run", found.counts)
    return {
        "case": name,
        "rates_of": case.measured,
        "overrides": case.overrides,
        "reward_sleeps_seconds": case.pace_seconds,
        "measured_median_step_seconds": round(statistics.median(seconds), 3),
        "measured_mean_step_seconds": round(statistics.mean(seconds), 3),
        "measured_steps": len(seconds),
        "predicted_step_seconds": round(found.step_seconds, 3),
        "error_ratio": round(found.step_seconds / statistics.median(seconds) - 1, 3),
        "measured_busy_ratio": busy,
        "predicted_busy_ratio": {role: round(share, 2) for role, share in found.busy.items()},
    }


def _measured(run: Path, counts: Mapping[str, int]) -> tuple[list[float], dict[str, float]]:
    """Seconds of the steps between warm-up and last, and shares of worker seconds that were busy in them."""
    lines = files.read_json_lines(run / "metrics.jsonl")[WARM_UP_STEPS - 1 : -1]
    seconds = [after["time"] - before["time"] for before, after in pairwise(lines)]
    first, last = lines[0]["busy_seconds_total"], lines[-1]["busy_seconds_total"]
    elapsed = lines[-1]["time"] - lines[0]["time"]
    busy = {role: round((last[role] - first[role]) / (elapsed * count), 2) for role, count in counts.items()}
    return seconds, busy


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = [
        f"| {each['case']} | {each['rates_of']} | {each['measured_median_step_seconds']:.2f}"
        f" | {each['predicted_step_seconds']:.2f} | {each['error_ratio']:+z.0%}"
        f" | {_shares(each['measured_busy_ratio'])} | {_shares(each['predicted_busy_ratio'])} |"
        for each in results
    ]
    head = "| run | rates of | measured s (median) | predicted s | error | busy, measured | busy, predicted |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def _shares(busy: Mapping[str, float]) -> str:
    return " / ".join(f"{busy[role]:.0%}" for role in ("generator", "reference", "scorer", "learner"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    for name in options.only:
        if not (folder_of(options.runs, name) / "run" / "checkpoints").is_dir():
            train(options.runs, name)
    present = [name for name in CASES if (folder_of(options.runs, name) / "run" / "checkpoints").is_dir()]
    results = [result(options.runs, name) for name in present if CASES[name].measured in present]
    files.write_json(HERE / "results" / "plan_validation.json", {"cores": CORES, "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
