"""One process for tests in which learners of any settings take a rank's place one after the other."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from keel.config import loader
from keel.config.run import Settings
from keel.config.stages import RewardModelSettings
from keel.errors import NotFinite
from keel.learner.engine import Engine, join_ranks
from keel.learner.policy_learner import DeepSpeedLearner
from keel.learner.reward_learner import PAIR, RewardModelLearner
from test_learner import settings


class Rank:
    def __init__(self, folder: str, rank: int, ranks: int, address: str, port: int) -> None:
        self.folder, self.place = folder, (rank, ranks, address, port)

    def begin(self, chosen: Settings) -> None:
        self.learner = DeepSpeedLearner(chosen, self.folder, {}, *self.place)

    def step(self, batch: pa.RecordBatch) -> dict[str, Any]:
        return dict(self.learner.step(batch).metrics)

    def save(self, directory: str) -> None:
        self.learner.save(directory)
        if self.place[0] == 0:
            (Path(directory) / "state.json").write_text(json.dumps({"objective": self.learner.state()}))

    def restore_checkpoint(self, directory: str) -> int:
        return self.learner.restore_checkpoint(directory)

    def tensors(self) -> dict[str, Tensor]:
        """What DeepSpeed itself says the master weights and moments are, and the parameters the model computes with."""
        return read(self.learner._engine, self.place[0])

    def state(self) -> tuple[int, str]:
        return self.learner.version, json.dumps(self.learner.state())

    def spoil(self, what: str, update: int = 1) -> None:
        """Make the next steps fail on the last rank alone: an infinite gradient, or an infinite constant in the loss.

        `update`: of the next step, which has one micro-batch a rank.
        """
        last, objective = self.place[0] == self.place[1] - 1, self.learner.objective
        if what == "gradient":
            parameter = next(self.learner._engine.module.parameters())
            self.undo = parameter.register_hook(lambda gradient: gradient * (math.inf if last else 1.0)).remove
            return
        honest, seen = objective.loss, []

        def infinite(*inputs: Any) -> Any:
            terms = honest(*inputs)
            seen.append(terms)
            if not last or len(seen) < update:
                return terms
            return replace(terms, loss=terms.loss + math.inf, sums={**terms.sums, "loss": math.inf})

        objective.loss = infinite  # type: ignore[method-assign]
        self.undo = lambda: objective.__dict__.pop("loss")

    def mend(self) -> None:
        """Undo `spoil`."""
        self.undo()

    def refuse_pairs(self) -> tuple[str, bool, int]:
        """What a reward model's learner says of an infinite gradient on the last rank, whether all is as before, version."""
        tree = {"policy": {"model": "m"}, "prompts": {"source": "p"}, "learners": {"precision": "bf16", "threads": 1}}
        learner = RewardModelLearner(loader.parse_as(RewardModelSettings, tree), self.folder, 4, *self.place)
        learner.begin(0)
        rows = [[5, 6, 7], [8, 9], [10, 11], [12, 13, 14, 15]]
        pairs = {"tokens": rows, "second": [0] * 4, "margin": [0.0] * 4}
        batch = pa.record_batch(pairs, schema=PAIR)
        learner.step(batch)
        before = read(learner._engine, self.place[0])
        bad = math.inf if self.place[0] == self.place[1] - 1 else 1.0
        next(learner._engine.module.parameters()).register_hook(lambda gradient: gradient * bad)
        try:
            learner.step(batch)
        except NotFinite as error:
            after = read(learner._engine, self.place[0])
            return str(error), all(torch.equal(before[name], after[name]) for name in before), learner.version
        return "no error", False, learner.version

    def odd(self, stage: int, directory: str, steps: int) -> dict[str, Tensor]:
        """A module of odd sizes with a frozen part and two parameter groups: load if there is what to load, step, save."""
        config = settings(zero_stage=stage).learners
        join_ranks(config, *self.place, 60.0)
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 1))
        module[1].requires_grad_(False)
        groups = [{"params": list(part.parameters()), "lr": 1e-2} for part in (module[:2], module[2])]
        engine = Engine(config, self.place[1], 10)
        engine.drive(module, torch.optim.AdamW(groups))
        loaded = (Path(directory) / "learner").exists()
        version = engine.restore_checkpoint(directory) if loaded else 0
        for step in range(steps):
            generator = torch.Generator().manual_seed(version + step)
            loss = engine(torch.randn(4, 3, generator=generator)).square().mean()
            engine.backward(loss / self.place[1], real=True)
            engine.update(version + step + 1, float(loss), {})
        if not loaded:
            engine.save(directory, version + steps)
        return read(engine, self.place[0])


def read(engine: Engine, rank: int) -> dict[str, Tensor]:
    from deepspeed import utils

    zero = engine._engine.optimizer
    if engine.learners.zero_stage < 3:
        zero._lazy_init_hp_params_optimizer_state()  # or its moments are unknown before its first step
    result = {f"module/{name}": tensor for name, tensor in engine.gather(engine.module, rank).items()}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            result[f"weight/{name}"] = utils.safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                result[f"{kind}/{name}"] = utils.safe_get_full_optimizer_state(parameter, kind).clone()
    return result
