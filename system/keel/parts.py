"""What a run is made of, as its controller sees it, and whom the controller tells.

Nothing of Ray, torch or vLLM: in a unit test the parts are in-process fakes.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from keel.protocols import Batch, Buffer, Generator, Learner, Scorer


@dataclass(frozen=True)
class Parts:
    """What a run is made of. One or many of a kind: the controller cannot tell."""

    generators: Generator
    scorers: Sequence[Scorer]
    buffer: Buffer
    learner: Learner
    prompts: Callable[[list[int]], pa.RecordBatch]
    """Prompt rows of tickets."""
    held_out: pa.RecordBatch
    fetch: Callable[[Batch], Awaitable[pa.RecordBatch]]
    """Bring a batch here: only for evaluations and the start-up test, which are small."""


class Observer:
    """What the controller tells the outside. The default hears nothing."""

    def set(self, values: dict[str, Any]) -> None: ...

    def add(self, values: dict[str, Any]) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, step: int) -> None: ...

    def occupied(self, role: str, running: int, waiting: int, serving: int) -> None:
        """So many workers of a role work, so many batches wait for one, so many workers serve."""

    def tick(self) -> None:
        """A second went by: what is counted while it passes may be written down."""

    def waiting_for_room(self, who: str, asked: str, free: str) -> None:
        """A worker or the learner has been waiting: what for, and what is free. Again and again while it lasts."""

    def waited_for_room(self, who: str, seconds: float, *, found: bool) -> None:
        """It does not wait any more: it has its room, or is not wanted now."""

    async def evaluated(self, step: int, batch: pa.RecordBatch) -> None: ...

    async def checkpoint(self, step: int) -> None: ...

    async def quarantine(self, step: int, batch: Batch, reason: str) -> None:
        """Keep the rows of a step that the learner refused."""

    async def iteration(self, step: int) -> None:
        """The policy of now becomes the reference."""
