"""Run directories as arms of a comparison: what each evaluation says of each held-out prompt; seeds of one arm."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
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


_ARM_NAME = r"[A-Za-z0-9._-]+"
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
class Run:
    """One run."""

    name: str
    directory: Path
    settings: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    """In ascending order, which is that of every [prompts]."""
    evaluations: tuple[Evaluation, ...]
    """By step; at least one."""

    @property
    def seed(self) -> int:
        return int((self.settings.get("run") or {}).get("seed", 0))


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone, or that the user put together."""

    name: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"


def named_directory(argument: str) -> tuple[str | None, Path]:
    """The arm and the directory of `RUN` or `ARM=RUN`; a directory whose path has an equals sign is a directory."""
    name, separator, path = argument.partition("=")
    named = separator and re.fullmatch(_ARM_NAME, name) and not Path(argument).exists()
    return (name, Path(path)) if named else (None, Path(argument))


def arms_of(runs: Sequence[Run], names: Sequence[str | None]) -> list[Arm]:
    """Group runs by the names that they were given, the others by their settings apart from the seed.

    A second run of a seed with the same settings is a repetition, no other seed: it belongs to another arm.
    """
    members: dict[tuple[str, str, int], list[Run]] = {}
    repeats: Counter[tuple[str, int]] = Counter()
    for run, name in zip(runs, names, strict=True):
        settings = _settings_of_arm(run)
        key = ("named", name, 0) if name is not None else ("settings", settings, repeats[settings, run.seed])
        repeats[settings, run.seed] += name is None
        members.setdefault(key, []).append(run)
    arms = [Arm(key[1] if key[0] == "named" else _common_name(group), tuple(group)) for key, group in members.items()]
    counts = Counter(arm.name for arm in arms)
    for number, (kind, *_) in enumerate(members):
        arm = arms[number]
        if kind == "named":
            _check_different(arm)
        elif counts[arm.name] > 1:
            arms[number] = Arm(f"{arm.runs[0].directory} (run {number + 1})", arm.runs)
    return arms


def _check_different(arm: Arm) -> None:
    """Raise ConfigError where a run was put into an arm twice: it would count as two seeds that agree."""
    directories = Counter(run.directory.resolve() for run in arm.runs)
    if repeated := [directory for directory, count in directories.items() if count > 1]:
        raise ConfigError(f"arm {arm.name}: has {repeated[0]} twice; expected different runs")


def _settings_of_arm(run: Run) -> str:
    """What runs of one arm have in common: every setting that can change a number, without the seed."""
    tree = {block: value for block, value in run.settings.items() if block not in loader.OF_THE_PLACE}
    identity = tree.get("run") or {}
    tree["run"] = {key: value for key, value in identity.items() if key not in ("name", "directory", "seed")}
    return json.dumps(tree, sort_keys=True, default=str)


def _common_name(runs: Sequence[Run]) -> str:
    """What the names of runs begin with: kl of kl-seed-0 and kl-seed-1."""
    columns = takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs), strict=False))
    shared = "".join(letters[0] for letters in columns)
    return runs[0].name if len(runs) == 1 else re.sub(r"([-_.](seed|s))?[-_.]*$", "", shared) or runs[0].name


def load(directory: Path) -> Run:
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
    return Run(directory.resolve().name, directory, settings, read[0][0], tuple(evaluations))


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


def notes(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """What differs between the settings of the first run and another, and which metric that touches.

    `names`: of the runs' arms, each of which is named once.
    """
    lines = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        if _rewards(run) != _rewards(runs[0]):
            lines.append(f"{name} has other rewards than {names[0]}: `reward` is another quantity in each")
        for keys, consequence in (
            (_SAME_REFERENCE, "KL is to another policy"),
            (_SAME_TEXT, "the answers differ by more than training"),
        ):
            if changed := [key for key in keys if _setting(run, key) != _setting(runs[0], key)]:
                lines.append(f"{name} differs from {names[0]} in {', '.join(changed)}: {consequence}")
    return list(dict.fromkeys(lines))


def _rewards(run: Run) -> list[tuple[Any, ...]]:
    """What the number `reward` is made of."""
    blocks = [block for block in run.settings.get("rewards", []) if block.get("role", "train") == "train"]
    return [tuple(block.get(key) for key in ("name", "kind", "source", "weight")) for block in blocks]


def _setting(run: Run, path: str) -> Any:
    block, key = path.split(".")
    return (run.settings.get(block) or {}).get(key)
