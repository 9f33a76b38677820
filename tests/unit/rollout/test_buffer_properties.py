"""The buffer under any interleaving: batches finish in any order, some fail, and the bound still holds."""

import asyncio
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runs
from keel.analysis.audit import Audit, Progress, audit_rollouts
from keel.rollout import manifest, segments
from keel.rollout.buffer import RolloutBuffer
from rollouts import rollouts

MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
STEPS = 4
# fsync is slow on some disks and this is not a test of it
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass
class Story:
    """What happened in one simulated run."""

    batches: list[list[int]] = field(default_factory=list)
    """Tickets that shared a generator batch, in order of admission."""
    steps: list[list[int]] = field(default_factory=list)
    """Tickets of each step as taken."""
    staleness: list[int] = field(default_factory=list)
    """Versions every trained row was behind."""
    events: int = 0


@dataclass
class World:
    """Generators, learner and the buffer between them; the order of everything comes from `choices`."""

    buffer: RolloutBuffer
    choices: random.Random
    lost: frozenset[int]
    """Tickets whose samples all fail; a batch of only such tickets is dropped whole."""
    story: Story = field(default_factory=Story)
    in_flight: list[tuple[list[int], int]] = field(default_factory=list)
    """Tickets and the version of the generator that works on them."""
    generator_version: int = 0

    async def rollouts(self) -> None:
        while True:
            tickets = await self.buffer.admit()
            self.story.batches.append(tickets)
            self.in_flight.append((tickets, self.generator_version))

    async def learn(self) -> None:
        for version in range(1, STEPS + 1):
            batch, _ = await self.buffer.take(self.buffer.window.groups_per_step)
            self.story.steps.append(list(dict.fromkeys(batch.column("ticket").to_pylist())))
            made_by = [versions[0] for versions in batch.column("weight_versions").to_pylist()]
            self.story.staleness += [version - 1 - item for item in made_by]
            self.generator_version = version
            for _ in range(self.choices.randrange(3)):  # generators may finish while weights are loaded
                await asyncio.sleep(0)
            if version < STEPS:
                await self.buffer.advance(version)

    async def finish(self, tickets: list[int], version: int) -> None:
        if set(tickets) <= self.lost:
            await self.buffer.drop(tickets, "worker_lost")
            return
        failed = [(ticket, sample) for ticket in tickets if ticket in self.lost for sample in (0, 1)]
        await self.buffer.add(tickets, rollouts(tickets, version=version, failed=failed))

    async def run(self) -> Story:
        loops = [asyncio.create_task(self.rollouts()), asyncio.create_task(self.learn())]
        idle = 0
        while not loops[1].done():
            self.story.events += 1
            if self.in_flight and self.choices.random() < 0.6:
                await self.finish(*self.in_flight.pop(self.choices.randrange(len(self.in_flight))))
            idle = 0 if self.in_flight else idle + 1
            assert idle < 50, f"deadlock: nothing in flight after {self.story}"
            await asyncio.sleep(0)
        loops[0].cancel()
        await loops[1]
        return self.story


def simulate(step: int, batch: int, staleness: int, seed: int, lost: frozenset[int]) -> Story:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:

        async def run() -> Story:
            buffer = RolloutBuffer(directory, groups_per_step=step, groups_per_batch=batch, max_staleness=staleness)
            return await World(buffer, random.Random(seed), lost).run()

        return asyncio.run(run())


sizes = st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 2), (4, 3), (4, 4)])
lost_tickets = st.frozensets(st.integers(0, 30), max_size=10)


@MANY
@given(sizes=sizes, staleness=st.integers(0, 2), seed=st.integers(0, 10**9), lost=lost_tickets)
def test_bound_order_and_progress_hold_for_every_interleaving(
    sizes: tuple[int, int], staleness: int, seed: int, lost: frozenset[int]
) -> None:
    step, batch = sizes
    story = simulate(step, batch, staleness, seed, lost)
    assert min(story.staleness) >= 0 and max(story.staleness) <= staleness
    assert [len(tickets) for tickets in story.steps] == [step] * STEPS
    trained = [ticket for tickets in story.steps for ticket in tickets]
    admitted = [ticket for tickets in story.batches for ticket in tickets]
    assert admitted == list(range(len(admitted)))  # each once, in order
    assert trained == [ticket for ticket in admitted if ticket not in lost][: len(trained)]
    assert len(admitted) <= (STEPS + staleness) * step + len(lost)
    assert all(len(tickets) <= batch for tickets in story.batches)
    assert story.events < 1000


@MANY
@given(sizes=sizes, seeds=st.tuples(*[st.integers(0, 10**9)] * 2), lost=lost_tickets)
def test_without_staleness_batches_follow_from_the_drops_alone(
    sizes: tuple[int, int], seeds: tuple[int, int], lost: frozenset[int]
) -> None:
    """The same tickets share a generator batch, whichever batch was finished first."""
    first, second = (simulate(*sizes, staleness=0, seed=seed, lost=lost) for seed in seeds)
    assert first.batches == second.batches
    assert first.steps == second.steps


@MANY
@given(staleness=st.integers(1, 2), seed=st.integers(0, 10**9))
def test_rows_are_really_trained_late_when_that_is_allowed(staleness: int, seed: int) -> None:
    """The simulation is not vacuous: the first steps' tickets are all made by version 0."""
    story = simulate(2, 2, staleness, seed, frozenset())
    assert max(story.staleness) >= 1


# ---- crashes


@dataclass
class Lives(World):
    """A world that dies now and then and starts again on its files, from the state of its last checkpoint."""

    directory: Path = Path()
    options: dict[str, int] = field(default_factory=dict)
    """Sizes of the buffer."""
    drops: float = 0.0
    """Chance that a generator batch is given up, whatever is in it."""
    crashes: int = 0
    """Deaths still to come."""
    state: dict[str, int] = field(default_factory=dict)
    """What the last checkpoint holds."""
    contents: list[Any] = field(default_factory=list)
    """Rows of each step as taken."""

    async def learn(self) -> None:
        for version in range(self.generator_version + 1, STEPS + 1):
            batch, _ = await self.buffer.take(self.buffer.window.groups_per_step)
            self.contents.append(batch.to_pylist())
            self.generator_version = version
            for _ in range(self.choices.randrange(3)):
                await asyncio.sleep(0)
            if version < STEPS:
                await self.buffer.advance(version)
                if self.choices.random() < 0.4:
                    self.state = await self.buffer.state()
                    await self.buffer.forget(self.state["next_ticket"])

    async def finish(self, tickets: list[int], version: int) -> None:
        if set(tickets) <= self.lost or self.choices.random() < self.drops:
            await self.buffer.drop(tickets, "worker_lost")
        else:
            await self.buffer.add(tickets, runs.scored(tickets, version, self.lost))

    async def run(self) -> Story:
        while True:
            loops = [asyncio.create_task(self.rollouts()), asyncio.create_task(self.learn())]
            idle = 0
            while not loops[1].done() and not (self.crashes and self.choices.random() < 0.05):
                self.story.events += 1
                if self.in_flight and self.choices.random() < 0.6:
                    await self.finish(*self.in_flight.pop(self.choices.randrange(len(self.in_flight))))
                if self.choices.random() < 0.1:
                    await self.buffer.resize(self.choices.randint(1, self.buffer.window.groups_per_step))
                idle = 0 if self.in_flight else idle + 1
                assert idle < 50, f"deadlock: {await self.buffer.waiting()}"
                assert self.story.events < 2000
                await asyncio.sleep(0)
            for loop in loops:
                loop.cancel()
            if loops[1].done() and not loops[1].cancelled():
                await loops[1]
                return self.story
            await self.start_again()

    async def start_again(self) -> None:
        self.crashes -= 1
        damaged = [path for path in segments.paths(self.directory) if self.choices.random() < 0.3]
        for path in damaged:
            content = bytearray(path.read_bytes())
            if self.choices.random() < 0.5:
                content[self.choices.randrange(len(content))] ^= 1 << self.choices.randrange(8)
            else:
                del content[self.choices.randrange(len(content)) :]
            path.write_bytes(content)
        if manifest.path_of(self.directory).exists() and self.choices.random() < 0.3:
            with manifest.path_of(self.directory).open("a") as file:
                file.write('{"step": 9')
        self.generator_version = self.state.get("version", 0)
        del self.contents[self.generator_version :]
        for path in (self.directory / "rollouts").glob("step-*.arrow"):
            if int(path.stem.removeprefix("step-")) > self.generator_version:
                path.unlink()
        self.in_flight.clear()
        self.buffer = RolloutBuffer(self.directory, **self.options, **self.state)
        assert (await self.buffer.restored())["damaged"] == [path.name for path in damaged]


def live(
    step: int, batch: int, staleness: int, seed: int, lost: frozenset[int], crashes: int, drops: float
) -> tuple[list[Any], list[manifest.Line]]:
    """Rows of every step and lines of the manifest of a run whose files pass the audit."""
    options = {"groups_per_step": step, "groups_per_batch": batch, "max_staleness": staleness}
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        directory = Path(name)

        async def run() -> list[Any]:
            world = Lives(
                RolloutBuffer(directory, **options),
                random.Random(seed),
                lost,
                directory=directory,
                options=options,
                drops=drops,
                crashes=crashes,
            )
            await world.run()
            return world.contents

        contents = asyncio.run(run())
        subject = Audit(directory)
        lines = audit_rollouts(subject, runs.settings(buffer=options), Progress(committed=STEPS, recorded=STEPS))
        assert subject.findings == []
        return contents, lines


@MANY
@given(
    sizes=sizes,
    staleness=st.integers(0, 2),
    seed=st.integers(0, 10**9),
    lost=lost_tickets,
    drops=st.sampled_from([0.0, 0.1]),
)
def test_through_crashes_every_ticket_is_trained_once_or_dropped_for_a_reason(
    sizes: tuple[int, int], staleness: int, seed: int, lost: frozenset[int], drops: float
) -> None:
    step, batch = sizes
    contents, lines = live(step, batch, staleness, seed, lost, crashes=4, drops=drops)
    trained = [list(dict.fromkeys(row["ticket"] for row in rows)) for rows in contents]
    assert [line["tickets"] for line in lines] == trained
    assert [len(tickets) for tickets in trained] == [step] * STEPS
    dropped = [ticket for line in lines for tickets in line["dropped"].values() for ticket in tickets]
    together = sorted(dropped + [ticket for tickets in trained for ticket in tickets])
    assert together == list(range(trained[-1][-1] + 1))
    assert lost & set(together) <= set(dropped)
    if drops == 0:
        assert set(dropped) <= lost
    late = [
        line["step"] - 1 - version
        for line, rows in zip(lines, contents, strict=True)
        for row in rows
        for version in row["weight_versions"]
    ]
    assert min(late) >= 0 and max(late) <= staleness


@MANY
@given(sizes=sizes, seeds=st.tuples(*[st.integers(0, 10**9)] * 2), lost=lost_tickets)
def test_without_staleness_a_run_with_crashes_trains_on_the_rows_of_one_without(
    sizes: tuple[int, int], seeds: tuple[int, int], lost: frozenset[int]
) -> None:
    step, batch = sizes
    calm, _ = live(step, batch, 0, seeds[0], lost, crashes=0, drops=0.0)
    rough, _ = live(step, batch, 0, seeds[1], lost, crashes=4, drops=0.0)
    assert rough == calm
