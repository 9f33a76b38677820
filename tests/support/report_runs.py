"""Run directories for reports: an online run of known curves, with gold that turns down, events and rollouts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, schema
from keel.config import loader
from keel.observability import evaluations
from rollouts import generated, prompts, referenced, scored
from runs import settings

HOSTILE = (
    "</script><script>alert(1)</script><!-- \"quoted\" 'single' &amp; \u202eevil\u2028line \x00\x1b[31m \u200f\u0627"
)


def proxy(distance: float) -> float:
    """Training reward at this square root of the KL."""
    return 0.22 * distance


def gold(distance: float) -> float:
    """Gold there: highest at a distance of 2.5."""
    return 0.25 * distance - 0.05 * distance**2


def batch(
    tickets: Sequence[int], samples: int, distance: float, seed: int, tokens: int = 12, hostile: bool = False
) -> pa.RecordBatch:
    """Scored rows whose KL is on average the square of the distance, their rewards the two curves and noise."""
    draw = np.random.default_rng(seed)
    rows = len(tickets) * samples
    lengths = draw.integers(max(tokens // 2, 1), tokens + 1, rows)
    logprobs = [(-1.5 - draw.random(length)).tolist() for length in lengths]
    out = generated(prompts(tickets, samples), logprobs=logprobs)
    ratios = [draw.normal(distance**2 / length, 0.4, length) for length in lengths]
    reference = [np.minimum(np.array(row) - ratio, 0.0).tolist() for row, ratio in zip(logprobs, ratios, strict=True)]
    rewards = (proxy(distance) + 0.2 * draw.normal(size=rows)).tolist()
    golds = (gold(distance) + 0.2 * draw.normal(size=rows)).tolist()
    out = scored(referenced(out, reference), rewards, {"gold": golds})
    return _with_text(out, HOSTILE) if hostile else out


def _with_text(rows: pa.RecordBatch, text: str) -> pa.RecordBatch:
    for name in ("prompt", "completion"):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(
            place, rows.schema.field(place), pa.array([f"{text}{n % 3}" for n in range(rows.num_rows)])
        )
    return rows


def line(step: int, distance: float, seed: int) -> dict[str, Any]:
    """A line of metrics.jsonl; counters grow by the same amounts in every step."""
    noise = np.random.default_rng([seed, step]).normal(size=4)
    return {
        "step": step,
        "time": 1000.0 + 10.0 * step,
        "version": float(step),
        "reward": proxy(distance) + 0.02 * noise[0],
        "reward_component": {"length": proxy(distance) + 0.02 * noise[0], "gold": gold(distance) + 0.02 * noise[1]},
        "kl_nats": distance**2,
        "entropy_nats": 2.5 * math.exp(-0.2 * distance) + 0.02 * noise[2],
        "length_tokens": 11.0 + noise[3],
        "loss": -0.3 + 0.1 * noise[0],
        "policy_loss": -0.35 + 0.1 * noise[0],
        "grad_norm": 2.0 + abs(noise[1]),
        "step_seconds": 3.0 + 0.2 * abs(noise[2]),
        "generate_tokens_per_second": 40.0 + noise[3],
        "staleness_mean_versions": 0.5,
        "staleness_max_versions": 1.0,
        "trained_tokens_total": 700.0 * step,
        "workers": {"generator": 2.0, "learner": 1.0},
        "busy_seconds_total": {"generator": 12.0 * step, "learner": 3.0 * step},
        "idle_seconds_total": {"generator/learner": 8.0 * step, "learner/generator": 7.0 * step},
        "phase_seconds_total": {"rollouts": 7.0 * step, "learner_step": 3.0 * step},
        "samples_failed_total": {"broken": 2.0} if step > 3 else {},
    }


def online(
    directory: Path,
    steps: int = 20,
    rows: int = 8,
    every: int = 5,
    seed: int = 7,
    hostile: bool = False,
    tokens: int = 12,
    prompts_held_out: int = 16,
    **blocks: Any,
) -> Path:
    """A finished run that ends at a square root of the KL of 4; `blocks` are further settings."""
    run = {"name": directory.name, "seed": seed, "steps": steps}
    files.write(
        directory / "config.yaml", loader.dump(settings(**{"name": directory.name, **blocks, "run": run})).encode()
    )
    for step in range(steps + 1):
        distance = 4.0 * step / max(steps, 1)
        if step % every == 0 or step == steps:
            held_out = batch(range(prompts_held_out), 1, distance, 1000 * seed + step, tokens, hostile)
            evaluations.store(directory, step, held_out)
        if step:
            groups = range((step - 1) * rows // 4, step * rows // 4)
            trained = batch(groups, 4, distance, 5000 * seed + step, tokens, hostile)
            files.write(directory / "rollouts" / f"step-{step:06d}.arrow", schema.to_bytes(trained))
    lines = [line(step, 4.0 * step / steps, seed) for step in range(1, steps + 1)]
    _write_lines(directory / "metrics.jsonl", lines)
    _write_lines(directory / "events.jsonl", events(steps))
    return directory


def events(steps: int) -> list[dict[str, Any]]:
    """A calm start, a lost generator at a third of the run, a warning of the guard at two thirds."""
    return [
        {"event": "worker_started", "time": 900.0, "role": "generator", "worker": "generator-0", "seconds": 3.0},
        {"event": "running", "time": 950.0, "step": 0, "ranks": 1, "seconds": 5.0},
        {"event": "worker_lost", "time": 1001.0 + 10.0 * (steps // 3), "role": "generator", "reason": HOSTILE},
        {"event": "retry", "time": 1002.0 + 10.0 * (steps // 3), "reason": "lost"},
        firing("kl_slope", 2 * steps // 3, ["warn"]),
        {"event": "checkpoint", "time": 1001.0 + 10.0 * steps, "step": steps},
    ]


def firing(detector: str, step: int, actions: list[str]) -> dict[str, Any]:
    """The event of a detector of the guard."""
    event = {"event": "guard", "time": 1001.0 + 10.0 * step, "detector": detector, "step": step}
    return {**event, "statistic": 3.5, "low": 2.5, "high": 4.5, "threshold": 2.0, "actions": actions}


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    files.write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
