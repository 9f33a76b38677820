"""One actor of a pool: its placement group, its turn, the weights it proved, and its end."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from keel.cluster.capacity import bundles
from keel.cluster.placement import Placement, PlacementWait
from keel.config.workers import DeadlineSettings, WorkerSettings
from keel.errors import KeelError
from keel.protocols import LoadReceipt, Observer


def remote_method(handle: ActorHandle, method: Callable[..., object]) -> Any:
    """The remote counterpart of a method of the actor's class: `.remote(...)` calls it in the actor's process.

    Ray adds these to an untyped handle at run time, so this look-up by name cannot be checked; callers pass the method
    itself, which type checkers and editors follow. `load_weights`, which three classes have, is asked for by name.
    """
    return getattr(handle, method.__name__)


class NoWorkers(KeelError, RuntimeError):
    """No worker of this role is serving and all replacements failed to start."""


@dataclass(frozen=True)
class Spawn:
    """How the pool creates a worker of one role."""

    actor_class: type
    workers: WorkerSettings
    arguments: Callable[[int], tuple[Any, ...]]
    """Arguments of the constructor, by the worker's index."""

    def placement(self) -> Placement:
        """Request the placement group of one worker: all of an engine's GPUs on one node."""
        return Placement(bundles(self.workers), "STRICT_PACK")


@dataclass(eq=False)
class Worker:
    """Requests its placement group when it is made and starts its actor there. `kill` releases both."""

    index: int
    name: str
    spawn: Spawn
    receipt: LoadReceipt | None = None
    slot: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One call at a time, so that a deadline begins when the worker does."""
    waiting: int = 0
    _actor: ActorHandle | None = None

    def __post_init__(self) -> None:
        self.placement = self.spawn.placement()

    @property
    def handle(self) -> ActorHandle:
        assert self._actor is not None, f"{self.name} has no placement group yet"
        return self._actor

    async def start(self, serving: Callable[[], int], seconds: float, observer: Observer) -> None:
        """Wait for the placement group, then start the actor.

        Waits for ever while other workers serve, else at most `seconds`. Raises NoWorkers.
        """
        with PlacementWait(self.placement, self.name, observer) as wait:
            alone_since = time.monotonic()
            while not await wait.granted(1.0):
                if serving():
                    alone_since = time.monotonic()
                if time.monotonic() - alone_since >= seconds:
                    asked = f"waited {wait.seconds:.0f} s for resources ({self.placement.asked()})"
                    raise NoWorkers(f"{self.name} {asked} and no other worker serves; {self.placement.free()}")
        actor = self.placement.place(self.spawn.actor_class, 0, with_children=self.placement.ranks > 1)
        self._actor = actor.remote(*self.spawn.arguments(self.index))

    def release_slot(self) -> None:
        self.waiting -= 1
        self.slot.release()

    async def load_weights(self, weights: Any, deadlines: DeadlineSettings) -> None:
        """Load weights in the actor and keep its receipt. Raises TimeoutError, and what Ray raises."""
        # a busy worker loads after its call
        seconds = deadlines.load_seconds + deadlines.generate_seconds * self.slot.locked()
        async with asyncio.timeout(seconds):
            self.receipt = await self.handle.load_weights.remote(weights)

    def kill(self) -> None:
        with contextlib.suppress(ValueError):  # Ray was shut down
            if self._actor is not None:
                ray.kill(self._actor, no_restart=True)
        self.placement.release()
