"""The rollouts that a report embeds: of every part of a run, the extremes, the same held-out prompts at each step.

A page that holds every row of a run does not open. So rows are chosen: of evaluations all rows of evenly chosen
prompts; of training rows the extremes of reward, proxy minus gold and KL, and the rest evenly over steps and rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from keel import checkpoint, reads, schema
from keel.analysis.report_curves import evenly
from keel.observability import evaluations
from keel.observability.diagnostics import per_completion

MOST_ROWS = 1500
"""Rows of a page, all runs together."""
MOST_TOKENS = 150_000
"""Completion tokens of a page: rows with long completions are fewer."""
MOST_FILES = 200
"""Steps of a run whose rollout files are read, evenly chosen."""
_FEWEST_ROWS = 60
_EVALUATIONS = 12
_EVALUATION_SHARE = 0.4
_EXTREMES = 12
"""Rows of each extreme."""
_LONGEST_CHARACTERS, _LONGEST_TOKENS = 4000, 600


@dataclass(frozen=True)
class Row:
    """One completion."""

    source: str
    """`training` or `evaluation`."""
    step: int
    prompt_id: int
    prompt: str
    completion: str
    finish_reason: str
    rewards: dict[str, float | None]
    """reward and every reward_<name>."""
    gap: float | None
    """Proxy minus gold; None without a gold."""
    kl_nats: float | None
    length_tokens: int
    pieces: list[str]
    """Text of each token, empty inside a character of several tokens, its id where it has no text; no piece at all
    where no token has a log-ratio."""
    log_ratios: list[float]
    """log pi - log ref of each token in nats, to 0.01."""


@dataclass(frozen=True)
class Rows:
    """Chosen rows of a run, and how many there were to choose from."""

    rows: list[Row]
    training_rows: int
    """Rows of the rollout files that were read."""
    evaluation_rows: int
    """Rows of the evaluations that were read."""
    steps_read: int
    steps: int
    """Rollout files of the run."""
    evaluations_read: int
    evaluations: int
    token_texts: bool
    """Whether pieces are texts; else they are ids, because no tokenizer was there."""


def choose(directory: Path, runs: int) -> Rows:
    """Rows of a run of a page with `runs` runs."""
    evaluation_steps = [int(row["step"]) for row in evaluations.frontier(directory)]
    steps = _rollout_steps(directory)
    read = [steps[place] for place in evenly(len(steps), MOST_FILES)]
    budget = _budget(directory, evaluation_steps, read, runs)
    tokenizer = _tokenizer(directory)
    evaluations_read = [evaluation_steps[place] for place in evenly(len(evaluation_steps), _EVALUATIONS)]
    held_out, num_held_out = _of_evaluations(directory, evaluations_read, int(budget * _EVALUATION_SHARE), tokenizer)
    numbers = [(step, _numbers(batch)) for step, batch in _batches(directory, read)]
    chosen = _chosen([values for _, values in numbers], max(budget - len(held_out), 1))
    places = dict(zip((step for step, _ in numbers), chosen, strict=True))
    training = [
        row
        for step, batch in _batches(directory, [step for step, picked in places.items() if picked])
        for row in _rows(batch, "training", step, places[step], tokenizer)
    ]
    return Rows(
        rows=[*held_out, *training],
        training_rows=sum(len(values["reward"]) for _, values in numbers),
        evaluation_rows=num_held_out,
        steps_read=len(numbers),
        steps=len(steps),
        evaluations_read=len(evaluations_read),
        evaluations=len(evaluation_steps),
        token_texts=tokenizer is not None,
    )


def _rollout_steps(directory: Path) -> list[int]:
    names = [path.stem for path in reads.entries(directory / "rollouts") if path.match("step-*.arrow")]
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal())


def _batches(directory: Path, steps: Sequence[int]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rollouts by step; a file that a resumed run has moved aside meanwhile is left out."""
    for step in steps:
        path = directory / "rollouts" / f"step-{step:06d}.arrow"
        if path.is_file():
            yield step, schema.from_bytes(path.read_bytes())


def _budget(directory: Path, evaluation_steps: Sequence[int], steps: Sequence[int], runs: int) -> int:
    """Rows of a run: its share of a page's rows, fewer where those of its last file are long."""
    last = [evaluations.load(directory, evaluation_steps[-1])] if evaluation_steps else []
    last += [batch for _, batch in _batches(directory, steps[-1:])]
    lengths = np.concatenate([schema.completion_lengths(batch) for batch in last]) if last else np.ones(1)
    shown = float(np.minimum(lengths, _LONGEST_TOKENS).mean())
    return max(_FEWEST_ROWS, int(min(MOST_ROWS, MOST_TOKENS / max(shown, 1.0)) / runs))


def _of_evaluations(
    directory: Path, steps: Sequence[int], budget: int, tokenizer: Tokenizer | None
) -> tuple[list[Row], int]:
    """The same prompts at the evaluations of these steps, and how many rows there were."""
    rows, total = [], 0
    for step in steps:
        batch = evaluations.load(directory, step)
        total += batch.num_rows
        of_rows = list(zip(batch.column("prompt_id").to_pylist(), batch.column("prompt").to_pylist(), strict=True))
        prompts = sorted(set(of_rows))
        kept = {prompts[place] for place in evenly(len(prompts), max(budget // len(steps), 1))}
        places = [place for place, prompt in enumerate(of_rows) if prompt in kept]
        rows += _rows(batch, "evaluation", step, places, tokenizer)
    return rows, total


def _numbers(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """What rows are chosen by: reward, proxy minus gold, KL; NaN where there is none."""
    values = per_completion(batch)
    nothing = np.full(batch.num_rows, np.nan)
    return {
        "reward": values["reward"],
        "gap": values["reward"] - values.get("reward_gold", nothing),
        "kl_nats": values.get("kl_nats", nothing),
    }


def _chosen(numbers: Sequence[Mapping[str, np.ndarray]], budget: int) -> list[list[int]]:
    """Places of the chosen rows in each batch: extremes of all batches together, and evenly over all rows."""
    sizes = [len(values["reward"]) for values in numbers]
    total, starts = sum(sizes), np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    if not total:
        return [[] for _ in numbers]
    extremes: set[int] = set()
    extreme = min(_EXTREMES, budget // 12)
    for name in ("reward", "gap", "kl_nats"):
        values = np.concatenate([of_batch[name] for of_batch in numbers])
        order = [int(place) for place in np.argsort(values, kind="stable") if np.isfinite(values[place])]
        extremes |= set(order[:extreme]) | set(order[len(order) - extreme :])
    chosen = extremes | set(evenly(total, min(total, max(budget - len(extremes), 0))))
    return [
        [place - int(start) for place in sorted(chosen) if start <= place < start + size]
        for start, size in zip(starts, sizes, strict=False)
    ]


def _rows(
    batch: pa.RecordBatch, source: str, step: int, places: Sequence[int], tokenizer: Tokenizer | None
) -> list[Row]:
    part = batch.take(pa.array(places, pa.int64()))
    values = per_completion(part)
    rewards = [name for name in values if name.startswith("reward")]
    gap = _numbers(part)["gap"]
    texts = {name: part.column(name).to_pylist() for name in ("prompt", "completion", "finish_reason", "prompt_id")}
    pieces, ratios = _tokens(part, tokenizer)
    return [
        Row(
            source=source,
            step=step,
            prompt_id=texts["prompt_id"][place],
            prompt=_cut(texts["prompt"][place]),
            completion=_cut(texts["completion"][place]),
            finish_reason=texts["finish_reason"][place],
            rewards={name: _number(values[name][place]) for name in rewards},
            gap=_number(gap[place]),
            kl_nats=_number(values["kl_nats"][place]) if "kl_nats" in values else None,
            length_tokens=int(values["length_tokens"][place]),
            pieces=pieces[place],
            log_ratios=ratios[place],
        )
        for place in range(part.num_rows)
    ]


def _tokens(part: pa.RecordBatch, tokenizer: Tokenizer | None) -> tuple[list[list[str]], list[list[float]]]:
    """Text and log-ratio of every token of the sampled rows; without a tokenizer the text is the token's id."""
    nothing: list[list[str]] = [[] for _ in range(part.num_rows)]
    if not {"completion_tokens", "completion_logprobs", "reference_logprobs"} <= set(part.schema.names):
        return nothing, [[] for _ in nothing]
    columns = [
        part.column(name).to_pylist() for name in ("completion_tokens", "completion_logprobs", "reference_logprobs")
    ]
    pieces, ratios = [], []
    for ids, policy, reference, sampled in zip(*columns, schema.sampled(part), strict=True):
        shown = ids[:_LONGEST_TOKENS] if sampled else []
        pieces.append(_pieces(shown, tokenizer))
        differences = zip(policy[: len(shown)], reference, strict=False)
        ratios.append([round(log_pi - log_ref, 2) + 0.0 for log_pi, log_ref in differences])
    return pieces, ratios


def _pieces(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return [f"#{token} " for token in ids]
    pieces, stream = [], DecodeStream(skip_special_tokens=False)
    for token in ids:
        try:
            piece = stream.step(tokenizer, token)
        except Exception:  # the tokenizers package raises bare Exception, as at bytes that form no character
            piece, stream = f"#{token} ", DecodeStream(skip_special_tokens=False)
        pieces.append(piece or "")
    return pieces


def _tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of the newest checkpoint's policy; None where there is none that this library reads."""
    newest = checkpoint.latest(directory)
    path = newest / "policy" / "tokenizer.json" if newest else None
    if path is None or not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the tokenizers package raises bare Exception for a file that it cannot read
        return None


def _cut(text: str) -> str:
    left_out = len(text) - _LONGEST_CHARACTERS
    return text if left_out <= 0 else f"{text[:_LONGEST_CHARACTERS]} [... {left_out} characters more]"


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
