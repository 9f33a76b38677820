"""In-process components of a run that check what they are given. The buffer in between is the real one.

Every call gives way to the other tasks before it does anything, as a call to an actor does, and those for which
others must wait (publish, load, renew, save) give way long enough for whatever need not wait to overtake them.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

import rollouts
from keel import schema
from keel.cluster.weight_transport import ObjectStoreTransport
from keel.config import loader
from keel.config.run import Settings
from keel.online.controller import Controller
from keel.protocols import Components, GenerateRequest, LoadReceipt, Observer, Sampling, StageReceipt, StepReport
from keel.rollout.buffer import RolloutBuffer

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=5, stop_token_ids=(1,))
HELD_OUT = 3
DIGESTS = ["zero", "one", "two", "three", "four", "five", "six"]
Hook = Callable[[list[int], int], Any]


async def a_turn() -> None:
    """Give every task that can run one turn."""
    await asyncio.sleep(0)


async def many_turns() -> None:
    """Give every task that can run turns until it waits for this one."""
    for _ in range(60):
        await asyncio.sleep(0)


def settings_for(steps: int = 4, staleness: int = 0, retries: int = 2, **blocks: Any) -> Settings:
    """Two groups of two samples a step, in batches of one ticket; deadlines that no call reaches."""
    deadlines = ("start", "generate", "score", "step", "load")
    tree: dict[str, Any] = {
        "run": {"name": "test", "steps": steps},
        "policy": {"model": "tiny"},
        "prompts": {"source": "prompts.jsonl"},
        "sampling": {"samples_per_prompt": 2},
        "rewards": [{"name": "length", "source": "tests:length"}],
        "failures": {"retries": retries},
        "buffer": {"groups_per_step": 2, "groups_per_batch": 1, "max_staleness": staleness},
        "deadlines": {f"{name}_seconds": 20 for name in deadlines},
    }
    for name, block in blocks.items():
        tree[name] = {**tree.get(name, {}), **block} if isinstance(block, dict) else block
    return loader.parse(tree)


class FakeGenerator:
    """Completes prompt rows with its version. `hook(tickets, attempt)` may raise, or return something to await."""

    def __init__(self, log: list[Any], hook: Hook | None = None) -> None:
        self.log, self.hook = log, hook
        self.version = 0
        self.attempts: dict[tuple[int, ...], int] = {}
        self.seeds: dict[tuple[int, ...], list[int]] = {}
        self.busy = 0

    async def generate(self, request: GenerateRequest) -> tuple[pa.RecordBatch, StageReceipt]:
        prompts = request.prompts
        version = self.version  # of now: a generator that is loaded meanwhile answers with the weights it started with
        await a_turn()
        assert prompts.schema.equals(schema.PROMPT), prompts.schema
        assert request.turns == (SAMPLING,)
        tickets = tuple(dict.fromkeys(prompts.column("ticket").to_pylist()))
        held_out = prompts.num_rows == HELD_OUT
        self.attempts[tickets] = attempt = self.attempts.get(tickets, 0) + 1
        seeds = prompts.column("seed").to_pylist()
        assert self.seeds.setdefault(tickets, seeds) == seeds  # a retry asks for the same rows
        if self.hook and not held_out:
            self.busy += 1
            try:
                if (waiting := self.hook(list(tickets), attempt)) is not None:
                    await waiting
            finally:
                self.busy -= 1
        self.log.append(("evaluated" if held_out else "generated", *([] if held_out else tickets), version))
        return rollouts.generated(prompts, version), StageReceipt(prompts.num_rows, 10, 0.5, "generator")

    async def load_weights(self, weights: Any) -> Sequence[LoadReceipt]:
        version, digest = weights
        assert version == self.version + 1 or version == self.version == 0
        await many_turns()
        self.version = version
        self.log.append(("loaded", version))
        return [LoadReceipt(version, digest, 100, 0.1)] * 2


class FakeScorer:
    """Appends a reference and rewards; samples named by `failed` (a predicate of the ticket) get none."""

    def __init__(self, failed: Callable[[int], bool] = lambda ticket: False, hook: Hook | None = None) -> None:
        self.failed, self.hook = failed, hook
        self.calls = 0

    async def score(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, StageReceipt]:
        await a_turn()
        schema.check(batch)
        assert batch.schema.names == [*schema.PROMPT.names, *schema.GENERATE.names], batch.schema.names
        tickets = batch.column("ticket").to_pylist()
        self.calls += 1
        if self.hook and batch.num_rows != HELD_OUT and (waiting := self.hook(tickets, self.calls)) is not None:
            await waiting
        rewards = [None if self.failed(ticket) else 0.5 for ticket in tickets]
        failures = {"broken": rewards.count(None)} if None in rewards else {}
        scored = rollouts.scored(rollouts.referenced(batch), rewards)
        return scored, StageReceipt(batch.num_rows, 0, 0.25, "scorer", failures)


class FakeLearner:
    """Makes a version a step. `hook(tickets, version)` may raise, or return something to await."""

    def __init__(self, log: list[Any], hook: Hook | None = None, version: int = 0) -> None:
        self.log, self.hook, self.version = log, hook, version

    async def step(self, batch: pa.RecordBatch) -> StepReport:
        await many_turns()
        schema.check(batch)
        assert "reference_logprobs" in batch.schema.names
        tickets = list(dict.fromkeys(batch.column("ticket").to_pylist()))
        assert len(tickets) == 2, tickets
        if self.hook and (waiting := self.hook(tickets, self.version + 1)) is not None:
            await waiting
        self.version += 1
        self.log.append(("stepped", self.version, *tickets))
        made_by = [versions[0] for versions in batch.column("weight_versions").to_pylist()]
        stale = max(self.version - 1 - item for item in made_by)
        metrics = {
            "trained_tokens": 7.0,
            "step_seconds": 0.1,
            "loss": 0.5,
            "reward_component": {"length": 0.5},
            "reward_std": 0.0,
        }
        self.log.append(("staleness", stale))
        return StepReport(self.version, metrics)

    async def publish(self) -> tuple[Any, LoadReceipt]:
        await many_turns()
        digest = DIGESTS[self.version]
        return (self.version, digest), LoadReceipt(self.version, digest, 100, 0.1)

    async def compare(self, batch: pa.RecordBatch) -> dict[str, float]:
        await a_turn()
        return {"gap_mean_nats": 0.0, "gap_max_nats": 0.0}

    async def set_multipliers(self, kl: float, learning_rate: float) -> None:
        await a_turn()
        self.log.append(("multipliers", kl, learning_rate))

    async def save(self, directory: str) -> None:
        raise AssertionError("checkpoints are the observer's")

    async def restore_checkpoint(self, directory: str) -> int:
        raise AssertionError("nothing to resume here")


class Listener(Observer):
    """Keeps everything it is told."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.gauges: dict[str, Any] = {}
        self.totals: dict[Any, float] = {}
        self.events: list[dict[str, Any]] = []

    def set(self, values: dict[str, Any]) -> None:
        self.gauges |= values

    def add(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            labeled = {(name, key): item for key, item in value.items()} if isinstance(value, dict) else {name: value}
            for key, item in labeled.items():
                self.totals[key] = self.totals.get(key, 0.0) + item

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def step(self, step: int) -> None:
        self.log.append(("recorded", step))

    async def evaluated(self, step: int, batch: pa.RecordBatch) -> None:
        assert batch.num_rows == HELD_OUT
        await many_turns()
        self.log.append(("evaluation", step))

    async def quarantine(self, step: int, batch: pa.RecordBatch, reason: str, multipliers: Mapping[str, float]) -> None:
        await many_turns()
        self.log.append(("quarantined", step, *dict.fromkeys(batch.column("ticket").to_pylist())))


class FakeCheckpoints:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def renew_reference(self, step: int) -> None:
        await many_turns()
        self.log.append(("iteration", step))

    async def save(self, step: int, *, finished: bool) -> None:
        await many_turns()
        self.log.append(("checkpoint", step))


class Run:
    """A controller on fakes and a real buffer, and the log they all write into."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        generator: Hook | None = None,
        scorer: FakeScorer | None = None,
        learner: Hook | None = None,
        version: int = 0,
    ) -> None:
        self.log: list[Any] = []
        self.generator = FakeGenerator(self.log, generator)
        self.generator.version = version
        self.scorer = scorer or FakeScorer()
        self.observer = Listener(self.log)
        sizes = settings.buffer
        taken = version * sizes.groups_per_step
        self.buffer = RolloutBuffer(
            directory,
            groups_per_step=sizes.groups_per_step,
            groups_per_batch=settings.groups_per_batch,
            max_staleness=sizes.max_staleness,
            version=version,
            taken=taken,
            next_ticket=taken,
        )
        self.checkpoints = FakeCheckpoints(self.log)
        components = Components(
            generators=self.generator,
            scorers=[self.scorer],
            buffer=self.buffer,
            learner=FakeLearner(self.log, learner, version),
            transport=ObjectStoreTransport(),
            checkpoints=self.checkpoints,
            prompts=lambda tickets: rollouts.prompts(tickets),
            held_out=rollouts.prompts(range(HELD_OUT), samples=1),
            fetch=self._fetch,
        )
        self.controller = Controller(settings, components, SAMPLING, self.observer, version)

    async def _fetch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        await a_turn()
        return batch

    async def finish(self) -> None:
        """Run to the end; no test waits longer than this."""
        await asyncio.wait_for(self.controller.run(), 60)

    def entries(self, *kinds: str) -> list[Any]:
        return [entry for entry in self.log if entry[0] in kinds]
