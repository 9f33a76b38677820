"""A learner's state moves between numbers of ranks; a step that is not finite leaves no trace. Real DeepSpeed in Ray actors."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from arms import CRITIC_ARMS
from keel.cluster import actors
from keel.config import loader
from keel.config.run import Settings
from keel.errors import NotFinite
from probe import rendezvous
from rank import Rank
from test_learner import rollouts, settings

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]


class Ranks:
    """Every call goes to all ranks; rank 0 answers."""

    def __init__(self, folder: Path, ranks: int) -> None:
        place = (ranks, *rendezvous())
        self.actors = [ray.remote(num_cpus=1)(Rank).remote(str(folder), rank, *place) for rank in range(ranks)]

    def __call__(self, method: str, *arguments: Any) -> Any:
        return ray.get([getattr(actor, method).remote(*arguments) for actor in self.actors])[0]

    def refusals(self, step: int) -> list[NotFinite]:
        """What every rank says of a step that none of them takes."""
        result = []
        for answer in [actor.step.remote(rollouts(step)) for actor in self.actors]:
            with pytest.raises(NotFinite, match=rf"step {step + 1}: ") as caught:
                ray.get(answer)
            result.append(caught.value)
        return result


@pytest.fixture(scope="module")
def groups(tiny_model: Path) -> Iterator[dict[int, Ranks]]:
    folders = [Path(__file__).parent, Path(loader.__file__).parents[2]]  # where the actors find rank.py and this keel
    here = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, folders))}}
    actors.embedded(num_cpus=4, object_store_memory=2**27, runtime_env=here)
    yield {ranks: Ranks(tiny_model, ranks) for ranks in (1, 2)}
    ray.shutdown()


def configured(arm: dict[str, Any] | None = None, **learners: Any) -> Settings:
    """Ten steps on a cosine with warm-up; one micro-batch a rank."""
    chosen = settings(schedule="cosine", warmup_steps=4, tokens_per_batch=1024, **learners).model_dump(mode="json")
    chosen["run"]["steps"] = 10
    if arm is not None:
        chosen |= {"objective": arm["objective"], "regularizer": arm["regularizer"]}
    return loader.parse(chosen)


def same(one: Tensors, other: Tensors) -> bool:
    """Bit for bit; but for the sign of a zero, which DeepSpeed's own gathering loses."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: Tensors, other: Tensors) -> float:
    """Euclidean, of the master weights."""
    assert one.keys() == other.keys()
    names = [name for name in one if name.startswith("weight/")]
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in names))


# bf16: gradients are rounded to 8 bits on each rank before they are added, where one rank rounds the sum: the updates of
# two ranks are another sample of the same rounding noise, some parts in 2^8 of the way that the weights go
@pytest.mark.parametrize(
    ("stage", "precision", "arm", "tolerance"),
    [
        (1, "fp32", None, 1e-5),
        (2, "fp32", None, 1e-5),
        (3, "fp32", CRITIC_ARMS["eapo"], 1e-5),
        (1, "bf16", None, 5e-2),
    ],
)
def test_one_rank_to_two_and_back_is_the_run_that_never_moved(
    groups: dict[int, Ranks],
    tmp_path: Path,
    stage: int,
    precision: str,
    arm: dict[str, Any] | None,
    tolerance: float,
) -> None:
    one, two = groups[1], groups[2]
    chosen = {ranks: configured(arm, zero_stage=stage, precision=precision, count=ranks) for ranks in (1, 2)}
    one("begin", chosen[1])
    for step in range(3):
        one("step", rollouts(step))
    one("save", str(tmp_path / "a"))
    at_three = one("tensors")
    stayed = [one("step", rollouts(step)) for step in range(3, 10)]
    at_ten = one("tensors")
    way = distance(at_three, at_ten)
    assert way > 1e-1  # the steps moved the weights, so equality says something

    assert one("restore_checkpoint", str(tmp_path / "a")) == 3  # into a learner that has stepped
    again = [one("step", rollouts(step)) for step in range(3, 10)]
    assert [metrics["loss"] for metrics in again] == [metrics["loss"] for metrics in stayed]
    assert same(one("tensors"), at_ten)

    two("begin", chosen[2])
    assert two("restore_checkpoint", str(tmp_path / "a")) == 3  # into a new one
    assert same(two("tensors"), at_three)
    for step in (3, 4):
        two("step", rollouts(step))
    two("save", str(tmp_path / "b"))
    at_five = two("tensors")

    one("begin", chosen[1])
    assert one("restore_checkpoint", str(tmp_path / "b")) == 5
    assert same(one("tensors"), at_five)
    moved = [one("step", rollouts(step)) for step in range(5, 10)]
    assert [m["learning_rate"] for m in moved] == [m["learning_rate"] for m in stayed[2:]]
    assert [m["loss"] for m in moved] == pytest.approx([m["loss"] for m in stayed[2:]], rel=tolerance, abs=tolerance)
    assert distance(one("tensors"), at_ten) < tolerance * way


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_odd_sizes_frozen_parameters_and_groups(groups: dict[int, Ranks], tmp_path: Path, stage: int) -> None:
    """Uneven parts on two ranks; what is frozen is not in the files; any stage reads what any stage wrote."""
    saved = groups[1]("odd", stage, str(tmp_path), 2)
    assert not any(name.startswith("weight/1.") for name in saved)
    assert same(groups[2]("odd", stage % 3 + 1, str(tmp_path), 0), saved)
    expected, got = groups[1]("odd", stage, str(tmp_path), 2), groups[2]("odd", stage, str(tmp_path), 2)
    assert distance(expected, got) < 1e-6 < distance(expected, saved)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(
    groups: dict[int, Ranks], stage: int, precision: str, ranks: int
) -> None:
    """One rank spoils it, all refuse it; the next step is the one that a learner without the accidents takes."""
    group = groups[ranks]
    group("begin", configured(zero_stage=stage, precision=precision, count=ranks))
    group("step", rollouts(0))
    before, state = group("tensors"), group("state")
    for what in ("gradient", "loss"):
        group("spoil", what)
        for refusal in group.refusals(1):
            assert isinstance(refusal, FloatingPointError) and not refusal.weights_moved
            loss, norm = re.findall(r"step 2: the loss is (\S+), the gradient norm (\S+);", str(refusal))[0]
            assert norm == "inf" and math.isfinite(float(loss)) == (what == "gradient")
        group("mend")
        assert same(group("tensors"), before) and group("state") == state
    after = group("step", rollouts(2))
    weights = group("tensors")
    group("begin", configured(zero_stage=stage, precision=precision, count=ranks))
    group("step", rollouts(0))
    undisturbed = group("step", rollouts(2))
    assert after["loss"] == undisturbed["loss"] and same(weights, group("tensors"))


def test_a_refused_second_update_says_that_the_weights_moved(groups: dict[int, Ranks]) -> None:
    """And the objective's running numbers are those of before the step."""
    group = groups[1]
    group("begin", configured(CRITIC_ARMS["eapo"]))
    group("step", rollouts(0))
    before, state = group("tensors"), group("state")
    assert '"popart"' in state[1]
    group("spoil", "loss", 2)
    (refusal,) = group.refusals(1)
    assert refusal.weights_moved
    group("mend")
    assert group("state") == state and distance(group("tensors"), before) > 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_learner_of_reward_models_refuses_alike(groups: dict[int, Ranks], ranks: int) -> None:
    answers = ray.get([actor.refuse_pairs.remote() for actor in groups[ranks].actors])
    for message, unchanged, version in answers:
        assert message.startswith("step 2: the loss is 0.") and "the gradient norm inf" in message
        assert unchanged and version == 1
