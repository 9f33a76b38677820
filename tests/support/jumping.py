"""The real controller, buffer and pools with actors that only sleep, on an event loop whose clock jumps."""

import asyncio
import contextlib
import random
import selectors
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

import rollouts
from fakes import SAMPLING, settings_for
from keel.analysis.simulation import Durations, Shape, Timeline
from keel.cluster.actors import GeneratorPool, ScorerPool
from keel.cluster.weight_transport import ObjectStoreTransport
from keel.observability.utilization import Utilization
from keel.online.controller import Controller
from keel.protocols import Components, GenerateRequest, LoadReceipt, Observer, StageReceipt, StepReport
from keel.rollout.buffer import RolloutBuffer

HELD_OUT = 1_000_000
"""The ticket of the held-out prompts."""


class Jumping(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everyone waits for someone else"
        self.now += max(timeout, 0.0)
        return []


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jumping = Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


def run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(work)


def now() -> float:
    return asyncio.get_running_loop().time()


class Drawn:
    """Seconds drawn by what is done: `means` by role and by what the driver does, spread over a factor of three."""

    def __init__(self, means: dict[str, float], seed: int = 0, spread: bool = True) -> None:
        self.means, self.seed, self.spread = means, seed, spread

    def _draw(self, what: str, *key: int) -> float:
        factor = random.Random(f"{self.seed} {what} {key}").uniform(0.5, 1.5) if self.spread else 1.0
        return self.means.get(what, 0.0) * factor

    def stage(self, role: str, tickets: Sequence[int]) -> float:
        return self._draw(role, *(tickets or [HELD_OUT]))

    def step(self, version: int) -> float:
        return self._draw("learner", version)

    def load(self, version: int, worker: int) -> float:
        return self._draw("load", version, worker)

    def driver(self, what: str) -> float:
        return self.means.get(what, 0.0)


class Method:
    """`actor.method.options(num_returns=2).remote(...)`, and `actor.method.remote(...)`."""

    def __init__(self, call: Any, pair: bool = False) -> None:
        self._call, self._pair = call, pair

    def options(self, num_returns: int) -> "Method":
        return Method(self._call, pair=True)

    def remote(self, *arguments: Any) -> Any:
        task = asyncio.ensure_future(self._call(*arguments))
        return (task, self._receipt(task)) if self._pair else task

    async def _receipt(self, task: "asyncio.Task[Any]") -> Any:
        return (await task)[1]


class Actor:
    """Does one thing at a time, in the order of being asked."""

    def __init__(self, role: str, index: int, durations: Durations) -> None:
        self.role, self.index, self.durations = role, index, durations
        self.version = 0
        self._turn = asyncio.Lock()
        self.__ray_ready__ = Method(self._ready)
        self.generate, self.score, self.load_weights = Method(self._generate), Method(self._score), Method(self._load)

    async def _ready(self) -> None: ...

    async def _generate(self, request: GenerateRequest) -> Any:
        prompts = request.prompts
        async with self._turn:
            version = self.version
            await self._sleep(prompts)
        return rollouts.generated(prompts, version), StageReceipt(prompts.num_rows, 10, 0.5, self.role)

    async def _score(self, handle: Any) -> Any:
        batch, _ = await handle
        async with self._turn:
            await self._sleep(batch)
        scored = (
            rollouts.referenced(batch) if self.role == "reference" else rollouts.scored(batch, [0.5] * batch.num_rows)
        )
        return scored, StageReceipt(batch.num_rows, 0, 0.25, self.role)

    async def _load(self, version: int) -> LoadReceipt:
        async with self._turn:
            await asyncio.sleep(self.durations.load(version, self.index) if version else 0.0)
            self.version = version
        return LoadReceipt(version, str(version), 1, 0.0)

    async def _sleep(self, batch: pa.RecordBatch) -> None:
        tickets = sorted(set(batch.column("ticket").to_pylist()))
        await asyncio.sleep(self.durations.stage(self.role, [] if HELD_OUT in tickets else tickets))


class Space:
    """A placement that is granted at once, for actors that are made here."""

    ranks = 1

    async def granted(self, seconds: float | None = None) -> bool:
        return True

    def place(self, actor_class: type, bundle: int, *, with_children: bool = False) -> Any:
        assert actor_class is Actor and bundle == 0 and not with_children
        return SimpleNamespace(remote=actor_class)

    def release(self) -> None: ...


class Spawned:
    """What pool.py asks of a Spawn."""

    actor_class = Actor

    def __init__(self, role: str, durations: Durations) -> None:
        self.arguments = lambda index: (role, index, durations)

    def placement(self) -> Space:
        return Space()


class Watched(RolloutBuffer):
    """The real buffer; what it costs the driver, and when it admitted and accepted."""

    line: Timeline
    durations: Durations

    async def admit(self) -> list[int]:
        tickets = await super().admit()
        self.line.admitted.append((now(), tuple(tickets)))
        return tickets

    async def add(self, tickets: list[int], batch: Any) -> Any:
        await asyncio.sleep(self.durations.driver("add"))
        receipt = await super().add(tickets, (await batch)[0])
        self.line.accepted.append((now(), tuple(tickets)))
        return receipt

    async def take(self, groups: int) -> Any:
        taken = await super().take(groups)
        await asyncio.sleep(self.durations.driver("take"))
        return taken

    async def advance(self, version: int) -> None:
        await asyncio.sleep(self.durations.driver("advance"))
        await super().advance(version)


class Learner:
    def __init__(self, line: Timeline, durations: Durations) -> None:
        self.line, self.durations, self.version = line, durations, 0

    async def step(self, batch: pa.RecordBatch) -> StepReport:
        made_by = dict(
            zip(batch.column("ticket").to_pylist(), batch.column("weight_versions").to_pylist(), strict=True)
        )
        self.line.staleness.append(Counter(self.version - versions[0] for versions in made_by.values()))
        self.version += 1
        await asyncio.sleep(self.durations.step(self.version))
        return StepReport(self.version, {"trained_tokens": 1.0, "step_seconds": 1.0})

    async def publish(self) -> Any:
        await asyncio.sleep(self.durations.driver("publish"))
        return self.version, LoadReceipt(self.version, str(self.version), 1, 0.0)


class Listener(Observer):
    def __init__(self, line: Timeline, durations: Durations) -> None:
        self.line, self.durations = line, durations
        self.utilization = Utilization(now)

    def set(self, values: dict[str, Any]) -> None:
        if "wait_seconds" in values:
            self.line.waited.append(values["wait_seconds"])

    def doing(self, what: str) -> None:
        self.utilization.doing(what.replace(" ", "_"))

    def occupied(self, role: str, running: int, waiting: int, serving: int) -> None:
        self.utilization.occupied(role, running, waiting, serving)

    def step(self, step: int) -> None:
        self.line.recorded.append(now())
        self.line.counted.append(self.utilization.drain())


class Checkpoints:
    def __init__(self, durations: Durations) -> None:
        self.durations = durations

    async def save(self, step: int, *, finished: bool) -> None:
        await asyncio.sleep(self.durations.driver("checkpoint"))

    async def renew_reference(self, step: int) -> None: ...


def real(directory: Path, shape: Shape, durations: Durations) -> Timeline:
    """What the real controller, buffer and pools do with this shape and these durations."""
    return run(_real(directory, shape, durations))


async def _real(directory: Path, shape: Shape, durations: Durations) -> Timeline:
    line = Timeline([], [], [], [], [], [])
    settings = settings_for(
        steps=shape.steps,
        staleness=shape.max_staleness,
        buffer={"groups_per_step": shape.groups_per_step, "groups_per_batch": shape.groups_per_batch},
        evaluation={"every_steps": shape.evaluate_every},
        checkpoint={"every_steps": shape.checkpoint_every},
        deadlines={f"{name}_seconds": 1e6 for name in ("start", "generate", "score", "step", "load")},
    )
    listener = Listener(line, durations)

    def pool(role: str) -> Any:
        return (GeneratorPool if role == "generator" else ScorerPool)(
            role,
            Spawned(role, durations),  # type: ignore[arg-type]
            shape.workers[role],
            settings.deadlines,
            restarts=0,
            patience_seconds=1.0,
            by_ticket=shape.max_staleness == 0,
            observer=listener,
        )

    pools = {role: pool(role) for role in shape.workers}
    for item in pools.values():
        item._loaded = 0
        await item.ready()
    listener.utilization.ranks(shape.ranks)
    buffer = Watched(
        directory,
        groups_per_step=shape.groups_per_step,
        groups_per_batch=shape.groups_per_batch,
        max_staleness=shape.max_staleness,
    )
    buffer.line, buffer.durations = line, durations

    async def fetch(batch: Any) -> pa.RecordBatch:
        return (await batch)[0]

    components = Components(
        generators=pools.pop("generator"),
        scorers=[pools[role] for role in ("reference", "scorer") if role in pools],
        buffer=buffer,
        learner=Learner(line, durations),  # type: ignore[arg-type]
        transport=ObjectStoreTransport(),
        checkpoints=Checkpoints(durations),
        prompts=lambda tickets: rollouts.prompts(tickets),
        held_out=rollouts.prompts([HELD_OUT]),
        fetch=fetch,
    )
    with contextlib.suppress(asyncio.CancelledError):
        await Controller(settings, components, SAMPLING, listener, 0).run()
    return line
