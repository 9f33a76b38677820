"""Completions that come with the prompts: offline preference data and scored samples, as rollouts like any other.

A row of the prompt source holds `chosen` and `rejected` (TRL), or `responses` and `rewards` (two lists, RLHFlow).
Texts, or conversations of which the last message counts. The generators still take part: they say how likely the
policy of now finds these tokens, so KL, staleness and the parity gap mean what they mean online.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from keel.config import ConfigError
from keel.protocols import Sampling
from keel.sources import Row

NAME = "stored"
"""What the column `generator` says of these rows."""


def completions(columns: Mapping[str, Any]) -> list[str]:
    """Texts of one row, chosen before rejected. Raises KeyError or TypeError when the columns are not there."""
    texts = [columns["chosen"], columns["rejected"]] if "chosen" in columns else columns["responses"]
    return [text if isinstance(text, str) else text[-1]["content"] for text in texts]


def rewards(columns: Mapping[str, Any]) -> list[float]:
    """Rewards of one row: its own, or 1 for chosen and 0 for rejected."""
    return [1.0, 0.0] if "chosen" in columns else [float(value) for value in columns["rewards"]]


def is_stored(ticket: int, ratio: float) -> bool:
    """Whether a ticket's completions are those of the source: `ratio` of all tickets, spread evenly."""
    return int((ticket + 1) * ratio) > int(ticket * ratio)


class StoredCompletions:
    """Prompt rows -> tokens of the completions they come with; nothing for rows that are to be sampled."""

    def __init__(self, ratio: float, tokenizer: Any, sampling: Sampling) -> None:
        self.ratio, self.tokenizer, self.sampling = ratio, tokenizer, sampling
        stop, own = sampling.stop_token_ids, getattr(tokenizer, "eos_token_id", None)
        self.end = [own] if own in stop else list(stop[:1])  # of several end tokens the tokenizer's own

    def __call__(self, prompts: pa.RecordBatch) -> list[list[int]] | None:
        """Tokens of each row, the end token behind them, cut at the budget; [] where the row is to be sampled.

        None for held-out rows: what is evaluated is what the policy says.
        """
        if (prompts.schema.metadata or {}).get(b"keel.held_out"):
            return None
        names = ("ticket", "sample", "prompt_columns")
        rows = zip(*(prompts.column(name).to_pylist() for name in names), strict=True)
        return [
            self._tokens(completions(json.loads(columns))[sample]) if is_stored(ticket, self.ratio) else []
            for ticket, sample, columns in rows
        ]

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, *self.end][: self.sampling.max_tokens]


def check(rows: Sequence[Row], samples: int, source: str) -> None:
    """Every row has as many different completions, with rewards and text, as a prompt has samples.

    Raises ConfigError naming the first row that has not.
    """
    for row in rows:
        columns = json.loads(row.further)
        try:
            texts, values = completions(columns), rewards(columns)
        except (KeyError, TypeError, IndexError, ValueError):
            raise ConfigError(
                f"prompts.source={source}: {row.place} has no completions; sampling.stored_ratio expects columns chosen"
                " and rejected, or responses and rewards"
            ) from None
        if len(texts) != samples or len(values) != samples:
            raise ConfigError(
                f"sampling.samples_per_prompt={samples}: {row.place} has {len(texts)} completions and {len(values)}"
                " rewards; expected as many of each"
            )
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f"prompts.source={source}: {row.place} has an empty completion; expected text")
        if len(set(texts)) < samples:
            raise ConfigError(f"prompts.source={source}: {row.place} has equal completions; expected different ones")
