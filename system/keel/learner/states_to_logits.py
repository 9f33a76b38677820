"""From the states of a trunk to logits by a family's own code, whatever stands there beside the output head.

A language model's forward runs its trunk, then its head, and some families scale or cap what comes out. That forward
is run here with the trunk's place taken by states that were computed before: nothing of a family is written down twice.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def logits_of(model: Any, trunk: nn.Module, states: Tensor, others: Mapping[nn.Module, nn.Module]) -> Tensor:
    """Logits [n, V] of states [n, H]; `others`: modules of the model and what stands in for them in this call."""
    with contextlib.ExitStack() as stack:
        for module, other in {**others, trunk: GivenStates(trunk, states[None])}.items():
            stack.enter_context(_replaced(model, module, other))
        # forward, not the call: hooks of the whole model belong to a pass through all of it
        return model.forward(input_ids=states.new_zeros(1, len(states), dtype=torch.long)).logits[0]


class TrunkOutput:
    """What a trunk returns, as far as a head reads it: states that were computed before, None for everything else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class GivenStates(nn.Module):
    """Stands in a model where its trunk is, and answers every call with states that were computed before.

    Attributes are the trunk's: some families keep a multiplier of the logits there, some call a trunk's decoder.
    """

    def __init__(self, trunk: nn.Module, states: Tensor) -> None:
        super().__init__()
        self.__dict__["trunk"], self.__dict__["states"] = trunk, states  # past nn.Module: neither is a part of it

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.__dict__["trunk"], name)
        return GivenStates(attribute, self.__dict__["states"]) if isinstance(attribute, nn.Module) else attribute

    def forward(self, *arguments: Any, **options: Any) -> TrunkOutput:
        return TrunkOutput(self.__dict__["states"])


@contextlib.contextmanager
def _replaced(model: nn.Module, part: nn.Module, other: nn.Module) -> Iterator[None]:
    """Another module in the place of a model's part inside this block."""
    path = next(name for name, module in model.named_modules() if module is part)
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    parent._modules[name] = other
    try:
        yield
    finally:
        parent._modules[name] = part
