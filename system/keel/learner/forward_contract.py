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
        return Verdict(
            self.alone and other.alone,
            self.shared and other.shared,
            self.packed and other.packed,
            {**other.reasons, **self.reasons},
        )


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
            return _refused(f"its own forward fails: {type(error).__name__}: {one_line(error)[:120]}")
        spread = float(np.std(expected))
        if not np.isfinite(spread):
            return _refused("its own forward gives numbers that are not finite")
        model.train()
        reasons = {}
        for name, budget in _budgets(rows).items():
            reason = difference(functools.partial(_through_keel, model, rows, budget), expected, spread)
            if reason:
                reasons[name] = reason
    finally:
        model.train(training)
    return Verdict("alone" not in reasons, "shared" not in reasons, "packed" not in reasons, reasons)


def _refused(reason: str) -> Verdict:
    return Verdict(False, False, False, dict.fromkeys(("alone", "shared", "packed"), reason))


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
    """What holds with the weights and rows of any one seed: a wrong pass is wrong with all, rounding that flips a
    discrete choice (an expert, a top-k of keys) is not."""
    verdicts = []
    for seed in seeds:
        verdicts.append(check(build(seed), tokens_per_row, seed))
        if not verdicts[-1].reasons:
            return verdicts[-1]
    held = {name: any(getattr(verdict, name) for verdict in verdicts) for name in ("alone", "shared", "packed")}
    reasons = {name: verdicts[0].reasons.get(name, "") for name, holds in held.items() if not holds}
    return Verdict(**held, reasons=reasons)


def verdict(folder: Path, longest_row: int | None = None) -> Verdict:
    """The verdict on the model of a folder, from the cache or made now, in about a second.

    Where the configuration cannot be scaled down, the model itself is tried.
    """
    config = loading.without_dropout(folder)
    try:
        small = scaled_down_models.scale_down(config, longest_row)
        return _once(key_of(small), lambda: _of_scaled_down(small))
    except ScaleDownError:
        return _once(key_of(config, longest_row), lambda: _of_itself(folder, config, longest_row))


def _once(key: str, make: Callable[[], Verdict]) -> Verdict:
    """The verdict that an earlier process kept under this key, or that is made now."""
    if (kept := kept_result(key)) is not None:
        return Verdict(**kept)
    result = make()
    keep_result(key, dataclasses.asdict(result))
    return result


def _of_itself(folder: Path, config: Any, longest_row: int | None) -> Verdict:
    """The verdict from the model itself, on rows that it has positions for and that the run can have.

    A window that is longer than every row of the run never matters.
    """
    limits = (longest_row, getattr(config.get_text_config(), "max_position_embeddings", None))
    longest = min([limit for limit in limits if limit] or [2 * _MORE_TOKENS])
    tokens = min(scaled_down_models.row_tokens(config), longest - _MORE_TOKENS)
    return check(loading.load_policy(folder, "float32").model, max(tokens, 1))


def kept_result(key: str) -> dict[str, Any] | None:
    """What an earlier process found under this key."""
    path = loading.cache_directory() / "forward_contract" / f"{key}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None


def keep_result(key: str, result: Mapping[str, Any]) -> None:
    """Keep a result for other processes, of which several may do so at once."""
    path = loading.cache_directory() / "forward_contract" / f"{key}.json"
    aside = path.with_name(f"{key}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a home that cannot be written to: the next process tries the model again
        files.write_json(aside, result)
        aside.rename(path)


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
