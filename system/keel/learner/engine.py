"""One rank of a learner group around a torch module: joined, optimized by DeepSpeed, gathered. Every learner has one.

All methods are collective: every rank must call them alike.
"""

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.config.workers import LearnerSettings
from keel.errors import NotFinite
from keel.learner import sharded_checkpoint
from keel.learner.optimizer import engine_config, learning_rate
from keel.learner.zero_shards import Shards


class Engine:
    """Backward passes add up until `update`; shares of the loss add up over ranks."""

    def __init__(self, learners: LearnerSettings, ranks: int, steps: int) -> None:
        self.learners, self.ranks, self.steps = learners, ranks, steps
        self.device = torch.device("cuda", 0) if learners.gpus else torch.device("cpu")
        self.rate_multiplier = 1.0
        """Factor on the learning rate of every step."""
        self._engine: Any = None
        self._factors: list[float] = []

    def drive(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Train this module from now on; parameter groups keep their rates' ratio to `learners.learning_rate`."""
        import deepspeed

        self._factors = [group["lr"] / self.learners.learning_rate for group in optimizer.param_groups]
        self._engine = deepspeed.initialize(model=module, optimizer=optimizer, config=engine_config(self.learners))[0]
        self._engine.train()
        self._shards = Shards(self._engine, optimizer, self.learners.zero_stage)

    @property
    def module(self) -> Any:
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def set_rate(self, version: int) -> float:
        """The learning rate of the step that starts from this version."""
        rate = learning_rate(self.learners, version, self.steps) * self.rate_multiplier
        for group, factor in zip(self._engine.optimizer.param_groups, self._factors, strict=False):
            group["lr"] = rate * factor
        return rate

    def backward(self, share: Tensor, *, real: bool) -> None:
        """Add the gradient of a share of the loss; a filler's weighs nothing."""
        # DeepSpeed averages gradients over ranks, while shares of the loss add up
        weight = torch.full_like(share, self.ranks if real else 0.0)
        # the gradient of an infinite share can be finite; as NaN it keeps every rank from the update
        weight = weight.masked_fill(~share.detach().isfinite(), math.nan)
        self._engine.backward(share * weight, scale_wrt_gas=False)

    def update(self, step: int, loss: float, terms: Mapping[str, float]) -> float:
        """Clip, move the weights; the global gradient norm before clipping.

        Raises NotFinite, and moves nothing, where the norm or the loss (over all ranks) is not finite. The
        accumulated gradient is cleared either way. `step` and `terms` are for the message.
        """
        self._engine.step()  # DeepSpeed itself skips an update whose gradient is not finite, at every stage
        norm = float(self._engine.get_global_grad_norm())
        finite = math.isfinite(norm) and math.isfinite(loss)
        assert self._engine.was_step_applied() == finite, (norm, loss)
        if not finite:
            raise NotFinite(f"step {step}: the loss is {loss}, the gradient norm {norm}; terms: {dict(terms)}")
        return norm

    @property
    def updates(self) -> int:
        """Number of optimizer updates since the weights were new."""
        return self._shards.adam_steps

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add the ranks' tensors up, in place."""
        if self.ranks > 1:
            torch.distributed.all_reduce(values)
        return values

    def sum_named(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Numbers by name, added over ranks in float64."""
        names = sorted(sums)
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.device)
        return dict(zip(names, self.sum_over_ranks(values).tolist(), strict=True))

    def gather(self, module: nn.Module, rank: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All parameters under the module's names, on the CPU of rank 0; the others take part where ZeRO-3 must.

        With a `dtype` all are cast to it and lie one behind the other in one piece of memory, which `weights.pack`
        takes as it is: the host holds the model once.
        """
        import deepspeed

        named: dict[str, Tensor] = {}
        parameters = dict(module.named_parameters())
        sizes = {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in parameters.items()}
        memory = torch.empty(sum(sizes.values()) if dtype and rank == 0 else 0, dtype=dtype)
        pieces = dict(zip(sizes, memory.split(list(sizes.values())), strict=True)) if len(memory) else {}
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.learners.zero_stage == 3):
                if rank == 0 and name in pieces:
                    named[name] = pieces[name].view(parameter.shape).copy_(parameter.detach())
                elif rank == 0:
                    named[name] = parameter.detach().to("cpu", copy=True)
        return named

    def save(self, directory: str, version: int) -> None:
        """Write `learner/`: master weights and Adam's moments, for any number of ranks and ZeRO stage."""
        folder, rank = Path(directory) / "learner", torch.distributed.get_rank()
        sharded_checkpoint.write_blocks(folder, self._shards, rank, self.ranks)
        torch.distributed.barrier()
        if rank == 0:
            sharded_checkpoint.write_index(folder, version, self._shards)

    def restore_checkpoint(self, directory: str) -> int:
        """Continue from `save`'s output; its version. Raises CheckpointError if it is damaged or another model's."""
        version = sharded_checkpoint.read(Path(directory) / "learner", self._shards)
        self._shards.refresh()
        return version


def join_ranks(learners: LearnerSettings, rank: int, ranks: int, address: str, port: int, deadline: float) -> None:
    """Set up this process for DeepSpeed without its launcher: gloo on CPU, NCCL on GPUs."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
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
