"""A run directory as an arm of a comparison: what each evaluation says of each held-out prompt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from keel import files
from keel.config import loader
from keel.errors import ConfigError
from keel.observability import evaluations as stored_evaluations
from keel.observability.diagnostics import per_completion
from keel.text import one_line

Prompt = tuple[int, str]
"""prompt_id and text: the row of the prompt source, and what stood in it."""


_SAME_REFERENCE = ("policy.model", "reference.model", "reference.ref_policy", "reference.iteration_steps")
_SAME_TEXT = ("prompts.system_prompt", "sampling.temperature", "sampling.top_p", "sampling.max_tokens")


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation says of each prompt."""

    step: int
    trained_tokens: float
    """Completion tokens the learner had trained on; NaN while metrics.jsonl has no line of the step."""
    values: Mapping[str, np.ndarray]
    """[prompts] by metric: mean over the prompt's samples; NaN where no sample has a value."""

    def level(self, matching: str) -> float:
        if matching == "kl":
            return float(self.values["kl_nats"].mean()) if "kl_nats" in self.values else math.nan
        return self.trained_tokens if matching == "tokens" else float(self.step)


@dataclass(frozen=True)
class Arm:
    """One run."""

    name: str
    directory: Path
    settings: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    """In ascending order, which is that of every [prompts]."""
    evaluations: tuple[Evaluation, ...]
    """By step; at least one."""


def load(directory: Path) -> Arm:
    """A run from its directory, finished or not. Raises ConfigError, one line, when it has nothing to compare."""
    stored = loader.stored_config(directory, f"run {directory}")
    try:
        settings = yaml.safe_load(stored.read_text(encoding="utf8"))
        lines = files.read_json_lines(directory / "metrics.jsonl")
        steps = [int(row["step"]) for row in stored_evaluations.frontier(directory)]
        batches = [stored_evaluations.load(directory, step) for step in steps]
    except (OSError, ValueError, yaml.YAMLError) as error:  # Arrow's and JSON's errors are ValueErrors
        raise ConfigError(f"run {directory}: {one_line(error)}; expected the files of a run") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"run {directory}: config.yaml has no settings in it; expected the directory of a run")
    if not batches:
        raise ConfigError(f"run {directory}: no evaluation in it; expected evaluations/ and frontier.arrow")
    tokens = {0: 0.0} | {line["step"]: line.get("trained_tokens_total", math.nan) for line in lines}
    read = [per_prompt(batch) for batch in batches]
    for step, (prompts, _) in zip(steps, read, strict=True):
        if prompts != read[0][0]:
            raise ConfigError(f"run {directory}: step {step} was evaluated on other prompts than step {steps[0]}")
    evaluations = [
        Evaluation(step, tokens.get(step, math.nan), values) for step, (_, values) in zip(steps, read, strict=True)
    ]
    return Arm(directory.resolve().name, directory, settings, read[0][0], tuple(evaluations))


def per_prompt(batch: pa.RecordBatch) -> tuple[tuple[Prompt, ...], dict[str, np.ndarray]]:
    """Prompts in ascending order, and every shown value [prompts] as the mean over the prompt's samples."""
    rows = list(zip(batch.column("prompt_id").to_pylist(), batch.column("prompt").to_pylist(), strict=True))
    prompts = tuple(sorted(set(rows)))
    place = {prompt: number for number, prompt in enumerate(prompts)}
    group = np.array([place[row] for row in rows])
    values = per_completion(batch)
    means = {}
    for name in stored_evaluations.shown(values):
        known = np.isfinite(values[name])
        count = np.bincount(group[known], minlength=len(prompts))
        total = np.bincount(group[known], values[name][known], minlength=len(prompts))
        means[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return prompts, means


def notes(arms: Sequence[Arm], names: Sequence[str]) -> list[str]:
    """What differs between the settings of the first arm and another, and which metric that touches."""
    lines = []
    for arm, name in zip(arms[1:], names[1:], strict=True):
        if _rewards(arm) != _rewards(arms[0]):
            lines.append(f"{name} has other rewards than {names[0]}: `reward` is another quantity in each")
        for keys, consequence in (
            (_SAME_REFERENCE, "KL is to another policy"),
            (_SAME_TEXT, "the answers differ by more than training"),
        ):
            if changed := [key for key in keys if _setting(arm, key) != _setting(arms[0], key)]:
                lines.append(f"{name} differs from {names[0]} in {', '.join(changed)}: {consequence}")
    return lines


def _rewards(arm: Arm) -> list[tuple[Any, ...]]:
    """What the number `reward` is made of."""
    blocks = [block for block in arm.settings.get("rewards", []) if block.get("role", "train") == "train"]
    return [tuple(block.get(key) for key in ("name", "kind", "source", "weight")) for block in blocks]


def _setting(arm: Arm, path: str) -> Any:
    block, key = path.split(".")
    return (arm.settings.get(block) or {}).get(key)
