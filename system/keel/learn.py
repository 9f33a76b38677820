"""DeepSpeed behind the Learner protocol: one rank of the gang. Every rank sees the whole step and trains its own rows.

step:  weigh the whole batch (numpy, alike on every rank)
       for epoch: for micro-batch of this rank: forward -> objective.loss -> backward
                  clip, Adam, learning rate of the step                               -> version + 1
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from keel import batch as batching
from keel import diagnostics, models, schema, weights
from keel.algorithms.objectives import Credit, PolicyGradient, Rows
from keel.protocols import LoadReceipt, StepReport, Weights
from keel.settings import LearnerSettings, Settings


class DeepSpeedLearner:
    """One rank. All public methods are collective: every rank must be called with the same arguments."""

    def __init__(self, settings: Settings, folder: str, rank: int, ranks: int, address: str, port: int) -> None:
        learners = settings.learners
        _join_gang(learners, rank, ranks, address, port, settings.deadlines.step_seconds)
        import deepspeed

        self.settings, self.folder = settings, folder
        self.rank, self.ranks = rank, ranks
        self.version = 0
        self.objective = PolicyGradient(settings)
        policy = models.load_policy(Path(folder), "float32" if learners.precision == "fp32" else "bfloat16")
        self.device = torch.device("cuda", 0) if learners.gpus else torch.device("cpu")
        optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=learners.learning_rate,
            betas=learners.adam_betas,
            eps=learners.adam_epsilon,
            weight_decay=learners.weight_decay,
            fused=True,
        )
        self._engine: Any = deepspeed.initialize(
            model=policy.to(self.device), optimizer=optimizer, config=engine_config(learners)
        )[0]
        self._engine.train()

    def step(self, batch: pa.RecordBatch) -> StepReport:
        """One version: `objective.epochs` optimizer updates on the batch. Raises FloatingPointError on a NaN loss."""
        started = time.monotonic()
        credit = self.objective.weigh(batch)
        plan = self._plan(batch)
        rate = learning_rate(self.settings.learners, self.version, self.settings.run.steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        old = self._logprobs(batch, plan)[0] if self.objective.objective.epochs > 1 else None
        sums: dict[str, float] = {}
        for _ in range(self.objective.objective.epochs):
            sums = self._update(batch, plan, credit, old)
        self.version += 1
        metrics = dict(diagnostics.summarise(batch)) | dict(credit.metrics) | dict(sums)
        metrics |= {"learning_rate": rate, "step_seconds": time.monotonic() - started}
        metrics |= {"micro_batches": float(len(plan.real[self.rank])), "trained_tokens": float(credit.num_tokens)}
        return StepReport(self.version, {name: float(value) for name, value in metrics.items()})

    def _update(
        self, batch: pa.RecordBatch, plan: batching.Plan, credit: Credit, old: np.ndarray | None
    ) -> dict[str, float]:
        """One optimizer update over this rank's micro-batches; metric sums added over all ranks."""
        sums: dict[str, float] = defaultdict(float)
        for micro, chunks in self._micro_batches(batch, plan):
            rows = self._rows(batch, micro, credit, old)
            logprobs, entropies = self._forward(micro, chunks, entropy_gradient=self.objective.bonus > 0)
            terms = self.objective.loss(rows, logprobs, entropies, credit)
            # DeepSpeed averages gradients over ranks, while shares of the loss add up; filler rows weigh nothing
            self._engine.backward(terms.loss * (self.ranks if micro.real else 0.0), scale_wrt_gas=False)
            if micro.real:
                difference = (logprobs.detach() - rows.sampler).abs()
                for name, share in terms.sums.items():
                    sums[name] += share
                sums["gap_nats"] += difference.sum().item() / credit.num_tokens
        self._engine.step()
        sums = self._sum_over_ranks(sums)
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"step {self.version + 1}: the loss is {sums['loss']}")
        sums["grad_norm"] = float(self._engine.get_global_grad_norm())
        return sums

    def compare(self, batch: pa.RecordBatch) -> dict[str, float]:
        """|learner - sampler| log-prob of the stored completion tokens: mean and largest, nats."""
        logprobs, _ = self._logprobs(batch, self._plan(batch))
        sampler, _ = schema.ragged(batch, "completion_logprobs")
        difference = np.abs(logprobs - sampler)
        return {"gap_mean_nats": float(difference.mean()), "gap_max_nats": float(difference.max())}

    def publish(self) -> tuple[Weights | None, LoadReceipt | None]:
        """The current policy as one buffer and its proof, on rank 0; the others take part in gathering."""
        started = time.monotonic()
        named = self._full_parameters()
        if self.rank != 0:
            return None, None
        packed = weights.pack(named.items(), self.version, self.settings.generators.dtype)
        return packed, LoadReceipt(packed.version, packed.digest, packed.buffer.nbytes, time.monotonic() - started)

    def save(self, directory: str) -> None:
        """Write `learner/` (DeepSpeed, every rank its shard) and `policy/` (Hugging Face folder, rank 0)."""
        self._engine.save_checkpoint(f"{directory}/learner", tag="state", client_state={"version": self.version})
        named = self._full_parameters()
        if self.rank == 0:
            from keel import export

            export.policy(Path(directory) / "policy", Path(self.folder), named, self.settings, self.version)

    def load(self, directory: str) -> int:
        """Continue from `save`'s output at the same number of ranks; returns its version."""
        path, client_state = self._engine.load_checkpoint(f"{directory}/learner", tag="state")
        assert path is not None, directory
        self.version = client_state["version"]
        return self.version

    def _plan(self, batch: pa.RecordBatch) -> batching.Plan:
        learners = self.settings.learners
        budget = batching.Budget(learners.tokens_per_batch, learners.shared_prompt_tokens, learners.head_chunk_tokens)
        return batching.plan(batch, self.ranks, budget)

    def _micro_batches(self, batch: pa.RecordBatch, plan: batching.Plan) -> Iterator[tuple[batching.MicroBatch, int]]:
        own = zip(plan.micro_batches[self.rank], plan.real[self.rank], plan.head_chunks, strict=True)
        for units, real, chunks in own:
            yield batching.tensors(batch, units, real=real), chunks

    def _rows(self, batch: pa.RecordBatch, micro: batching.MicroBatch, credit: Credit, old: np.ndarray | None) -> Rows:
        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values[micro.items].astype(np.float32)).to(self.device)

        lengths = schema.lengths(batch, "completion_tokens")[micro.rows]
        needs_reference = "reference_logprobs" in self.objective.needs
        return Rows(
            advantages=torch.from_numpy(credit.advantages[micro.rows].astype(np.float32)).to(self.device),
            lengths=torch.from_numpy(lengths.astype(np.float32)).to(self.device),
            row_of_item=micro.row_of_item.to(self.device),
            sampler=column(schema.ragged(batch, "completion_logprobs")[0]),
            old=None if old is None else column(old),
            reference=column(schema.ragged(batch, "reference_logprobs")[0]) if needs_reference else None,
        )

    def _forward(self, micro: batching.MicroBatch, chunks: int, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        logprobs, entropies = self._engine(micro, self.settings.sampling.temperature, chunks)
        return logprobs, entropies if entropy_gradient else entropies.detach()

    @torch.no_grad()
    def _logprobs(self, batch: pa.RecordBatch, plan: batching.Plan) -> tuple[np.ndarray, np.ndarray]:
        """The learner's log-probs and entropies of all completion tokens of the batch, fp32 [tokens], every rank's."""
        num_tokens = int(schema.lengths(batch, "completion_tokens").sum())
        flat = torch.zeros(2, num_tokens, device=self.device)
        for micro, chunks in self._micro_batches(batch, plan):
            values = self._forward(micro, chunks, entropy_gradient=False)
            if micro.real:
                flat[:, torch.from_numpy(micro.items).to(self.device)] = torch.stack(values)
        if self.ranks > 1:
            torch.distributed.all_reduce(flat)
        logprobs, entropies = flat.cpu().numpy()
        return logprobs, entropies

    def _sum_over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        names = sorted(sums)
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def _full_parameters(self) -> dict[str, Tensor]:
        """The whole policy under checkpoint names, on rank 0; the others take part where ZeRO-3 must gather."""
        import deepspeed

        named: dict[str, Tensor] = {}
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.settings.learners.zero_stage == 3):
                if self.rank == 0:
                    named[name] = parameter.detach().to("cpu", copy=True)
        return self._engine.module.checkpoint(named) if self.rank == 0 else {}


def engine_config(learners: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's configuration. The caller owns accumulation: backward accumulates, step() updates."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": learners.zero_stage, "overlap_comm": False},
        "bf16": {"enabled": learners.precision == "bf16"},
        "gradient_clipping": learners.max_grad_norm,
        "steps_per_print": 10**9,
    }


def learning_rate(learners: LearnerSettings, version: int, steps: int) -> float:
    """Rate of the step that starts from `version`: a pure function, so a resumed run needs no scheduler state."""
    if version < learners.warmup_steps:
        return learners.learning_rate * (version + 1) / learners.warmup_steps
    progress = (version - learners.warmup_steps) / max(1, steps - learners.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[learners.schedule]
    return learners.learning_rate * factor


def _join_gang(learners: LearnerSettings, rank: int, ranks: int, address: str, port: int, deadline: float) -> None:
    """Set up this process for DeepSpeed without its launcher: gloo on CPU, NCCL on GPUs."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if not learners.gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(learners.threads)
    import deepspeed
    import deepspeed.ops

    # a shared-memory all-reduce for inference that would be compiled with g++ at every first start; unused here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if learners.gpus else "gloo"
    timeout = timedelta(seconds=deadline)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
