"""The reference scorer: log-probs of completions under a frozen policy, before the rewards, which may read them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import schema
from keel.config.workers import ReferenceSettings
from keel.protocols import LoadReceipt, StageReceipt

_CONTRAST_PROMPTS = 16


class ReferenceScorer:
    """Appends the log-probs of the completions under a frozen policy, at the sampling temperature.

    On every run, also one whose objective does not use them: they are the KL monitor. With `others` also
    relevance_nats, from a second pass in which every prompt is another one.
    """

    def __init__(
        self, folder: str, settings: ReferenceSettings, temperature: float, name: str, others: Sequence[list[int]] = ()
    ) -> None:
        """`others`: prompts of which each completion is read after one, too; none: relevance is not measured."""
        import torch

        from keel.learner import forward_contract, loading, packing

        torch.set_num_threads(settings.threads)
        self.adds = pa.schema([*schema.REFERENCE, *(schema.RELEVANCE if others else ())])
        self.others = others
        self.name = name
        self.settings = settings
        self.temperature = temperature
        self._device = torch.device("cuda" if settings.gpus else "cpu")
        self._policy = loading.load_frozen(Path(folder), settings.dtype, self._device)
        shared = forward_contract.verdict(Path(folder)).shared
        self._budget = packing.TokenBudget(
            settings.tokens_per_batch, settings.shared_prompt_tokens if shared else 0, head_chunk_tokens=512
        )

    def load_weights(self, folder: str) -> LoadReceipt:
        """Load the reference of a new iteration. Its version is -1: it comes from a folder and was not published."""
        from keel.learner import loading

        started = time.monotonic()
        self._policy = loading.load_frozen(Path(folder), self.settings.dtype, self._device)
        return LoadReceipt(-1, folder, 0, time.monotonic() - started)

    def score(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, StageReceipt]:
        started = time.monotonic()
        lengths = schema.lengths(batch, "completion_tokens")
        logprobs = self._logprobs(batch, lengths)
        columns: dict[str, Any] = {"reference_logprobs": schema.from_ragged(logprobs, lengths, schema.NATS)}
        if self.others:
            columns["relevance_nats"] = self._relevance(batch, logprobs, lengths)
        scored = schema.append(batch, schema.build(self.adds, columns))
        return scored, StageReceipt(batch.num_rows, len(logprobs), time.monotonic() - started, self.name)

    def _logprobs(self, batch: pa.RecordBatch, lengths: np.ndarray) -> np.ndarray:
        """Log-probs fp32 [completion tokens of the batch]."""
        import torch

        from keel.learner import packing

        plan = packing.plan(batch, ranks=1, budget=self._budget)
        flat = np.empty(int(lengths.sum()), np.float32)
        with torch.inference_mode():
            for units, chunks in zip(plan.micro_batches[0], plan.head_chunks, strict=True):
                micro = packing.tensors(batch, units)
                flat[micro.items] = self._policy(micro, self.temperature, chunks, entropy=False)[0].cpu().numpy()
        return flat

    def _relevance(self, batch: pa.RecordBatch, logprobs: np.ndarray, lengths: np.ndarray) -> pa.Array:
        """Pointwise mutual information of prompt and completion, nats a token, fp32 [rows].

        1/|y| (log p(y | x) - log p(y | x')) where x' is another prompt of the source; null where there is none.
        """
        others = with_other_prompts(batch, self.others)
        if others is None:
            return pa.nulls(batch.num_rows, pa.float32())
        difference = logprobs.astype(np.float64) - self._logprobs(others, lengths)
        return pa.array(schema.row_sums(difference, lengths) / lengths, pa.float32())


def contrast_prompts(rows: pa.RecordBatch) -> list[list[int]]:
    """Token ids of up to 16 different prompts, evenly spaced over the rows: what completions are read after, too."""
    distinct = list(dict.fromkeys(map(tuple, rows.column("prompt_tokens").to_pylist())))
    places = np.linspace(0, len(distinct) - 1, min(len(distinct), _CONTRAST_PROMPTS)).round().astype(int)
    return [list(distinct[place]) for place in places]


def with_other_prompts(batch: pa.RecordBatch, others: Sequence[list[int]]) -> pa.RecordBatch | None:
    """The batch with each row's prompt replaced by number (ticket mod n) of the n others, or the next one that differs.

    A function of ticket and prompt alone, whatever else is in the batch. None where a prompt equals all of them.
    """
    taken = []
    rows = zip(batch.column("ticket").to_pylist(), batch.column("prompt_tokens").to_pylist(), strict=True)
    for ticket, prompt in rows:
        candidates = [others[(ticket + step) % len(others)] for step in range(len(others))]
        other = next((candidate for candidate in candidates if candidate != prompt), None)
        if other is None:
            return None
        taken.append(other)
    column = pa.array(taken, schema.TOKENS)
    return batch.set_column(batch.schema.get_field_index("prompt_tokens"), batch.schema.field("prompt_tokens"), column)
