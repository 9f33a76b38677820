"""The reference scorer: log-probs of completions under a frozen policy, before the rewards, which may read them."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from keel import schema
from keel.config.workers import ReferenceSettings
from keel.protocols import LoadReceipt, StageReceipt


class ReferenceScorer:
    """Appends the completions' log-probs under a frozen policy: the KL monitor of every run."""

    def __init__(self, folder: str, settings: ReferenceSettings, temperature: float, name: str) -> None:
        import torch

        from keel.learner import forward_contract, loading, packing

        torch.set_num_threads(settings.threads)
        self.adds = schema.REFERENCE
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
        import torch

        from keel.learner import packing

        started = time.monotonic()
        lengths = schema.lengths(batch, "completion_tokens")
        plan = packing.plan(batch, ranks=1, budget=self._budget)
        flat = np.empty(int(lengths.sum()), np.float32)
        with torch.inference_mode():
            for units, chunks in zip(plan.micro_batches[0], plan.head_chunks, strict=True):
                micro = packing.tensors(batch, units)
                flat[micro.items] = self._policy(micro, self.temperature, chunks, entropy=False)[0].cpu().numpy()
        column = schema.from_ragged(flat, lengths, schema.NATS)
        scored = schema.append(batch, schema.build(self.adds, {"reference_logprobs": column}))
        return scored, StageReceipt(batch.num_rows, len(flat), time.monotonic() - started, self.name)
