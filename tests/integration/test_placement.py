"""Room for workers and learner groups on a cluster of two nodes: granted, waited for, given back, refused. No model in them."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import PlacementGroupID
from ray.cluster_utils import Cluster
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import keel as package
import test_pool
from keel.cluster import learner_group, placement
from keel.cluster.capacity import bundles
from keel.cluster.placement import Placement
from keel.cluster.pool import NoWorkers, Pool
from keel.cluster.worker import Spawn
from keel.config.workers import DeadlineSettings, GeneratorSettings, LearnerSettings, WorkerSettings
from keel.errors import LearnerLost, WorkerLost
from keel.rollout import generator
from live import add_node, refusal
from test_pool import LIMITS, Log, Worker, ask

HERE = [str(Path(__file__).parent), str(Path(package.__file__).parents[1])]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """Two CPUs on the head; four CPUs and four GPUs, which are mere numbers, on the other node."""
    os.environ["PYTHONPATH"] = os.pathsep.join(HERE)
    cluster = Cluster()
    add_node(cluster, num_cpus=2)
    add_node(cluster, num_cpus=4, num_gpus=4, resources={"fast": 2})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    modules = [sys.modules[__name__], test_pool]
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)  # the actors cannot import a test
    yield cluster
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def everything_is_given_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves room behind, and all tell of a wait after a quarter of a second."""
    monkeypatch.setattr(placement, "FIRST_REPORT_SECONDS", 0.25)
    monkeypatch.setattr(placement, "REPORT_EVERY_SECONDS", 0.5)
    yield
    left = granted()
    for name, item in placement_group_table().items():
        if item["state"] != "REMOVED":  # or the next tests would fail, too
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
    assert left == []


def granted() -> list[Any]:
    """Bundles of all placement groups that hold something, or ask for it."""
    return [item["bundles"] for item in placement_group_table().values() if item["state"] != "REMOVED"]


class Waits(Log):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, ...]] = []

    def waiting_for_resources(self, *words: str) -> None:
        self.told.append(words)

    def waited_for_resources(self, name: str, seconds: float, *, granted: bool) -> None:
        self.told.append((name, "found" if granted else "gave up"))


def pool_of(
    count: int, workers: WorkerSettings, log: Log | None = None, limits: DeadlineSettings = LIMITS, **broken: str
) -> Pool:
    spawn = Spawn(Worker, workers, lambda index: (index, *broken.values()))
    return Pool("generator", spawn, count, limits, restarts=1, patience_seconds=0.5, by_ticket=True, observer=log)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


def impatient(seconds: float) -> DeadlineSettings:
    return DeadlineSettings(**{**LIMITS.model_dump(), "placement_seconds": seconds})


async def test_a_worker_comes_when_somebody_elses_resources_is_given_back() -> None:
    other = placement_group([{"CPU": 3.0}])
    await other.ready()
    log = Waits()
    pool = pool_of(1, WorkerSettings(threads=3), log)
    bringing = asyncio.create_task(pool.ready())
    await until(lambda: log.told)
    assert log.told[0] == ("generator-0", "3 CPUs", "free are 2, 1 CPUs on 2 nodes")
    assert not bringing.done() and log.events == []  # no failure, no restart
    remove_placement_group(other)
    await bringing
    assert log.told[-1] == ("generator-0", "found") and log.events[0][0] == "worker_started"
    assert await ask(pool) == (0, -1)
    pool.stop()


async def test_where_nobody_serves_the_wait_ends_and_says_for_what() -> None:
    other = placement_group([{"CPU": 2.0, "GPU": 4.0}])
    await other.ready()
    log = Waits()
    pool = pool_of(1, WorkerSettings(threads=2, gpus=1, resources={"fast": 1}), log, impatient(3.0))
    with pytest.raises(
        NoWorkers,
        match=r"generator-0 waited [3-9] s for resources \(2 CPUs and 1 GPU and 1 fast\) and no other worker serves;"
        r" free are 2, 2 CPUs and 0, 0 GPUs and 2, 0 fast on 2 nodes",
    ):
        await pool.ready()
    assert log.told[-1] == ("generator-0", "gave up") and len(log.told) > 2
    pool.stop()
    remove_placement_group(other)


async def test_where_others_serve_a_worker_waits_as_long_as_it_takes() -> None:
    log = Waits()
    pool = pool_of(2, WorkerSettings(threads=3), log, impatient(3.0))
    await pool.ready()
    assert pool.serving == 1 and ("degraded", "") in log.events
    await asyncio.sleep(4.0)
    assert len(pool._coming) == 1 and not any(task.done() for task in pool._coming.values())
    assert len(log.told) > 3 and len({answer[0] for answer in log.told[-3:]}) == 1
    with pytest.raises(WorkerLost, match="died during generate"):
        await ask(pool, "die")
    await ask(pool)  # whichever of the two got the room that came free
    assert [name for name, _ in log.events].count("worker_lost") == 1
    pool.stop()
    await asyncio.sleep(0)
    await until(lambda: not granted())


async def test_nothing_stays_behind_when_workers_go() -> None:
    one = WorkerSettings(threads=1)
    pool = pool_of(3, one)
    await pool.ready()
    await until(lambda: pool.serving == 3)
    assert len(granted()) == 3
    with pytest.raises(WorkerLost, match="died during generate"):
        await ask(pool, "die")
    await until(lambda: pool.serving == 3)
    assert len(granted()) == 3
    pool.resize(9)  # more than fit
    await until(lambda: pool.serving == 6)
    assert len(granted()) == 9  # three of them only asked for
    pool.resize(1)
    await until(lambda: granted() == [{0: {"CPU": 1.0}}])
    busy = asyncio.create_task(ask(pool, "", 1.0))
    await asyncio.sleep(0.2)
    pool.resize(2)
    pool.give_way()
    await busy
    assert len(granted()) == 1
    pool.stop()
    await until(lambda: not granted())
    broken = pool_of(1, one, broken="no such model")
    with pytest.raises(NoWorkers, match="no such model"):
        await broken.ready()
    assert granted() == []


async def test_a_worker_that_was_to_retire_when_the_pool_ends_is_ended_with_it() -> None:
    pool = pool_of(2, WorkerSettings(threads=1))
    await pool.ready()
    await until(lambda: pool.serving == 2)
    calls = [asyncio.create_task(ask(pool, "", 3.0)) for _ in range(2)]
    await asyncio.sleep(0.2)
    pool.resize(1)
    pool.stop()
    await asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: not granted())
    assert pool.serving == 0


def test_a_driver_that_is_killed_leaves_no_resources_behind(cluster: Cluster) -> None:
    code = (
        "import ray, time; from keel.cluster.placement import Placement\n"
        f"ray.init({cluster.address!r}, log_to_driver=False, logging_level='ERROR')\n"
        "placements = [Placement([{'CPU': 1.0}] * 2, 'PACK'), Placement([{'CPU': 9.0}], 'PACK')]\n"
        "ray.get(placements[0].group.ready()); print('here', flush=True); time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "here\n"
    assert len(granted()) == 2
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while granted() and time.monotonic() < deadline:
        time.sleep(0.1)


class Rank:
    def __init__(self, rank: int, ranks: int, address: str, port: int) -> None:
        self.port = port

    def where(self) -> tuple[str, int]:
        return ray.get_runtime_context().get_node_id(), self.port


async def test_a_rank_group_goes_where_its_resources_are_and_tells_what_it_waits_for() -> None:
    learners = LearnerSettings(count=2, threads=2, resources={"fast": 1})
    result = await learner_group.largest_placement(learners, 2, 60.0, 60.0)
    ranks = learner_group.RankGroup(Rank, learners, placement=result)
    await ranks.ready()
    (with_gpus,) = [node["NodeID"] for node in ray.nodes() if "GPU" in node["Resources"]]
    assert [node for node, _ in await asyncio.gather(*(rank.where.remote() for rank in ranks.ranks))] == [with_gpus] * 2
    log = Waits()
    with pytest.raises(
        LearnerLost,
        match=r"no node has room for one learner rank \(2 CPUs and 1 fast\); waited [1-9] s;"
        r" free are 2, 0 CPUs and 0, 0 fast on 2 nodes",
    ):
        await learner_group.largest_placement(learners, 1, 1.0, 1.0, log)
    assert log.told[0] == ("the learner", "2 CPUs and 1 fast", "free are 2, 0 CPUs and 0, 0 fast on 2 nodes")
    ranks.stop()
    result.release()


class Engine:
    """What vLLM does with its bundles: a worker with a GPU in each of those it is told."""

    def __init__(self, index: int, settings: GeneratorSettings) -> None:
        os.environ |= generator.environment(settings)
        group = ray.util.get_current_placement_group()
        places = [int(bundle) for bundle in os.environ["VLLM_RAY_BUNDLE_INDICES"].split(",")]
        self.workers = [
            ray.remote(num_cpus=0, num_gpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle))(
                GpuWorker
            ).remote()
            for bundle in places
        ]

    def load_weights(self, version: int) -> None: ...

    def where(self) -> tuple[Any, list[Any]]:
        return place_and_gpus(), ray.get([worker.where.remote() for worker in self.workers])


class GpuWorker:
    def where(self) -> tuple[str, list[str]]:
        return place_and_gpus()


def place_and_gpus() -> tuple[str, list[str]]:
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids()["GPU"]


async def test_a_tensor_parallel_generator_has_a_bundle_for_each_of_its_gpus_on_one_node() -> None:
    settings = GeneratorSettings(threads=2, gpus=1, tensor_parallel=3)
    spawn = Spawn(Engine, settings, lambda index: (index, settings))
    pool = Pool("generator", spawn, 2, LIMITS, restarts=0, patience_seconds=0.5, by_ticket=True)
    await pool.ready()
    assert pool.serving == 1  # two of three GPUs are no room
    assert {0: {"CPU": 2.0}, 1: {"GPU": 1.0}, 2: {"GPU": 1.0}, 3: {"GPU": 1.0}} in granted()
    (subject, gpus), workers = await pool._serving[0].handle.where.remote()
    (with_gpus,) = [node["NodeID"] for node in ray.nodes() if "GPU" in node["Resources"]]
    assert subject == with_gpus and gpus == []
    assert {node for node, _ in workers} == {with_gpus}
    assert len({number for _, numbers in workers for number in numbers}) == 3
    pool.stop()
    await until(lambda: not granted())


async def test_vllm_accepts_the_bundles_of_a_tensor_parallel_generator() -> None:
    """Its own functions read them; the engine itself needs GPUs and was not run."""
    from vllm.v1.executor.ray_utils import get_bundles_for_indices

    settings = GeneratorSettings(threads=2, gpus=1, tensor_parallel=4)
    taken = Placement(bundles(settings), "STRICT_PACK")
    assert await taken.granted(60.0)
    indices = [int(item) for item in generator.environment(settings)["VLLM_RAY_BUNDLE_INDICES"].split(",")]
    ranks = generator.engine_arguments("folder", settings, 128)["tensor_parallel_size"]
    result = get_bundles_for_indices(taken.group, indices, ranks)
    assert [bundle for bundle, *_ in result] == [1, 2, 3, 4] and len({node for _, node, _ in result}) == 1
    assert all(taken.group.bundle_specs[bundle] == {"GPU": 1.0} for bundle in indices)
    taken.release()


def test_a_run_that_can_never_fit_is_one_line_and_leaves_nothing(
    cluster: Cluster, write_config: Callable[..., Path], keel: Callable[..., Any], tmp_path: Path
) -> None:
    """One CPU each for reference, scorer and learner; six CPUs in all, of which somebody else has two now."""
    other = placement_group([{"CPU": 2.0}])
    run = tmp_path / "refused" / "run"
    config = write_config("refused", run={"directory": str(run)}, scorers={"threads": 1}, generators={"count": 4})
    lines = {
        ("generators.threads=5", "generators.count=1"): "generators.threads=5: one generator asks for 5 CPUs;"
        " the largest of 2 nodes has 4 (4, 2)",
        (): "generators.count=4: 4 x 1 CPU (generators) + 1 x 1 (reference) + 1 x 1 (scorers) + 1 x 1 (learners) = 7"
        " CPUs; the cluster has 6; expected at most 3 generators",
    }
    for overrides, line in lines.items():
        answer = refusal(keel, "train", config, *overrides, "--address", cluster.address)
        assert answer == f"keel: {line}"
        assert [path.name for path in run.iterdir()] == ["lock"]
    remove_placement_group(other)
