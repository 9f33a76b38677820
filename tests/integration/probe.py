"""A learner rank for tests: one step of any objective from the weights it started with."""

import random
import socket
from typing import Any

import pyarrow as pa
import ray
import torch

from keel.algorithms import registry
from keel.config.run import Settings
from keel.learner.frozen_models import FrozenModels
from keel.learner.policy_learner import DeepSpeedLearner


def rendezvous() -> tuple[str, int]:
    """Address and a port, free now, for the ranks of a learner group without its placement."""
    address = ray.util.get_node_ip_address()
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as trial:
            if trial.connect_ex((address, port)):
                return address, port
    raise OSError("no free port")


class Probe(DeepSpeedLearner):
    """A rank that takes one step of any objective, always from the weights it started with."""

    def begin(self, directory: str) -> None:
        self.directory = directory
        self._engine.save(directory, 0)

    def step_with_a_broken_weight(self, chosen: Settings, batch: pa.RecordBatch) -> str:
        """What a step says when the policy gives NaN; the version it is at then must still be the start."""
        self._engine.restore_checkpoint(self.directory)
        self.version, self.settings, self.objective = 0, chosen, registry.build(chosen)
        self._engine.learners = chosen.learners
        next(self._engine.module.parameters()).data[0] = float("nan")
        before = [parameter.detach().clone() for parameter in self._engine.module.parameters()]
        try:
            self.step(batch)
        except FloatingPointError as error:
            after = list(self._engine.module.parameters())
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
            assert self.version == 0
            return str(error)
        return "no error"

    def probe(
        self, chosen: Settings, batch: pa.RecordBatch, kl_multiplier: float = 1.0
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Parameters of policy and critic after one step, and what the step reported."""
        self._engine.restore_checkpoint(self.directory)
        self.version, self.settings, self.objective = 0, chosen, registry.build(chosen)
        self._engine.learners = chosen.learners
        self._frozen_models = FrozenModels(
            self.objective.vocabulary, self._frozen_names(), self._folder_of, "float32", self.device
        )
        self.set_multipliers(kl_multiplier, 1.0)
        report = self.step(batch)
        named = {name: value.detach().clone() for name, value in self._engine.module.named_parameters()}
        return named, {**report.metrics, "state": self.state()}
