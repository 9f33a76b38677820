"""One actor of a pool: its turn, the weights it proved, and its end."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from keel.actor_settings import DeadlineSettings
from keel.protocols import LoadReceipt


@dataclass(eq=False)
class Worker:
    index: int
    name: str
    handle: ActorHandle
    receipt: LoadReceipt | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One call at a time, so that a deadline begins when the worker does."""
    waiting: int = 0

    def end_turn(self) -> None:
        self.waiting -= 1
        self.turn.release()

    async def load(self, weights: Any, deadlines: DeadlineSettings) -> None:
        """Take over the weights and prove it. Raises TimeoutError, and what Ray raises."""
        # a worker that is busy loads after its call
        seconds = deadlines.load_seconds + deadlines.generate_seconds * self.turn.locked()
        async with asyncio.timeout(seconds):
            self.receipt = await self.handle.load.remote(weights)

    def kill(self) -> None:
        with contextlib.suppress(ValueError):  # Ray was shut down
            ray.kill(self.handle, no_restart=True)
