"""Pools and rank groups of Ray actors under deaths, hangs, garbage, failed loads, scaling and want of room. No model in them."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from keel.cluster import actors, learner_group
from keel.cluster.pool import NoWorkers, Pool
from keel.cluster.worker import Spawn
from keel.config.workers import DeadlineSettings, LearnerSettings, WorkerSettings
from keel.errors import LearnerLost, NotFinite, WorkerLost
from keel.protocols import LoadReceipt, Observer
from keel.schema import ContractError

LIMITS = DeadlineSettings(start_seconds=60, generate_seconds=20, score_seconds=20, step_seconds=20, load_seconds=20)


@pytest.fixture(scope="module", autouse=True)
def four_cpus() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import a test
    actors.embedded(num_cpus=4, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Worker:
    """A generator in everything but what it generates. Orders are words in the arguments."""

    def __init__(self, index: int, broken: str = "") -> None:
        self.index, self.version = index, -1
        if broken:
            raise RuntimeError(broken)

    def load_weights(self, version: int) -> LoadReceipt:
        if version < 0:
            raise ValueError(f"weights version {version}: wrong digest")
        self.version = version
        return LoadReceipt(version, "digest", 1, 0.0)

    def generate(self, order: str = "", seconds: float = 0.0) -> tuple[str, tuple[int, int]]:
        time.sleep(seconds)
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "garbage":
            raise ContractError("column completion_logprobs: not finite")
        if order == "crash":
            raise KeyError("a bug")
        return "rows", (self.index, self.version)


class Log(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.workers: dict[str, float] = {}

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, str(fields.get("reason", fields.get("worker", "")))))

    def set(self, values: dict[str, Any]) -> None:
        self.workers = values["workers"]


def spawning(worker: type = Worker, cpus: int = 1, *arguments: Any) -> Spawn:
    return Spawn(worker, WorkerSettings(threads=cpus), lambda index: (index, *arguments))


def pool_of(count: int, log: Observer | None = None, limits: DeadlineSettings = LIMITS, **options: Any) -> Pool:
    by_ticket = options.pop("by_ticket", True)
    patience = options.pop("patience_seconds", 20.0)
    spawn = spawning(Worker, options.pop("cpus", 1), *options.values())
    return Pool(
        "generator", spawn, count, limits, restarts=1, patience_seconds=patience, by_ticket=by_ticket, observer=log
    )


async def ask(pool: Pool, *arguments: Any, deadline: float = 60.0) -> tuple[int, int]:
    """(which worker, version of its weights) of a call."""
    _, receipt = await pool.call(deadline, Worker.generate, *arguments)
    return receipt


@pytest.mark.parametrize(
    ("order", "deadline", "reason"),
    [
        (("die",), 60.0, "generator-0 died during generate"),
        (("", 30.0), 2.0, "generator-0 did not answer within 2 s during generate"),
        (("garbage",), 60.0, "generator-0 gave garbage during generate: column completion_logprobs: not finite"),
    ],
    ids=["death", "hang", "garbage"],
)
async def test_a_lost_worker_is_replaced_by_one_with_the_newest_weights(
    order: Any, deadline: float, reason: str
) -> None:
    log = Log()
    pool = pool_of(1, log)
    await pool.ready()
    await pool.load_weights(7)
    with pytest.raises(WorkerLost, match=reason):
        await ask(pool, *order, deadline=deadline)
    assert await ask(pool) == (0, 7)  # waited for the new one, which had loaded
    lost = reason.removeprefix("generator-0 ")
    assert log.events == [("worker_started", "generator-0"), ("worker_lost", lost), ("worker_started", "generator-0")]
    assert log.workers == {"generator": 1.0}
    pool.stop()


async def test_others_serve_while_a_lost_worker_comes_back() -> None:
    pool = pool_of(2)
    await pool.ready()
    await pool.load_weights(1)
    with pytest.raises(WorkerLost, match="died during generate"):
        await ask(pool, "die")
    assert [await ask(pool) for _ in range(4)] == [(1, 1)] * 4
    assert pool.serving == 1, "the call waited for the other worker"
    await pool.load_weights(2)  # also while one is coming up
    async with asyncio.timeout(60):
        while pool.serving < 2:
            await asyncio.sleep(0.05)
    assert {await ask(pool) for _ in range(4)} == {(0, 2), (1, 2)}
    pool.stop()


async def test_an_error_of_the_workers_own_code_is_no_loss() -> None:
    pool = pool_of(1)
    await pool.ready()
    with pytest.raises(KeyError, match="a bug"):
        await ask(pool, "crash")
    assert pool.serving == 1
    pool.stop()


async def test_weights_that_nobody_can_load_end_the_pool_with_the_reason() -> None:
    pool = pool_of(2)
    await pool.ready()
    with pytest.raises(NoWorkers, match="weights version -1: wrong digest"):
        await pool.load_weights(-1)
    pool.stop()


async def test_workers_that_cannot_be_built_say_why_at_once() -> None:
    pool = pool_of(1, broken="no such model")
    with pytest.raises(NoWorkers, match="no such model"):
        await pool.ready()
    pool.stop()


async def test_a_pool_grows_and_shrinks_without_losing_a_call() -> None:
    pool = pool_of(1, by_ticket=False)
    await pool.ready()
    await pool.load_weights(3)
    pool.resize(3)
    assert await ask(pool) == (0, 3)  # the call does not wait for the new ones
    await asyncio.gather(*pool._coming.values())
    receipts = await pool.load_weights(4)
    assert [receipt.version for receipt in receipts] == [4, 4, 4]
    calls = [asyncio.create_task(ask(pool, "", 0.5)) for _ in range(3)]
    await asyncio.sleep(0.1)
    pool.resize(1)
    assert sorted(await asyncio.gather(*calls)) == [(0, 4), (1, 4), (2, 4)]
    assert pool.serving == 1
    async with asyncio.timeout(60):
        while ray.available_resources().get("CPU") != 3.0:  # until those who were retired are gone
            await asyncio.sleep(0.1)
    pool.stop()


async def test_more_workers_than_there_is_resources_for_are_pending_and_come_when_there_is() -> None:
    log = Log()
    pool = pool_of(3, log, cpus=2, patience_seconds=15.0)
    await pool.ready()
    assert pool.serving == 2 and ("degraded", "") in log.events
    pool.resize(1)
    await asyncio.sleep(1.0)
    pool.resize(2)
    await asyncio.gather(*pool._coming.values())
    assert pool.serving == 2
    pool.stop()


async def test_a_call_waits_for_its_turn_and_its_deadline_begins_then() -> None:
    pool = pool_of(1)
    await pool.ready()
    assert await asyncio.gather(*(ask(pool, "", 2.0, deadline=7.0) for _ in range(4))) == [(0, -1)] * 4
    pool.stop()


class Rank:
    """A learner rank that does as it is told, by rank."""

    def __init__(self, rank: int, ranks: int, address: str, port: int) -> None:
        self.rank, self.where = rank, (ranks, address, port)

    def step(self, orders: list[str]) -> Any:
        order = orders[self.rank]
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "broken collective":
            raise RuntimeError("Connection closed by peer")
        if order == "not finite":
            raise NotFinite(f"rank {self.rank}: the loss is nan")
        if order == "hang":
            time.sleep(60)
        return self.rank, self.where


@pytest.mark.parametrize(
    ("orders", "error", "message"),
    [
        (["broken collective", "die"], LearnerLost, "learner rank 1 of 2 died during step"),
        (["die", "hang"], LearnerLost, "learner rank 0 of 2 died during step"),
        (["not finite", "not finite"], NotFinite, "rank 0: the loss is nan"),
        (["broken collective", "broken collective"], RuntimeError, "Connection closed by peer"),
    ],
)
async def test_a_rank_group_tells_a_lost_rank_from_an_error_of_its_own(
    orders: list[str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_group, "_GRACE_SECONDS", 3 if "hang" in orders else 60)
    ranks = learner_group.RankGroup(Rank, LearnerSettings(count=2, threads=1))
    await ranks.ready()
    first, (count, _, port) = await ranks.call(Rank.step, ["", ""])
    assert (first, count) == (0, 2) and 20_000 <= port < 32_000
    with pytest.raises(error, match=message):
        await ranks.call(Rank.step, orders)
    ranks.stop()


async def test_a_rank_group_takes_the_resources_there_is() -> None:
    learners = LearnerSettings(count=3, threads=2)
    placement = await learner_group.largest_placement(learners, 3, seconds=1.0, last_seconds=1.0)
    assert placement.ranks == 2  # of four CPUs
    ranks = learner_group.RankGroup(Rank, learners, placement=placement)
    await ranks.ready()
    assert (await ranks.call(Rank.step, ["", ""]))[1][0] == 2
    with pytest.raises(LearnerLost, match=r"no node has room for one learner rank \(2 CPUs\)"):
        await learner_group.largest_placement(learners, 1, seconds=0.5, last_seconds=0.5)
    ranks.stop()
    placement.release()
    again = await learner_group.largest_placement(learners, 2, seconds=10.0, last_seconds=10.0)
    assert again.ranks == 2
    again.release()
