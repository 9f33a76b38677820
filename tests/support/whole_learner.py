"""A learner whose state is a few tensors, and a checkpoint of it."""

from pathlib import Path

import torch
from torch import Tensor

from keel.learner import sharded_checkpoint

SHAPES = {"weight/a": (3, 4), "exp_avg/a": (3, 4), "weight/b.c": (40,), "weight/d": (2,)}


class Whole:
    """A learner that lies on one rank."""

    def __init__(self, seed: int, adam_steps: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shapes, self.adam_steps = dict(SHAPES), adam_steps
        self.tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    def gather(self, name: str, rank: int) -> Tensor:
        return self.tensors[name]

    def scatter(self, name: str, whole: Tensor) -> None:
        self.tensors[name] = whole


def written(folder: Path, learner: Whole, ranks: int = 1) -> Path:
    for rank in range(ranks):
        sharded_checkpoint.write_blocks(folder, learner, rank, ranks)
    sharded_checkpoint.write_index(folder, 7, learner)
    return folder
