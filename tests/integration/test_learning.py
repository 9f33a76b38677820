"""Every online objective raises a simple reward in 20 steps through the whole stack: vLLM, scorers, buffer, DeepSpeed.

Ray, generator and scorers are started once; each objective gets a learner group and a buffer of its own.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml

from arms import ARMS, CRITIC_ARMS
from keel.cli import doctor
from keel.cluster import actors, learner_group
from keel.cluster.weight_transport import ObjectStoreTransport
from keel.config import loader
from keel.config.run import Settings
from keel.learner import end_tokens, loading
from keel.learner.model_text import ModelText
from keel.online.controller import Controller
from keel.protocols import Components, Observer, Sampling
from keel.rollout.prompts import Prompts

pytestmark = pytest.mark.slow
STEPS = 20
# sparse targets anchored at the reference pull all other tokens back to it: no rise in so few steps (docs/use/algorithms.md)
EVERY = {name: arm for name, arm in {**ARMS, **CRITIC_ARMS}.items() if name != "lco_reference"}


OF_EACH_FAMILY = {
    *("kl", "entropy_sequence_sum", "grpo", "lco_kl", "dpo", "kto", "optidice_kl", "best_of_n", "ppo"),
}


class NoCheckpoints:
    async def save(self, step: int, *, finished: bool) -> None: ...

    async def renew_reference(self, step: int) -> None: ...


class Curve(Observer):
    """Training reward of each step."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def set(self, values: dict[str, Any]) -> None:
        if "reward" in values:
            self.rewards.append(values["reward"])


class Stack:
    """Generators and scorers that outlive the objectives they serve."""

    def __init__(self, folder: Path, tree: dict[str, Any], model: Path) -> None:
        self.folder, self.tree, self.model = folder, tree, model
        settings = self.settings(EVERY["kl"])
        tokenizer = loading.load_tokenizer(model, "policy.model")
        self.prompts = Prompts(settings, tokenizer)
        stop = end_tokens.decide(model, ModelText(tokenizer), len(tokenizer)).stop
        self.sampling = Sampling(1.0, 1.0, settings.sampling.max_tokens, stop)
        self.generators = actors.generators(settings, str(model))
        self.scorers = actors.scorers(settings, str(model), self.prompts.rows)
        self.runner = asyncio.Runner()  # one loop for all objectives: the pools live in it
        self.runner.run(self._ready())

    async def _ready(self) -> None:
        await asyncio.gather(self.generators.ready(), *(scorer.ready() for scorer in self.scorers))

    def settings(self, arm: dict[str, Any]) -> Settings:
        return loader.parse({**self.tree, **arm})

    async def train(self, name: str) -> list[float]:
        """Rewards of STEPS steps from the start model."""
        settings, directory = self.settings(EVERY[name]), self.folder / name
        learner = learner_group.LearnerGroup(settings, str(self.model))
        await learner.ready()
        curve = Curve()
        components = Components(
            generators=self.generators,
            scorers=self.scorers,
            buffer=actors.RemoteBuffer(settings, str(directory), settings.groups_per_batch, {}),
            learner=learner,
            transport=ObjectStoreTransport(),
            checkpoints=NoCheckpoints(),
            prompts=self.prompts.batch,
            held_out=self.prompts.held_out(),
            fetch=actors.fetch,
        )
        controller = Controller(settings, components, self.sampling, curve)
        await controller.sync()
        await controller.run()
        learner.stop()
        return curve.rewards


@pytest.fixture(scope="module")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("learning")
    tree = yaml.safe_load(doctor.self_test_config(folder, str(tiny_model)).read_text())
    tree["run"] |= {"steps": STEPS}
    tree["sampling"] = {"samples_per_prompt": 8, "max_tokens": 6}
    tree["buffer"] = {"groups_per_step": 3}
    tree["evaluation"] = {"every_steps": 0}
    tree["rewards"] = [{"name": "low", "source": "rewards:share_of_low_ids"}]
    tree["learners"] |= {"learning_rate": 3e-3, "tokens_per_batch": 2048}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folders = [Path(__file__).parent, Path(loader.__file__).parents[2]]  # where the actors find rewards and this keel
    here = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, folders))}}
    actors.embedded(num_cpus=8, object_store_memory=2**27, runtime_env=here)
    made = Stack(folder, tree, tiny_model)
    yield made
    made.runner.close()
    ray.shutdown()


@pytest.mark.parametrize(
    "name", [name if name in OF_EACH_FAMILY else pytest.param(name, marks=pytest.mark.exhaustive) for name in EVERY]
)
def test_the_reward_rises(stack: Stack, name: str) -> None:
    rewards = stack.runner.run(stack.train(name))
    assert len(rewards) == STEPS
    first, last = np.mean(rewards[:4]), np.mean(rewards[-4:])
    print(f"{name}: {first:.3f} -> {last:.3f}")
    assert last > first + 0.1, (name, np.round(rewards, 2).tolist())
