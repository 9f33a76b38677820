"""Sampling and scoring without training: prompts through generators and scorers, for labels and evaluations."""

import asyncio
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from keel import schema
from keel.cluster import actors
from keel.config.run import Settings
from keel.config.stages import SamplingSpec, ScoringSpec
from keel.observability.console import Display
from keel.online.retries import retrying
from keel.protocols import Batch, GenerateRequest, Sampling


class Samplers:
    """The configured generators on one model folder."""

    def __init__(self, settings: Settings | SamplingSpec, folder: str, rows_per_batch: int) -> None:
        self.settings, self.rows_per_batch = settings, rows_per_batch
        self._generators = actors.generators(settings, folder)

    async def answer(self, prompts: pa.RecordBatch, sampling: Sampling, display: Display, what: str) -> pa.RecordBatch:
        """Sample a completion for every row; returns the rows in their order, with the generate columns appended."""
        retries = self.settings.failures.retries

        async def one(rows: pa.RecordBatch) -> pa.RecordBatch:
            handle, _ = await retrying(lambda: self._generators.generate(GenerateRequest(rows, (sampling,))), retries)
            return await actors.fetch(handle)

        display.doing(what)
        await self._generators.ready()
        return await in_parts(prompts, one, self.rows_per_batch, self.settings.generators.count, display, what)

    def stop(self) -> None:
        self._generators.stop()


async def score(
    settings: Settings | ScoringSpec, reference_folder: str | None, batch: pa.RecordBatch, display: Display
) -> pa.RecordBatch:
    """Append reference log-probs (where there is a reference) and rewards to the rows, then stop the scorers."""
    pools = actors.scorers(settings, reference_folder, batch)
    await asyncio.gather(*(pool.ready() for pool in pools))

    async def one(rows: Batch) -> pa.RecordBatch:
        for pool in pools:
            rows, _ = await retrying(functools.partial(pool.score, rows), settings.failures.retries)
        return await actors.fetch(rows)

    display.doing("scoring")
    scored = await in_parts(batch, one, 128, settings.scorers.count, display, "scored")
    for pool in pools:
        pool.stop()
    return scored


async def in_parts(
    batch: pa.RecordBatch, one: Any, size: int, workers: int, display: Display, what: str
) -> pa.RecordBatch:
    """Apply `one` to slices of the batch, one slice a worker at a time; returns the results in order.

    A slice has about `size` rows and never splits a ticket: a scorer may compare the samples of one prompt.
    """
    parts: list[pa.RecordBatch] = []
    tickets = batch.column("ticket").to_numpy()
    ends = [*(np.flatnonzero(np.diff(tickets)) + 1).tolist(), batch.num_rows]
    borders = [0]
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - borders[-1] > size:
            borders.append(end)
    slices = [schema.concat([batch.slice(start, stop - start)]) for start, stop in itertools.pairwise(borders)]
    for start in range(0, len(slices), workers):
        parts += await asyncio.gather(*(one(rows) for rows in slices[start : start + workers]))
        done = sum(part.num_rows for part in parts)
        if done < batch.num_rows:
            display.note(f"{what}: {done} of {batch.num_rows} completions")
    return schema.concat(_same_metadata(parts))


def _same_metadata(parts: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
    return [part.replace_schema_metadata(parts[0].schema.metadata) for part in parts]
