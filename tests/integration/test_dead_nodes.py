"""Nodes of a cluster die under a run: raylets of a Ray cluster on this machine, killed with all that they hold."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

import keel as package
from commands import finish
from live import add_node, check_intact, events_of, last_step, more_steps, title_of, wait

pytestmark = pytest.mark.slow
NODES = {"learner": {"num_cpus": 3}, "generator": {"num_cpus": 1, "num_gpus": 1}}
"""What the node of a role promises. The GPU is a mere number, which draws the generator there and keeps others away."""
CLASSES = {
    "generator": "VllmGenerator",
    "reference": "ReferenceScorer",
    "scorer": "RewardScorer",
    "learner": "DeepSpeedLearner",
}
Start = Callable[..., Any]


@pytest.fixture
def cluster(restored_process: None, pace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs, which has the driver and the buffer, a node for the generator and one for the others."""
    paths = [str(Path(__file__).parent), str(Path(package.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    cluster = Cluster()
    for node in ({"num_cpus": 0}, *NODES.values()):
        add_node(cluster, **node)
    yield cluster
    cluster.shutdown()


def kill_node_of(role: str) -> set[str]:
    """kill -9 of the raylet under which the worker of a role runs; roles of all workers that it had."""
    for raylet in psutil.Process().children(recursive=True):
        if Path(title_of(raylet).split(" ")[0]).name == "raylet":
            titles = [title_of(worker) for worker in raylet.children()]
            held = {item for item, name in CLASSES.items() if any(title.startswith(f"ray::{name}") for title in titles)}
            if role in held:
                raylet.kill()
                return held
    raise AssertionError(f"no node has a {role}")


def test_a_run_outlives_the_nodes_of_its_generator_and_of_its_learner(
    cluster: Cluster, write_config: Start, keel: Start, tmp_path: Path, pace: Path
) -> None:
    run = tmp_path / "nodes" / "run"
    pace.write_text("0.5")
    config = write_config(
        "nodes",
        run={"name": "nodes", "steps": 150, "directory": str(run)},
        rewards=[{"name": "low", "source": "rewards:paced"}],
        generators={"gpus": 1},
        scorers={"threads": 1},
        checkpoint={"every_steps": 5},
        evaluation={"every_steps": 0},
    )
    process = keel("train", str(config), "--address", cluster.address)
    wait(process, lambda: last_step(run) >= 6, "a checkpoint and a step")
    for role in ("generator", "learner"):
        hit = time.time()
        held = kill_node_of(role)
        assert held == ({"generator"} if role == "generator" else {"learner", "reference", "scorer"}), held
        add_node(cluster, **NODES[role])
        check_lost_and_back(process, run, held, hit)
    pace.unlink()
    code, _, err = finish(process)
    assert code == 0, err
    check_intact(keel, run)


def check_lost_and_back(process: Any, run: Path, held: set[str], hit: float) -> None:
    """The files say of every worker on the node that it was lost, and that another serves; steps are recorded."""
    for role in sorted(held - {"learner"}):
        wait(process, lambda role=role: events_of(run, "worker_lost", role=role, since=hit), f"loss of the {role}")
        wait(process, lambda role=role: events_of(run, "worker_started", role=role, since=hit), f"another {role}")
    if "learner" in held:
        wait(process, lambda: events_of(run, "rebuild", since=hit), "loss of the learner")
        reason = events_of(run, "rebuild", since=hit)[0]["reason"]
        assert "learner rank 0 of 1 died" in reason or "the weights were lost with their node" in reason, reason
        wait(process, lambda: events_of(run, "running", since=hit), "another learner")
    more_steps(process, run)
    print(f"node with {sorted(held)}: two steps after {time.time() - hit:.1f} s")
    print(*events_of(run, since=hit), sep="\n")
