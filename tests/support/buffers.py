"""A rollout buffer in a folder, and what tests ask of it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from keel.rollout.buffer import RolloutBuffer
from rollouts import rollouts


def buffer_in(directory: Path, step: int = 4, batch: int = 2, staleness: int = 0, **state: int) -> RolloutBuffer:
    return RolloutBuffer(directory, groups_per_step=step, groups_per_batch=batch, max_staleness=staleness, **state)


async def soon(awaitable: Any) -> Any:
    """The result of something that must not have to wait for anybody."""
    return await asyncio.wait_for(awaitable, 5)


async def blocked(task: "asyncio.Task[Any]") -> bool:
    """Whether a task still waits after everything else had its turn."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not task.done()


async def admit_all(buffer: RolloutBuffer) -> list[list[int]]:
    """Every batch the bound allows now."""
    batches: list[list[int]] = []
    while True:
        task = asyncio.create_task(buffer.admit())
        if await blocked(task):
            task.cancel()
            return batches
        batches.append(task.result())


def tickets_of(batch: pa.RecordBatch) -> list[int]:
    return list(dict.fromkeys(batch.column("ticket").to_pylist()))


def uniform(tickets: Sequence[int]) -> pa.RecordBatch:
    """Rollouts whose samples all have the same reward."""
    batch = rollouts(tickets)
    index = batch.schema.get_field_index("reward")
    return batch.set_column(index, batch.schema.field(index), pa.array([0.5] * batch.num_rows, pa.float32()))
