"""The simulated run against the real controller, buffer and pools on a jumping clock, and against closed forms."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import jumping
from keel.analysis.simulation import Shape, Simulation, Timeline
from keel.analysis.virtual_time import Clock, Process

MEANS = {"generator": 3.0, "reference": 1.0, "scorer": 0.7, "learner": 2.0, "load": 0.4, "publish": 0.3, "checkpoint": 5.0}  # fmt: skip


def shape(staleness: int = 0, workers: tuple[int, int, int] = (1, 1, 1), **sizes: Any) -> Shape:
    named = {name: count for name, count in zip(("generator", "reference", "scorer"), workers, strict=True) if count}
    return Shape(**({"workers": named, "ranks": 1, "groups_per_step": 4, "groups_per_batch": 2, "max_staleness": staleness, "steps": 8} | sizes))  # fmt: skip


def simulated(sizes: Shape, durations: jumping.Drawn) -> Timeline:
    return Simulation(sizes, durations).run()


SLOW_SCORER = {**MEANS, "scorer": 6.0}
SLOW_LEARNER = {**MEANS, "learner": 12.0}
DRIVER = {**MEANS, "add": 0.2, "take": 0.3, "advance": 0.1}
CASES = {
    "synchronous": (shape(), MEANS),
    "synchronous, two generators": (shape(0, (2, 1, 1), groups_per_batch=1), MEANS),
    "synchronous, three generators, uneven batches": (shape(0, (3, 2, 1), groups_per_step=7, groups_per_batch=3), MEANS),
    "one version late": (shape(1), MEANS),
    "one version late, three generators": (shape(1, (3, 1, 2), groups_per_batch=1), MEANS),
    "two versions late, uneven batches": (shape(2, (2, 1, 2), groups_per_step=5), MEANS),
    "two versions late, three of each": (shape(2, (3, 3, 3), groups_per_batch=1, steps=15), MEANS),
    "slow scorer": (shape(1, (2, 1, 1)), SLOW_SCORER),
    "slow scorer, two of them": (shape(2, (3, 1, 2), groups_per_batch=1), SLOW_SCORER),
    "slow learner": (shape(2, (2, 1, 1), ranks=4), SLOW_LEARNER),
    "no reference": (shape(1, (2, 0, 1)), MEANS),
    "evaluations and checkpoints": (shape(1, (2, 1, 2), evaluate_every=3, checkpoint_every=2), MEANS),
    "synchronous evaluations": (shape(0, (3, 1, 2), groups_per_batch=1, evaluate_every=2, checkpoint_every=3), MEANS),
    "a driver that takes time": (shape(1, (2, 1, 2), groups_per_batch=1, evaluate_every=3), DRIVER),
    "a batch of two steps": (shape(1, (2, 1, 1), groups_per_batch=8), MEANS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_simulation_does_what_the_real_controller_does(name: str, seed: int, tmp_path: Path) -> None:
    sizes, means = CASES[name]
    durations = jumping.Drawn(means, seed)
    here, present = simulated(sizes, durations), jumping.real(tmp_path, sizes, durations)
    for subject, real in ((here.admitted, present.admitted), (here.accepted, present.accepted)):
        assert [tickets for _, tickets in subject] == [tickets for _, tickets in real]
        assert [time for time, _ in subject] == pytest.approx([time for time, _ in real])
    assert here.recorded == pytest.approx(present.recorded)
    assert len(here.recorded) == sizes.steps
    assert here.staleness == present.staleness
    for own_counts, real_counts in zip(here.counted, present.counted, strict=True):
        assert flat(own_counts) == pytest.approx(flat(real_counts))


def flat(counted: dict[str, dict[str, float]]) -> dict[str, float]:
    """Seconds by name and label, without what is nothing but rounding."""
    named = {f"{name}/{label}": value for name, values in counted.items() for label, value in values.items()}
    return {name: value for name, value in named.items() if value > 1e-9}


def test_equal_durations_end_steps_at_the_times_of_the_real_controller(tmp_path: Path) -> None:
    """Where much happens at one instant the order in it may differ, the times may not."""
    for place, staleness in enumerate((0, 1, 2)):
        sizes, durations = shape(staleness, (2, 1, 1), groups_per_batch=1), jumping.Drawn(MEANS, spread=False)
        real = jumping.real(tmp_path / str(place), sizes, durations)
        assert simulated(sizes, durations).recorded == pytest.approx(real.recorded)


def test_a_synchronous_step_is_the_sum_of_its_stages() -> None:
    steps = simulated(shape(groups_per_batch=4), jumping.Drawn(MEANS, spread=False)).step_seconds
    whole = 3.0 + 1.0 + 0.7 + 2.0 + 0.3 + 0.4
    assert steps[1:-1] == pytest.approx([whole] * 6)
    assert steps[-1] == pytest.approx(whole + 3.0 + 1.0 + 0.7), "the last evaluation"


def test_two_batches_of_a_synchronous_step_overlap_behind_one_generator() -> None:
    """The second is generated while the first is scored: the critical path has both generations, one scoring."""
    steps = simulated(shape(), jumping.Drawn(MEANS, spread=False)).step_seconds
    assert steps[1:-1] == pytest.approx([2 * 3.0 + 1.0 + 0.7 + 2.0 + 0.3 + 0.4] * 6)


BOTTLENECKS = [
    ({"generator": 3.0, "scorer": 0.5, "learner": 1.0}, 2 * 3.0 / 2),  # two batches a step, two generators
    ({"generator": 0.5, "scorer": 4.0, "learner": 1.0}, 2 * 4.0),
    ({"generator": 0.5, "scorer": 0.5, "learner": 5.0}, 5.0),
]


@pytest.mark.parametrize(("means", "seconds"), BOTTLENECKS)
def test_with_much_staleness_the_slowest_role_sets_the_pace(means: dict[str, float], seconds: float) -> None:
    sizes = shape(8, (2, 0, 1), steps=60)
    steps = simulated(sizes, jumping.Drawn(means, spread=False)).step_seconds[20:-1]
    assert sum(steps) / len(steps) == pytest.approx(seconds, rel=0.02)


class Exponential:
    """A generator that takes no time, a scorer and a learner with exponential durations."""

    def __init__(self, scorer: float, learner: float) -> None:
        self.means, self.drawn = {"scorer": scorer, "generator": 0.0}, random.Random(3)
        self.learner = learner

    def stage(self, role: str, tickets: Sequence[int]) -> float:
        mean = self.means[role]
        return self.drawn.expovariate(1 / mean) if mean else 0.0

    def step(self, version: int) -> float:
        return self.drawn.expovariate(1 / self.learner)

    def load(self, version: int, worker: int) -> float:
        return 0.0

    def driver(self, what: str) -> float:
        return 0.0


@pytest.mark.parametrize(("scorer", "staleness"), [(0.8, 3), (1.0, 2), (1.5, 4), (0.5, 0)])
def test_exponential_stages_are_an_m_m_1_queue_with_as_many_places_as_the_bound(scorer: float, staleness: int) -> None:
    """One group a step: 1 + staleness groups circle between two exponential servers, which is M/M/1/K."""
    sizes = shape(staleness, (1, 0, 1), groups_per_step=1, groups_per_batch=1, steps=20_000)
    line = Simulation(sizes, Exponential(scorer, 1.0)).run()
    rho, places = 1.0 / scorer, 1 + staleness  # load of the learner, mean step 1 s
    idle = 1 / (places + 1) if rho == 1 else (1 - rho) / (1 - rho ** (places + 1))
    assert line.recorded[-1] / sizes.steps == pytest.approx(1 / (1 - idle), rel=0.03)
    waited = sum(sum(item.get("idle_seconds_total", {}).get(f"learner/{on}", 0.0) for on in ("scorer", "driver")) for item in line.counted)  # fmt: skip
    assert waited / line.recorded[-1] == pytest.approx(idle, abs=0.015)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_nothing_is_lost_and_nothing_too_late(staleness: int) -> None:
    """Stragglers of a factor of three, many workers: tickets go in order, once, and within the bound."""
    sizes = shape(staleness, (5, 2, 3), groups_per_step=6, groups_per_batch=1, steps=50)
    line = simulated(sizes, jumping.Drawn(SLOW_SCORER, seed=staleness))
    admitted = [ticket for _, tickets in line.admitted for ticket in tickets]
    assert admitted == list(range(len(admitted)))
    accepted = [ticket for _, tickets in line.accepted for ticket in tickets]
    assert len(set(accepted)) == len(accepted) and set(accepted) <= set(admitted)
    late: Counter[int] = sum(line.staleness, Counter())
    assert late.total() == sizes.steps * 6 <= len(accepted)
    assert max(late) == staleness and min(late) == 0
    for role, count in {**sizes.workers, "learner": 1}.items():
        seconds = sum(
            value
            for counted in line.counted
            for name in ("busy_seconds_total", "idle_seconds_total")
            for label, value in counted.get(name, {}).items()
            if label.split("/")[0] == role
        )
        assert seconds == pytest.approx(count * line.recorded[-1]), role


def ends(cores: float, jobs: list[tuple[float, float, float]]) -> list[float]:
    """Ends of jobs (start, seconds, threads) on shared cores."""
    clock = Clock(cores)
    done = [0.0] * len(jobs)

    def job(place: int, start: float, seconds: float, threads: float) -> Process:
        yield clock.sleep(start)
        yield clock.compute(seconds, threads)
        done[place] = clock.now

    def everyone() -> Process:
        yield from [clock.spawn(job(place, *item)) for place, item in enumerate(jobs)]

    clock.run(clock.spawn(everyone()))
    return done


def test_cores_are_shared_in_equal_parts() -> None:
    assert ends(1, [(0, 2, 1), (0, 2, 1)]) == pytest.approx([4, 4])
    assert ends(1, [(0, 1, 1), (0, 3, 1)]) == pytest.approx([2, 4])
    assert ends(1, [(0, 2, 1), (1, 2, 1)]) == pytest.approx([3, 4])
    assert ends(2, [(0, 2, 1), (0, 2, 1)]) == pytest.approx([2, 2]), "room for both"
    assert ends(2, [(0, 2, 2), (0, 2, 2), (0, 2, 0)]) == pytest.approx([4, 4, 2]), "one that only waits"
    assert ends(2, [(0, 6, 1), (0, 2, 2)]) == pytest.approx([7, 3])


def test_workers_that_share_one_core_take_as_long_as_their_work() -> None:
    """With everything on one core no overlap helps: a step is the sum of all its work."""
    threads = dict.fromkeys(("generator", "reference", "scorer", "learner"), 1.0)
    sizes = shape(2, (2, 1, 1), threads=threads, cores=1.0, steps=40, groups_per_batch=2)
    durations = jumping.Drawn({"generator": 2.0, "reference": 1.0, "scorer": 0.5, "learner": 2.0}, spread=False)
    steps = simulated(sizes, durations).step_seconds[10:-1]
    assert sum(steps) / len(steps) == pytest.approx(2 * 3.5 + 2.0, rel=0.02)
