"""The reference scorer: log-probs of completions under a frozen policy, before the rewards, which may read them."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import schema
from keel.config.workers import ReferenceSettings
from keel.protocols import LoadReceipt, StageReceipt


class ReferenceScorer:
    """Appends the log-probs of the completions under a frozen policy, at the sampling temperature.

    On every run, also one whose objective does not use them: they are the KL monitor. With `relevance` also
    relevance_nats, from a second pass in which every prompt is another one of the batch.
    """

    def __init__(
        self, folder: str, settings: ReferenceSettings, temperature: float, name: str, relevance: bool = False
    ) -> None:
        import torch

        from keel.learner import forward_contract, loading, packing

        torch.set_num_threads(settings.threads)
        self.adds = pa.schema([*schema.REFERENCE, *(schema.RELEVANCE if relevance else ())])
        self.relevance = relevance
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
        if self.relevance:
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

        1/|y| (log p(y | x) - log p(y | x')) where x' is the next other prompt of the batch; null where there is none.
        """
        others = with_other_prompts(batch)
        if others is None:
            return pa.nulls(batch.num_rows, pa.float32())
        difference = logprobs.astype(np.float64) - self._logprobs(others, lengths)
        return pa.array(schema.row_sums(difference, lengths) / lengths, pa.float32())


def with_other_prompts(batch: pa.RecordBatch) -> pa.RecordBatch | None:
    """The batch with the prompt tokens of every row replaced by the next different prompt; None if all are equal.

    "Next" is the order of tickets, the first prompt follows the last one.
    """
    tickets = batch.column("ticket").to_numpy()
    prompts = batch.column("prompt_tokens").to_pylist()
    of_ticket = {int(tickets[row]): tuple(prompts[row]) for row in np.argsort(tickets, kind="stable")}
    distinct = list(dict.fromkeys(of_ticket.values()))
    if len(distinct) < 2:
        return None
    following = dict(zip(distinct, [*distinct[1:], distinct[0]], strict=True))
    others = pa.array([list(following[tuple(prompt)]) for prompt in prompts], schema.TOKENS)
    return batch.set_column(batch.schema.get_field_index("prompt_tokens"), batch.schema.field("prompt_tokens"), others)
