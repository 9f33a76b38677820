"""Learner ranks as Ray actors that move together: every call goes to all, rank 0 answers."""

import asyncio
import random
import socket
from collections.abc import Mapping
from typing import Any

import ray

from keel.actor_settings import LearnerSettings
from keel.learn import DeepSpeedLearner
from keel.protocols import Batch, LoadReceipt, StepReport
from keel.settings import Settings


class Gang:
    """Ranks of one class. `arguments` come before rank, ranks, address and port in its constructor."""

    def __init__(self, actor_class: type, learners: LearnerSettings, *arguments: Any) -> None:
        remote = ray.remote(num_cpus=learners.threads, num_gpus=learners.gpus)(actor_class)
        address, port = _meeting_point()
        count = learners.count
        self.ranks = [remote.remote(*arguments, rank, count, address, port) for rank in range(count)]

    async def ready(self) -> None:
        await self._all([rank.__ray_ready__.remote() for rank in self.ranks])

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method on every rank; rank 0's answer."""
        return (await self._all([getattr(rank, method).remote(*arguments) for rank in self.ranks]))[0]

    def stop(self) -> None:
        """End all ranks: what comes next needs their memory."""
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)

    async def _all(self, references: list[Any]) -> list[Any]:
        """Answers of all ranks; the first error ends the wait, the others would wait for the lost rank."""
        return list(await asyncio.gather(*references))


class LearnerGang(Gang):
    """A Learner made of ranks."""

    def __init__(self, settings: Settings, folder: str, others: Mapping[str, str] | None = None) -> None:
        """`others`: folders of models beside the policy in the learner: reference, teacher, critic."""
        super().__init__(DeepSpeedLearner, settings.learners, settings, folder, dict(others or {}))

    async def step(self, batch: Batch) -> StepReport:
        return await self.call("step", batch)

    async def publish(self) -> tuple[Any, LoadReceipt]:
        answers = [rank.publish.options(num_returns=2).remote() for rank in self.ranks]
        receipts = await self._all([receipt for _, receipt in answers])
        return answers[0][0], receipts[0]

    async def compare(self, batch: Batch) -> Mapping[str, float]:
        return await self.call("compare", batch)

    async def save(self, directory: str) -> None:
        await self.call("save", directory)

    async def load(self, directory: str) -> int:
        return await self.call("load", directory)

    async def export(self, folder: str) -> None:
        await self.call("export", folder)

    async def state(self) -> Mapping[str, Any]:
        return await self.ranks[0].state.remote()

    async def renew_reference(self, folder: str) -> None:
        await self.call("renew_reference", folder)


def _meeting_point() -> tuple[str, int]:
    """Address and a free port where the ranks find each other.

    Below the range the kernel hands out by itself and above Ray's: nobody takes it before rank 0 has it.
    """
    address = ray.util.get_node_ip_address()
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex((address, port)):  # nobody answers there
                return address, port
    raise OSError(f"no free port between 20000 and 32000 on {address}")
