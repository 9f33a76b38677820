"""A pool on actors of this process and a clock that jumps: who gets a call, who is lost, who comes back, and when."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

import jumping
from jumping import now
from keel.cluster import placement as placement_module
from keel.cluster import pool as pool_module
from keel.cluster import worker as worker_module
from keel.cluster.pool import NoWorkers, Pool
from keel.config.workers import DeadlineSettings
from keel.errors import LearnerLost, WorkerLost
from keel.protocols import LoadReceipt, Observer
from keel.rollout.generator import VllmGenerator
from keel.schema import ContractError

LIMITS = DeadlineSettings(
    start_seconds=50, generate_seconds=40, score_seconds=30, step_seconds=20, load_seconds=10, placement_seconds=200
)
FOREVER = 1e9


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("method", "traceback", cause, proctitle="worker", pid=1, ip="here")


def died() -> RayActorError:
    return RayActorError()


def object_lost() -> ObjectLostError:
    return ObjectLostError("00", None, "")


class Method:
    """`actor.method.remote(...)`, and `actor.method.options(num_returns=2).remote(...)`: (handle, receipt)."""

    def __init__(self, call: Callable[..., Coroutine[Any, Any, Any]], pair: bool = False) -> None:
        self._call, self._pair = call, pair

    def options(self, num_returns: int) -> "Method":
        assert num_returns == 2
        return Method(self._call, pair=True)

    def remote(self, *arguments: Any) -> Any:
        task = asyncio.ensure_future(self._call(*arguments))
        return ("rows", task) if self._pair else task


class World:
    """What the actors of a test do, by index and by the number of the attempt to start it; what became of them."""

    def __init__(self) -> None:
        self.starts: dict[int, list[float]] = defaultdict(list)
        """When each was placed, by index."""
        self.killed: list[tuple[int, int]] = []
        self.released = 0
        self.calls: list[tuple[float, int, Any]] = []
        self.loads: list[tuple[float, int, Any]] = []
        self.start: Callable[[int, int], Any] = lambda index, attempt: 0.0
        self.load: Callable[[int, Any], Any] = lambda index, weights: 0.0
        self.answer: Callable[[int, Any], Any] = lambda index, order: 0.0
        self.placement: Callable[[int, int], float] = lambda index, attempt: 0.0
        """Seconds until there is room."""
        self._placements = 0

    # what pool.py and worker.py ask of a Spawn

    actor_class = object

    def arguments(self, index: int) -> tuple[int]:
        return (index,)

    def kill(self, actor: "Actor", no_restart: bool) -> None:
        assert no_restart
        self.killed.append((actor.index, actor.attempt))


class Placement:
    """A placement that is granted after the seconds the world says; the index comes with the first question."""

    ranks = 1

    def __init__(self, world: World) -> None:
        self.world, self.began, self.index = world, now(), -1
        self.free_again = False

    async def granted(self, seconds: float | None = None) -> bool:
        wait = self.world.placement(self.index, len(self.world.starts[self.index]) + 1) - (now() - self.began)
        assert seconds is not None
        await asyncio.sleep(min(max(wait, 0.0), seconds))
        return wait <= seconds

    def place(self, actor_class: type, bundle: int, *, with_children: bool = False) -> Any:
        assert actor_class is object and bundle == 0 and not with_children
        return SimpleNamespace(remote=lambda index: Actor(self.world, index))

    def placed(self) -> bool:
        return False

    def asked(self) -> str:
        return "1 CPU"

    def free(self) -> str:
        return "nothing is free"

    def release(self) -> None:
        assert not self.free_again, "released twice"
        self.free_again = True
        self.world.released += 1


class Actor:
    """One call at a time is what the pool promises: a second one at once is an error."""

    def __init__(self, world: World, index: int) -> None:
        world.starts[index].append(now())
        self.world, self.index, self.attempt = world, index, len(world.starts[index])
        self.busy = False
        self.__ray_ready__ = Method(self._ready)
        self.load_weights, self.generate = Method(self._load), Method(self._generate)

    async def _do(self, what: Any) -> None:
        """Sleep for `what` seconds, or raise it."""
        if isinstance(what, BaseException):
            await asyncio.sleep(0.25)
            raise what
        await asyncio.sleep(what)

    async def _ready(self) -> None:
        await self._do(self.world.start(self.index, self.attempt))

    async def _load(self, weights: Any) -> LoadReceipt:
        self.world.loads.append((now(), self.index, weights))
        await self._do(self.world.load(self.index, weights))
        return LoadReceipt(weights or 0, f"digest {self.index}", 1, 0.0)

    async def _generate(self, order: Any) -> tuple[int, int]:
        assert not self.busy
        self.busy = True
        self.world.calls.append((now(), self.index, order))
        try:
            await self._do(self.world.answer(self.index, order))
        finally:
            self.busy = False
        return self.index, self.attempt


class Log(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        self.added: dict[str, float] = defaultdict(float)
        self.gauges: dict[str, Any] = {}
        self.utilization: list[tuple[int, int, int]] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((now(), name, fields))

    def set(self, values: dict[str, Any]) -> None:
        self.gauges |= values

    def add(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            assert value == {"generator": 1.0}
            self.added[name] += 1

    def occupied(self, role: str, running: int, waiting: int, serving: int) -> None:
        assert role == "generator"
        self.utilization.append((running, waiting, serving))

    def names(self) -> list[str]:
        return [name for _, name, _ in self.events]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    clock = SimpleNamespace(monotonic=now)
    for module in (pool_module, worker_module, placement_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(worker_module, "ray", SimpleNamespace(kill=made.kill))
    monkeypatch.setattr(
        worker_module.Worker, "__post_init__", lambda self: setattr(self, "placement", placement(made, self))
    )
    return made


def placement(world: World, worker: Any) -> Placement:
    made = Placement(world)
    made.index = worker.index
    return made


def pool_of(world: World, count: int, log: Log | None = None, **options: Any) -> Pool:
    config: dict[str, Any] = {"restarts": 1, "patience_seconds": 20.0, "by_ticket": True} | options
    return Pool("generator", world, count, LIMITS, observer=log, **config)  # type: ignore[arg-type]


async def ask(pool: Pool, order: Any = "", deadline: float = 30.0) -> tuple[int, int]:
    """(index, attempt) of the worker that answered."""
    handle, receipt = await pool.call(deadline, VllmGenerator.generate, order)
    assert handle == "rows"
    return receipt


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return jumping.run(work)


async def seconds(count: float) -> None:
    await asyncio.sleep(count)


# ---- coming up


@pytest.mark.parametrize("restarts", [0, 1, 2, 4])
def test_a_worker_that_never_comes_up_is_tried_as_often_as_restarts_say(world: World, restarts: int) -> None:
    """The first attempt and `restarts` more, each later than the one before by a wait that doubles."""
    world.start = lambda index, attempt: died()
    pool = pool_of(world, 1, restarts=restarts)
    with pytest.raises(NoWorkers, match="no generator serves: generator-0 died while starting"):
        run(pool.ready())
    starts = world.starts[0]
    assert len(starts) == restarts + 1
    waits = [later - earlier - 0.25 for earlier, later in itertools.pairwise(starts)]
    assert waits == pytest.approx([2.0**number for number in range(restarts)])
    assert world.killed == [(0, attempt) for attempt in range(1, restarts + 2)] and world.released == restarts + 1


def test_while_others_serve_a_worker_is_tried_for_ever_at_most_half_a_minute_apart(world: World) -> None:
    world.start = lambda index, attempt: died() if index == 1 else 0.0
    log = Log()

    async def work() -> None:
        pool = pool_of(world, 2, log, restarts=0)
        await pool.ready()
        await seconds(300)
        assert pool.serving == 1
        pool.stop()

    run(work())
    waits = [later - earlier - 0.25 for earlier, later in zip(world.starts[1], world.starts[1][1:], strict=False)]
    assert waits[:7] == pytest.approx([1, 2, 4, 8, 16, 30, 30]) and len(waits) > 9
    degraded = [fields for _, name, fields in log.events if name == "degraded"]
    assert degraded == [{"role": "generator", "desired": 2, "actual": 1}]


def test_attempts_that_failed_while_others_served_do_not_count(world: World) -> None:
    """Worker 1 fails many times beside worker 0; when that one dies it has all its restarts before it."""
    world.start = lambda index, attempt: died() if index == 1 or attempt > 1 else 0.0

    async def work() -> tuple[int, int]:
        pool = pool_of(world, 2, restarts=3)
        await pool.ready()
        await seconds(100)
        before = len(world.starts[1])
        assert before > 5
        with pytest.raises(WorkerLost, match="generator-0 did not answer within 5 s during generate"):
            await ask(pool, "hang", deadline=5.0)
        with pytest.raises(NoWorkers, match="no generator serves"):
            await ask(pool)
        pool.stop()
        return len(world.starts[1]) - before, len(world.starts[0]) - 1

    world.answer = lambda index, order: FOREVER if order == "hang" else 0.0
    again, of_zero = run(work())
    assert of_zero == 4 and again in (4, 5)  # one of them may have begun beside worker 0


@pytest.mark.parametrize("error", [task_error(ValueError("no such model")), RayActorError(actor_init_failed=True)])
def test_the_workers_own_fault_at_the_first_start_ends_the_pool_at_once(world: World, error: Exception) -> None:
    world.start = lambda index, attempt: error
    with pytest.raises(NoWorkers, match="no generator serves: generator-0"):
        run(pool_of(world, 1, restarts=5).ready())
    assert len(world.starts[0]) == 1


def test_the_same_fault_later_is_tried_again(world: World) -> None:
    """Once a worker has served, its code can start: what fails now may be the machine."""
    world.start = lambda index, attempt: task_error(ValueError("no memory")) if attempt in (2, 3) else 0.0
    world.answer = lambda index, order: died() if order == "die" else 0.0

    async def work() -> tuple[int, int]:
        pool = pool_of(world, 1, restarts=2)
        await pool.ready()
        with pytest.raises(WorkerLost, match="generator-0 died during generate"):
            await ask(pool, "die")
        answer = await ask(pool)
        pool.stop()
        return answer

    assert run(work()) == (0, 4)


def test_a_start_that_takes_too_long_is_given_up(world: World) -> None:
    world.start = lambda index, attempt: 50.5 if attempt == 1 else 49.5

    async def work() -> None:
        await pool_of(world, 1).ready()
        assert now() == pytest.approx(50 + 1 + 49.5)

    run(work())
    assert world.killed[0] == (0, 1)


def test_a_worker_waits_for_resources_for_ever_while_others_serve(world: World) -> None:
    world.placement = lambda index, attempt: 5000.0 if index == 1 else 3.0
    log = Log()

    async def work() -> None:
        await seconds(7)  # the clock does not stand at 0
        pool = pool_of(world, 2, log)
        await pool.ready()
        assert now() == pytest.approx(7 + 3 + 20)  # patience, once
        await seconds(5000)
        assert pool.serving == 2 and world.killed == []
        pool.stop()

    run(work())
    started = {fields["worker"]: fields["seconds"] for _, name, fields in log.events if name == "worker_started"}
    assert started == {"generator-0": 3.0, "generator-1": 5000.0}


def test_a_worker_waits_for_resources_only_so_long_when_nobody_serves(world: World) -> None:
    world.placement = lambda index, attempt: 5000.0

    async def work() -> None:
        with pytest.raises(
            NoWorkers, match=r"generator-0 waited 200 s for resources \(1 CPU\) and no other worker serves; nothing"
        ):
            await pool_of(world, 1).ready()
        assert now() == pytest.approx(200)

    run(work())
    assert world.starts[0] == [] and world.released == 1


def test_the_time_without_resources_counts_from_when_the_last_one_stopped_serving(world: World) -> None:
    world.placement = lambda index, attempt: FOREVER if index == 1 or attempt > 1 else 0.0
    world.answer = lambda index, order: died()

    async def work() -> float:
        pool = pool_of(world, 2)
        await pool.ready()
        await seconds(1000)
        with pytest.raises(WorkerLost, match="died"):
            await ask(pool)
        lost = now()
        with pytest.raises(NoWorkers, match="for resources"):
            await ask(pool)
        return now() - lost

    assert run(work()) == pytest.approx(200, abs=2.0)


def test_one_comes_up_first_and_alone(world: World) -> None:
    async def work() -> None:
        pool = pool_of(world, 3)
        await pool.first()
        assert sorted(world.starts) == [0] and pool.serving == 1
        await pool.first()
        assert sorted(world.starts) == [0]
        await pool.ready()
        await seconds(1)
        assert pool.serving == 3 and {index: len(times) for index, times in world.starts.items()} == {0: 1, 1: 1, 2: 1}
        pool.stop()

    run(work())


def test_those_not_up_yet_give_way_and_come_again(world: World) -> None:
    world.start = lambda index, attempt: 20.0 * index

    async def work() -> None:
        pool = pool_of(world, 3)
        await pool.first()
        pool.resize(3)
        await seconds(21)
        assert pool.serving == 2
        pool.give_way()
        await seconds(100)
        assert pool.serving == 2 and world.killed == [(2, 1)] and world.released == 1
        pool.resize(3)
        await seconds(41)
        assert pool.serving == 3 and len(world.starts[2]) == 2 and len(world.starts[1]) == 1
        pool.stop()

    run(work())


def test_patience_is_had_once(world: World) -> None:
    """The first `ready` waits for slow workers; a later one continues with those that serve."""
    world.start = lambda index, attempt: 1000.0 if index == 1 else 0.0

    async def work() -> list[float]:
        pool, times = pool_of(world, 2), []
        for _ in range(2):
            began = now()
            await pool.ready()
            times.append(now() - began)
        pool.stop()
        return times

    assert run(work()) == pytest.approx([20.0, 0.0])


# ---- calls


@pytest.mark.parametrize(("by_ticket", "expected"), [(True, [0, 1, 2, 0, 1, 2, 0]), (False, [0, 1, 2, 1, 2, 1, 2])])
def test_who_gets_a_call(world: World, by_ticket: bool, expected: list[int]) -> None:
    """Round robin, however long worker 0 takes, where the order must not depend on time; else the least waited for."""
    world.answer = lambda index, order: 30.0 if index == 0 else 1.0

    async def work() -> list[int]:
        pool = pool_of(world, 3, by_ticket=by_ticket)
        await pool.ready()
        calls = []
        for _ in range(7):
            calls.append(asyncio.create_task(ask(pool, deadline=100.0)))
            await seconds(0.6)
        answers = [index for index, _ in await asyncio.gather(*calls)]
        pool.stop()
        return answers

    assert run(work()) == expected


def test_the_least_waited_for_is_the_one_with_the_shortest_line(world: World) -> None:
    world.answer = lambda index, order: 10.0

    async def work() -> list[int]:
        pool = pool_of(world, 2, by_ticket=False)
        await pool.ready()
        calls = [asyncio.create_task(ask(pool, number, deadline=11.0)) for number in range(6)]
        answers = [index for index, _ in await asyncio.gather(*calls)]
        pool.stop()
        assert now() == pytest.approx(30.0)
        return answers

    assert sorted(run(work())) == [0, 0, 0, 1, 1, 1]


def test_a_deadline_begins_with_the_turn(world: World) -> None:
    """Four calls of 9 seconds in a row at one worker, each allowed 10."""
    world.answer = lambda index, order: 9.0

    async def work() -> None:
        pool = pool_of(world, 1)
        await pool.ready()
        answers = await asyncio.gather(*(ask(pool, deadline=10.0) for _ in range(4)))
        assert answers == [(0, 1)] * 4 and now() == pytest.approx(36)
        pool.stop()

    run(work())
    assert [at for at, _, _ in world.calls] == pytest.approx([0, 9, 18, 27])


LOSSES = [
    (lambda: died(), "generator-0 died during generate"),
    (lambda: FOREVER, "generator-0 did not answer within 30 s during generate"),
    (lambda: task_error(ContractError("column x: not finite")), "generator-0 gave garbage during generate: column x"),
]


@pytest.mark.parametrize(("what", "message"), LOSSES, ids=["death", "hang", "garbage"])
def test_a_lost_worker_is_killed_once_told_once_and_replaced(world: World, what: Any, message: str) -> None:
    world.answer = lambda index, order: what() if order == "bad" else 1.0
    log = Log()

    async def work() -> None:
        pool = pool_of(world, 2, log)
        await pool.ready()
        assert log.gauges == {"workers": {"generator": 2.0}, "workers_desired": {"generator": 2.0}}
        with pytest.raises(WorkerLost, match=message):
            await ask(pool, "bad")
        assert pool.serving == 1
        assert log.gauges == {"workers": {"generator": 1.0}, "workers_desired": {"generator": 2.0}}
        await seconds(1)
        assert pool.serving == 2 and [worker.index for worker in pool._serving] == [0, 1]
        assert {await ask(pool) for _ in range(4)} == {(0, 2), (1, 1)}
        pool.stop()

    run(work())
    assert world.killed[0] == (0, 1) and log.added["workers_lost_total"] == 1
    lost = [fields for _, name, fields in log.events if name == "worker_lost"]
    assert lost == [{"role": "generator", "worker": "generator-0", "reason": lost[0]["reason"]}]
    assert f"generator-0 {lost[0]['reason']}".startswith(message)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (task_error(KeyError("a bug")), RayTaskError, "a bug|traceback"),
        (task_error(LearnerLost("of Keel itself")), LearnerLost, "of Keel itself"),
        (object_lost(), WorkerLost, "the input of generator-0 for generate was lost"),
    ],
)
def test_what_is_no_fault_of_the_worker_loses_none(
    world: World, error: Exception, raised: type[Exception], message: str
) -> None:
    world.answer = lambda index, order: error

    async def work() -> None:
        pool = pool_of(world, 1)
        await pool.ready()
        with pytest.raises(raised, match=message):
            await ask(pool)
        assert pool.serving == 1 and world.killed == []
        pool.stop()

    run(work())


def test_calls_in_line_at_a_worker_that_is_lost_go_to_another(world: World) -> None:
    world.answer = lambda index, order: died() if order == "die" else 2.0

    async def work() -> list[tuple[int, int]]:
        pool = pool_of(world, 2)
        await pool.ready()
        dying = asyncio.create_task(ask(pool, "die"))  # worker 0
        calls = [asyncio.create_task(ask(pool, number)) for number in range(5)]  # 1, 0, 1, 0, 1
        with pytest.raises(WorkerLost, match="died"):
            await dying
        answers = await asyncio.gather(*calls)
        pool.stop()
        return answers

    answers = run(work())
    assert [index for index, _ in answers].count(1) >= 3 and (0, 1) not in answers
    assert sorted(order for _, _, order in world.calls if order != "die") == [0, 1, 2, 3, 4]  # each once


def test_a_call_that_is_cancelled_keeps_its_turn_until_the_actor_has_answered(world: World) -> None:
    """The actor fails where two calls reach it at once."""
    world.answer = lambda index, order: 10.0
    log = Log()

    async def work() -> None:
        pool = pool_of(world, 1, log)
        await pool.ready()
        first = asyncio.create_task(ask(pool, "cancelled"))
        in_line = asyncio.create_task(ask(pool, "never"))
        await seconds(4)
        assert log.utilization[-1] == (1, 1, 1)
        first.cancel()
        in_line.cancel()
        await asyncio.gather(first, in_line, return_exceptions=True)
        assert log.utilization[-1] == (1, 0, 1)
        assert await ask(pool, "next") == (0, 1)
        assert now() == pytest.approx(20.0)
        await seconds(0.1)
        assert log.utilization[-1] == (0, 0, 1) and pool._serving[0].waiting == 0
        pool.stop()

    run(work())
    assert [order for _, _, order in world.calls] == ["cancelled", "next"]


def test_calls_wait_while_nobody_serves(world: World) -> None:
    world.start = lambda index, attempt: 25.0 if attempt > 1 else 0.0
    world.answer = lambda index, order: died() if order == "die" else 0.0
    log = Log()

    async def work() -> None:
        pool = pool_of(world, 1, log)
        await pool.ready()
        with pytest.raises(WorkerLost, match="died"):
            await ask(pool, "die")
        waiting = asyncio.create_task(ask(pool))
        await seconds(1)
        assert log.utilization[-1] == (0, 1, 0)
        assert await waiting == (0, 2) and now() == pytest.approx(25.25)
        pool.stop()

    run(work())


def test_a_pool_that_was_not_started_says_so(world: World) -> None:
    with pytest.raises(AssertionError, match="pool of generator was not started"):
        run(ask(pool_of(world, 1)))


# ---- loads


def test_everyone_who_serves_loads_and_proves_it(world: World) -> None:
    async def work() -> Sequence[LoadReceipt]:
        pool = pool_of(world, 3)
        await pool.ready()
        receipts = await pool.load_weights(7)
        pool.stop()
        return receipts

    assert [(item.version, item.digest) for item in run(work())] == [(7, f"digest {index}") for index in range(3)]


@pytest.mark.parametrize(
    "what",
    [lambda: died(), lambda: FOREVER, lambda: task_error(ValueError("wrong digest"))],
    ids=["death", "hang", "own"],
)
def test_a_worker_that_fails_a_load_is_replaced_and_has_no_receipt(world: World, what: Any) -> None:
    log, failed = Log(), []

    def load(index: int, weights: Any) -> Any:
        if weights == 7 and index == 1 and not failed:
            failed.append(index)
            return what()
        return 0.0

    world.load = load

    async def work() -> None:
        pool = pool_of(world, 2, log)
        await pool.ready()
        receipts = await pool.load_weights(7)
        assert [item.digest for item in receipts] == ["digest 0"] and pool.serving == 1
        await seconds(1)
        assert pool.serving == 2 and [item.version for item in await pool.load_weights(8)] == [8, 8]
        pool.stop()

    run(work())
    assert (log.added["load_failures_total"], log.added["workers_lost_total"]) == (1, 1)
    assert [weights for _, index, weights in world.loads if index == 1] == [7, 7, 8]


def test_weights_that_are_lost_are_the_learners_loss(world: World) -> None:
    world.load = lambda index, weights: object_lost() if weights == 7 else 0.0

    async def work() -> None:
        pool = pool_of(world, 1)
        await pool.ready()
        with pytest.raises(LearnerLost, match="the weights were lost with their node"):
            await pool.load_weights(7)
        assert pool.serving == 1
        pool.stop()

    run(work())


def test_a_busy_worker_has_its_call_to_finish_before_a_load(world: World) -> None:
    """A load may take load_seconds, and where a call is under way that call's time beside it; not longer."""
    world.load = lambda index, weights: 45.0 if weights == 7 else 0.0
    world.answer = lambda index, order: 20.0

    async def work(busy: bool) -> int:
        pool = pool_of(world, 1, restarts=0)
        await pool.ready()
        call = asyncio.create_task(ask(pool)) if busy else None
        await seconds(1)
        loading = asyncio.create_task(pool.load_weights(7))
        await seconds(49)
        lost = len(world.killed)
        loading.cancel()
        if call:
            await call
        pool.stop()
        return lost

    assert run(work(busy=True)) == 0
    assert run(work(busy=False)) > 0


def test_a_worker_that_comes_up_holds_the_newest_weights_before_it_serves(world: World) -> None:
    """It loads again when there are newer ones by the time it has loaded."""
    world.load = lambda index, weights: 5.0 if index == 1 else 0.0
    world.start = lambda index, attempt: 3.0 if index == 1 else 0.0

    async def work() -> None:
        pool = pool_of(world, 2)
        await pool.first()
        await pool.load_weights(1)
        pool.resize(2)
        await seconds(4)  # worker 1 is loading version 1
        await pool.load_weights(2)
        await seconds(5)
        assert pool.serving == 1
        await seconds(5)
        assert pool.serving == 2 and [worker.receipt.version for worker in pool._serving] == [2, 2]  # type: ignore[union-attr]
        pool.forget_load()
        assert pool._loaded is None
        pool.stop()

    run(work())
    assert [weights for _, index, weights in world.loads if index == 1] == [1, 2]


# ---- growing, shrinking, ending


def test_a_pool_shrinks_from_its_end_and_those_who_work_finish_first(world: World) -> None:
    world.answer = lambda index, order: 10.0

    async def work() -> None:
        pool = pool_of(world, 3)
        await pool.ready()
        calls = [asyncio.create_task(ask(pool, number)) for number in range(3)]
        await seconds(1)
        pool.resize(1)
        assert pool.serving == 1 and world.killed == []
        assert sorted(await asyncio.gather(*calls)) == [(0, 1), (1, 1), (2, 1)]
        await seconds(0.1)
        assert sorted(world.killed) == [(1, 1), (2, 1)] and world.released == 2
        assert await ask(pool) == (0, 1)
        pool.stop()

    run(work())


def test_a_worker_that_is_spare_by_the_time_it_is_lost_is_not_replaced(world: World) -> None:
    world.answer = lambda index, order: died() if index == 1 else 1.0

    async def work() -> None:
        pool = pool_of(world, 2)
        await pool.ready()
        calls = [asyncio.create_task(ask(pool)) for _ in range(2)]
        await seconds(0.1)
        pool.resize(1)
        result = await asyncio.gather(*calls, return_exceptions=True)
        assert result[0] == (0, 1) and isinstance(result[1], WorkerLost)
        await seconds(100)
        assert pool.serving == 1 and len(world.starts[1]) == 1
        pool.stop()

    run(work())


def test_spare_ones_that_come_up_are_ended_and_holes_are_filled(world: World) -> None:
    world.start = lambda index, attempt: 10.0 if index else 0.0

    async def work() -> None:
        pool = pool_of(world, 1)
        await pool.ready()
        pool.resize(4)
        await seconds(5)
        pool.resize(2)
        await seconds(20)
        assert [worker.index for worker in pool._serving] == [0, 1] and sorted(world.killed) == [(2, 1), (3, 1)]
        pool.resize(3)
        await seconds(20)
        assert [worker.index for worker in pool._serving] == [0, 1, 2] and len(world.starts[2]) == 2
        with pytest.raises(AssertionError, match="0"):
            pool.resize(0)
        pool.stop()

    run(work())


def test_a_stopped_pool_leaves_nobody(world: World) -> None:
    """Serving, coming up and retiring workers are all ended; open calls raise that they are lost."""
    world.start = lambda index, attempt: FOREVER if index == 3 else 0.0
    world.answer = lambda index, order: 10.0

    async def work() -> None:
        pool = pool_of(world, 3, patience_seconds=0.1)
        await pool.ready()
        calls = [asyncio.create_task(ask(pool, number)) for number in range(3)]
        await seconds(1)
        pool.resize(2)  # worker 2 retires after its call
        pool.resize(4)
        await seconds(1)
        pool.stop()
        assert pool.serving == 0
        await asyncio.gather(*calls, return_exceptions=True)
        await seconds(100)
        assert pool.serving == 0

    run(work())
    placed = {(index, attempt + 1) for index, times in world.starts.items() for attempt in range(len(times))}
    assert set(world.killed) == placed and len(placed) >= 4


def test_when_one_comes_up_again_those_that_gave_up_are_tried_again(world: World) -> None:
    """Both failed while no worker served; worker 0 had more attempts left, and worker 1 has not been forgotten."""
    world.answer = lambda index, order: died()
    world.start = lambda index, attempt: died() if (index, attempt) in {(0, 2), (1, 2), (1, 3)} else 0.0
    world.placement = lambda index, attempt: 3.0 if index == 0 and attempt == 3 else 0.0

    async def work() -> None:
        pool = pool_of(world, 2, restarts=1)
        await pool.ready()
        for _ in range(2):
            with pytest.raises(WorkerLost, match="died"):
                await ask(pool)
        await seconds(30)
        assert pool.serving == 2
        pool.stop()

    run(work())
    assert len(world.starts[1]) == 4
