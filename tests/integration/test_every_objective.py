"""One real step of every objective: 1 rank = 2 ranks, and how rows are cut into passes changes nothing."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from arms import ARMS, CRITIC_ARMS
from keel.cluster import actors as ray_actors
from keel.config import loader
from keel.config.run import Settings
from probe import Probe, rendezvous
from test_learner import rollouts, settings

pytestmark = pytest.mark.slow


def configured(arm: dict[str, Any], **learners: Any) -> Settings:
    tree = settings(**learners).model_dump(mode="json")
    tree["objective"] = {"correction": "none"} if "kind" not in arm["objective"] else {}
    blocks = {name: {**tree.get(name, {}), **arm[name]} if name == "objective" else arm[name] for name in arm}
    return loader.parse({**tree, **blocks, "regularizer": arm["regularizer"]})


@pytest.fixture(scope="module")
def groups(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(flavour, ranks) -> Probe actors; made once each."""
    folders = [Path(__file__).parent, Path(loader.__file__).parents[2]]  # where the actors find probe.py and this keel
    here = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, folders))}}
    ray_actors.embedded(num_cpus=8, object_store_memory=2**27, runtime_env=here)
    made: dict[tuple[str, int], list[Any]] = {}

    def group(flavour: str, ranks: int) -> list[Any]:
        for key in [key for key in made if key[0] not in ("none", flavour)]:
            for actor in made.pop(key):
                ray.kill(actor)
        if (flavour, ranks) not in made:
            chosen = configured(CRITIC_ARMS.get(flavour, ARMS["kl"]), count=ranks, zero_stage=1)
            address, port = rendezvous()
            actors = [
                ray.remote(num_cpus=1)(Probe).remote(chosen, str(tiny_model), {}, rank, ranks, address, port)
                for rank in range(ranks)
            ]
            directory = tmp_path_factory.mktemp("start")
            ray.get([actor.begin.remote(str(directory)) for actor in actors])
            made[flavour, ranks] = actors
        return made[flavour, ranks]

    yield group
    ray.shutdown()


def probe(
    group: list[Any], chosen: Settings, kl_multiplier: float = 1.0
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    batch = rollouts(0)
    return ray.get([actor.probe.remote(chosen, batch, kl_multiplier) for actor in group])[0]


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


STARTED: dict[str, dict[str, torch.Tensor]] = {}


def started(groups: Any, flavour: str, arm: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights every step of a flavour starts from."""
    if flavour not in STARTED:
        STARTED[flavour] = probe(groups(flavour, 1), configured(arm, learning_rate=1e-12))[0]
    return STARTED[flavour]


@pytest.mark.parametrize("name", [*ARMS, *CRITIC_ARMS])
def test_a_step_is_the_same_however_it_is_divided(groups: Any, name: str, tiny_model: Path) -> None:
    arm = {**ARMS, **CRITIC_ARMS}[name]
    flavour = name if name in CRITIC_ARMS else "none"
    one, metrics = probe(groups(flavour, 1), configured(arm))
    two, of_two = probe(groups(flavour, 2), configured(arm, count=2))
    small, of_small = probe(groups(flavour, 1), configured(arm, tokens_per_batch=32, shared_prompt_tokens=0))
    start = started(groups, flavour, arm)
    assert difference(one, start) > 1e-4  # the step moved the weights, so equality says something
    assert difference(one, two) < 1e-5
    assert difference(one, small) < 1e-5
    for other in (of_two, of_small):
        for key in {"loss", "grad_norm", "policy_loss", "preference_loss", "kl_loss"} & set(metrics):
            assert other[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), key
    assert of_two["state"] == metrics["state"]


@pytest.mark.parametrize(
    "place",
    [
        {"placement": "reward", "importance_weighted": True},
        {"placement": "loss", "estimator": "k3"},
        {"placement": "loss", "estimator": "exact"},
    ],
    ids=str,
)
def test_a_kl_that_the_guard_begins_costs_nothing_before_and_is_that_kl_after(
    groups: Any, place: dict[str, Any]
) -> None:
    def taken(coefficient: float, kl_multiplier: float = 1.0, **blocks: Any) -> Any:
        arm = {"objective": {}, "regularizer": {"kl": {"coefficient": coefficient, **place}}, **blocks}
        return probe(groups("none", 1), configured(arm), kl_multiplier)

    guard = {"entropy": {"actions": ["raise_kl"]}, "raise_kl": {"min_coefficient": 0.3}}
    without, (before, of_before), (after, metrics), configured_alike = (
        taken(0.0),
        taken(0.0, guard=guard),
        taken(0.0, 2.0, guard=guard),
        taken(0.3),
    )
    assert all(torch.equal(before[name], value) for name, value in without[0].items())
    assert all(torch.equal(after[name], value) for name, value in configured_alike[0].items())
    assert metrics["kl_coefficient"] == 0.3 and metrics["loss"] == configured_alike[1]["loss"]
    assert "kl_loss" not in of_before and ("kl_loss" in metrics) == (place["placement"] == "loss")
    if place.get("estimator") != "exact":  # whose gradient is 0 here, where the policy is its reference
        assert difference(before, after) > 1e-4


@pytest.mark.parametrize("name", ["kl", "dpo"])
def test_log_probs_that_are_not_finite_stop_the_step_before_the_optimizer(groups: Any, name: str) -> None:
    """rloo sees it in its loss, dpo when it measures; neither moves a weight."""
    batch = rollouts(0)
    broken = batch.set_column(
        batch.schema.get_field_index("prompt_tokens"),
        batch.schema.field("prompt_tokens"),
        pa.array([[0, 0, 5]] * batch.num_rows, batch.schema.field("prompt_tokens").type),
    )  # the token whose embedding is broken
    (message,) = ray.get(
        [actor.step_with_a_broken_weight.remote(configured(ARMS[name]), broken) for actor in groups("none", 1)]
    )
    assert message.startswith("step 1: ") and ("the loss is nan" in message or "not finite" in message)
