"""The forward contract: Keel's log-probs of a row are those of the model's own plain forward, for every family.

    alone    rows of different lengths in one padded batch         a family that fails this is refused
    shared   samples of a prompt behind one copy of it             else: one row a sequence
    packed   rows of different prompts in one sequence             else: one row a sequence

Each is tried on rows longer than any window of the model, in training mode (which is the learner's), against the model
reading the same row on its own in evaluation mode. Weights are random and logits far from uniform, so a token that a
row must not see changes its numbers by much more than rounding does.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from keel import files, schema
from keel.errors import ConfigError
from keel.learner import loading, packing, scaled_down_models
from keel.learner.networks import Policy
from keel.learner.scaled_down_models import ScaleDownError
from keel.text import one_line

TOLERANCE = 1e-3
"""Largest difference of two log-probs, in units of their spread over tokens, that counts as rounding."""
PASSES = ("alone", "shared", "packed")
_SEEDS = (0, 1, 2)
_MORE_TOKENS = 19
"""By which the longest row that is tried exceeds `tokens_per_row`."""
_EDITION = 1
"""Of what is tried: verdicts of another edition are made again."""


@dataclass(frozen=True)
class Verdict:
    """Which passes of Keel's give the numbers of a family's own forward; where one does not, why."""

    alone: bool = True
    shared: bool = True
    packed: bool = True
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is wrong with each pass that fails."""

    def both(self, other: "Verdict") -> "Verdict":
        """What holds for two models that read the same micro-batches."""
        return _failing({**other.reasons, **self.reasons})


def check(model: Any, tokens_per_row: int, seed: int = 0) -> Verdict:
    """Compare Keel's passes with the forward of a language model (transformers' ...ForCausalLM, fp32, on a CPU).

    `tokens_per_row`: some rows are longer than this. The model's mode is put back; its weights are left alone.
    """
    training = model.training
    rows = _rows(model.config.get_text_config().vocab_size, tokens_per_row, seed)
    try:
        try:
            expected = _plain(model.eval(), rows)
        except Exception as error:  # what a family's code makes of a plain row of tokens
            reason = f"its own forward fails: {type(error).__name__}: {one_line(error)[:120]}"
            return _failing(dict.fromkeys(PASSES, reason))
        spread = float(np.std(expected))
        if not np.isfinite(spread):
            return _failing(dict.fromkeys(PASSES, "its own forward gives numbers that are not finite"))
        model.train()
        reasons = {
            name: difference(functools.partial(_through_keel, model, rows, budget), expected, spread)
            for name, budget in _budgets(rows).items()
        }
    finally:
        model.train(training)
    return _failing({name: reason for name, reason in reasons.items() if reason})


def _failing(reasons: dict[str, str]) -> Verdict:
    return Verdict("alone" not in reasons, "shared" not in reasons, "packed" not in reasons, reasons)


def _rows(vocabulary: int, tokens_per_row: int, seed: int) -> pa.RecordBatch:
    """Prompts with several completions, of unlike lengths; the longest prompt alone is longer than a window."""
    rng = np.random.default_rng(seed)
    ids = (min(scaled_down_models.FIRST_ORDINARY_TOKEN, vocabulary - 1), vocabulary)
    lengths = [(tokens_per_row + 5, (9, 3, 14)), (7, (5, tokens_per_row, 2)), (11, (6, 4))]
    tickets, prompts, completions = [], [], []
    for ticket, (prompt, answers) in enumerate(lengths):
        tokens = rng.integers(*ids, prompt)
        for answer in answers:
            tickets.append(ticket)
            prompts.append(tokens)
            completions.append(rng.integers(*ids, answer))
    return pa.record_batch(
        {
            "ticket": pa.array(tickets, pa.int64()),
            "prompt_tokens": pa.array(prompts, schema.TOKENS),
            "completion_tokens": pa.array(completions, schema.TOKENS),
        }
    )


def _budgets(rows: pa.RecordBatch) -> dict[str, packing.TokenBudget]:
    tokens = int(schema.lengths(rows, "prompt_tokens").sum() + schema.lengths(rows, "completion_tokens").sum())
    every = rows.num_rows * tokens  # one pass, whatever its padding
    return {
        "alone": packing.TokenBudget(every, 0, 16),
        "shared": packing.TokenBudget(every, tokens, 16),
        "packed": packing.TokenBudget(every, tokens, 16, packed_tokens=tokens),
    }


@torch.no_grad()
def _plain(model: Any, rows: pa.RecordBatch) -> np.ndarray:
    """float64 log-probs of all completion tokens, each row read by the model on its own."""
    logprobs = []
    pairs = zip(*(rows.column(name).to_pylist() for name in ("prompt_tokens", "completion_tokens")), strict=True)
    for prompt, completion in pairs:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        logprobs.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logprobs).numpy()


@torch.no_grad()
def _through_keel(model: Any, rows: pa.RecordBatch, budget: packing.TokenBudget) -> np.ndarray:
    """The same through the micro-batches that training makes."""
    policy = Policy(model)
    flat = np.zeros(int(schema.lengths(rows, "completion_tokens").sum()))
    plan = packing.plan(rows, ranks=1, budget=budget)
    for units, chunks in zip(plan.micro_batches[0], plan.head_chunks, strict=True):
        micro = packing.tensors(rows, units)
        flat[micro.items] = policy(micro, 1.0, chunks, entropy=False)[0].double().numpy()
    return flat


def difference(through: Callable[[], np.ndarray], expected: np.ndarray, spread: float) -> str:
    """Why a pass is not the model's own; empty where it is."""
    try:
        logprobs = through()
    except Exception as error:  # what a family's code makes of arguments that it does not know
        return f"{type(error).__name__}: {one_line(error)[:120]}"
    largest = float(np.abs(logprobs - expected).max())
    if largest <= TOLERANCE * spread:  # False for NaN
        return ""
    return f"log-probs differ by up to {largest:.2g} nats"


def of_config(config: Any, longest_row: int | None = None) -> Verdict:
    """The verdict on a configuration, from a small model with the same layers. Raises ScaleDownError.

    `longest_row`: tokens of the longest row of a run, for rotary embeddings that change beyond a length.
    """
    return _of_scaled_down(scaled_down_models.scale_down(config, longest_row))


def _of_scaled_down(small: Any) -> Verdict:
    return of_seeds(lambda seed: scaled_down_models.build(small, seed), scaled_down_models.row_tokens(small))


def of_seeds(build: Callable[[int], Any], tokens_per_row: int, seeds: Sequence[int] = _SEEDS) -> Verdict:
    """Try several seeds: a wrong pass fails with all, rounding that flips a discrete choice (an expert) does not."""
    verdicts = []
    for seed in seeds:
        verdicts.append(check(build(seed), tokens_per_row, seed))
        if not verdicts[-1].reasons:
            return verdicts[-1]
    failed = [name for name in PASSES if not any(getattr(verdict, name) for verdict in verdicts)]
    reasons = {name: verdicts[0].reasons.get(name, "") for name in failed}
    return _failing(reasons)


def verdict(folder: Path, longest_row: int | None = None) -> Verdict:
    """The verdict on the model of a folder, from the cache or a scaled-down model; else from the model itself."""
    config = loading.without_dropout(folder)
    try:
        small = scaled_down_models.scale_down(config, longest_row)
        result = kept(key_of(small), lambda: dataclasses.asdict(_of_scaled_down(small)))
    except ScaleDownError:
        make = functools.partial(_of_itself, folder, config, longest_row)
        result = kept(key_of(config, longest_row), lambda: dataclasses.asdict(make()))
    return Verdict(**result)


def _of_itself(folder: Path, config: Any, longest_row: int | None) -> Verdict:
    """The verdict from the model itself, on rows as long as it and the run allow: longer windows never matter."""
    limits = (longest_row, getattr(config.get_text_config(), "max_position_embeddings", None))
    longest = min([limit for limit in limits if limit] or [2 * _MORE_TOKENS])
    tokens = min(scaled_down_models.row_tokens(config), longest - _MORE_TOKENS)
    return check(loading.load_policy(folder, "float32").model, max(tokens, 1))


def kept(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result that an earlier process kept under this key; else make it, and keep it for other processes."""
    path = loading.cache_directory() / "forward_contract" / f"{key}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf8"))
    result = make()
    aside = path.with_name(f"{key}.{os.getpid()}")  # several processes may be at it
    with contextlib.suppress(OSError):  # a home that cannot be written to: the next process tries the model again
        files.write_json(aside, result)
        aside.rename(path)
    return result


def key_of(config: Any, *more: Any) -> str:
    """Digest of all that a verdict depends on; the folder that a configuration was read from is not of it."""
    packages = {name: version(name) for name in ("transformers", "torch")}
    content = {"config": config.to_dict(), "more": more, "packages": packages, "edition": _EDITION}
    return files.digest_of(json.dumps(_without_names(content), sort_keys=True, default=str).encode())


def _without_names(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _without_names(value) for key, value in tree.items() if key != "_name_or_path"}


def require(folders: Mapping[str, Path | str], longest_row: int) -> list[str]:
    """Hold the models of these folders (by the setting that names each) to the contract.

    Returns a line for every model that can read only one row a sequence. Raises ConfigError for a model whose pass over
    a row alone is wrong.
    """
    notes = []
    settings = {str(folder): setting for setting, folder in reversed(list(folders.items()))}  # the first that names it
    for folder, setting in settings.items():
        result = verdict(Path(folder), longest_row)
        family = loading.read_config(Path(folder), setting).get("model_type")
        if not result.alone:
            raise ConfigError(
                f"{setting}={folder}: the log-probs that Keel computes for {family} are not the model's own"
                f" ({result.reasons['alone']}); expected a family that docs/use/models.md does not list as refused"
            )
        failing = [name for name in ("shared", "packed") if name in result.reasons]
        if failing:
            notes.append(f"{setting}: {family} takes one row a sequence ({failing[0]}: {result.reasons[failing[0]]})")
    return notes
