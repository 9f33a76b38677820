"""Master weights and Adam's moments of a DeepSpeed engine: whole tensors by name, of which every rank holds a shard.

weight/NAME      fp32 master weight of the parameter NAME of the module; only trained parameters have one
exp_avg/NAME     Adam's first moment
exp_avg_sq/NAME  Adam's second moment

stages 1 and 2   a parameter group is one flat vector, cut into one piece a rank: most parameters lie on one rank
stage 3          every parameter is cut into one piece a rank, padded to equal lengths

The methods say which are collective.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a parameter: `length` elements from `begin` on."""

    group: int
    """Which of the rank's flat vectors they are in."""
    offset: int
    """Where in that."""
    begin: int
    length: int


class Shards:
    """Makes the moments (zero) at once, where torch waits for the first step: so there is always something to save."""

    def __init__(self, engine: Any, adam: torch.optim.Optimizer, stage: int) -> None:
        self._zero, self._adam, self._stage = engine.optimizer, adam, stage
        self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        zero = self._zero
        self._flat = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        for flat in self._flat:
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            adam.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}
        parameters = {name: tensor for name, tensor in engine.module.named_parameters() if tensor.requires_grad}
        self._shards = {name: self._shard(tensor) for name, tensor in parameters.items()}
        shapes = {name: tuple(p.ds_shape if stage == 3 else p.shape) for name, p in parameters.items()}
        self.shapes = {f"{kind}/{name}": shape for name, shape in shapes.items() for kind in ("weight", *MOMENTS)}
        """Of all tensors, by name."""

    @property
    def adam_steps(self) -> int:
        """How many updates Adam's bias correction has counted: the same for every parameter."""
        (steps,) = {int(state["step"].item()) for state in self._adam.state.values()}
        return steps

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(steps)

    def gather(self, name: str, rank: int) -> Tensor:
        """The whole fp32 tensor, on the CPU of this rank; elsewhere what it is means nothing. Collective."""
        shard, held = self._held(name)
        # added up as bit patterns: of every element all ranks but one give 0, and no -0.0 or NaN is changed
        whole = torch.zeros(math.prod(self.shapes[name]), dtype=torch.int32, device=held.device)
        whole[shard.begin : shard.begin + shard.length] = held.view(torch.int32)
        if self._ranks > 1:
            torch.distributed.reduce(whole, rank)
        return whole.view(torch.float32).view(self.shapes[name]).cpu()

    def scatter(self, name: str, whole: Tensor) -> None:
        """Take this rank's shard of a whole tensor; `refresh` must follow."""
        shard, held = self._held(name)
        held.copy_(whole.reshape(-1)[shard.begin : shard.begin + shard.length])

    def refresh(self) -> None:
        """Make the parameters that the model computes with from the master weights. Collective."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()  # lets go of whole parameters, which are those of before
        for group in range(len(self._flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()

    def _held(self, name: str) -> tuple[Shard, Tensor]:
        kind, _, parameter = name.partition("/")
        shard = self._shards[parameter]
        flat = self._flat[shard.group]
        tensor = flat.detach() if kind == "weight" else self._adam.state[flat][kind]
        return shard, tensor.narrow(0, shard.offset, shard.length)

    def _shard(self, parameter: Any) -> Shard:
        if self._stage == 3:
            size = parameter.ds_numel
            group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            begin = min(self._rank * padded, size)
            return Shard(group, offset, begin, min(padded, size - begin))
        mapping = parameter._hp_mapping
        if mapping is None:  # it lies on other ranks
            return Shard(0, 0, 0, 0)
        held, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Shard(mapping.param_group_index, held.start, whole.start, held.numel)
