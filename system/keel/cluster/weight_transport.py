"""The weights of a version on their way from the learner to the generators, through Ray's object store.

DeepSpeedLearner.publish -> LearnerGroup.publish -> ObjectStoreTransport -> GeneratorPool.load_weights ->
    VllmGenerator.load_weights
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from keel.protocols import Generator, Learner, LoadReceipt

Publish = Coroutine[Any, Any, LoadReceipt]
Load = Coroutine[Any, Any, Sequence[LoadReceipt]]


class ObjectStoreTransport:
    """A WeightTransport: generators read the buffer that learner rank 0 put into the object store."""

    def begin(self, learner: Learner, generators: Generator) -> tuple[Publish, Load]:
        handle: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def publish() -> LoadReceipt:
            weights, receipt = await learner.publish()
            handle.set_result(weights)
            return receipt

        async def load() -> Sequence[LoadReceipt]:
            return await generators.load_weights(await handle)

        return publish(), load()
