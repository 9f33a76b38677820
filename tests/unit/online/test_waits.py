"""How long a run waits for each of its parts, on a clock that jumps: every deadline is another number here."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import jumping
from fakes import SAMPLING, FakeScorer, Run, settings_for
from jumping import now
from keel.errors import BufferLost, LearnerLost, NotFinite, WorkerLost
from keel.online import controller as controller_module
from keel.online.controller import Controller, Stalled, within
from keel.online.retries import FailureWatch, TooManyFailures, retrying
from keel.protocols import StageReceipt

START, GENERATE, SCORE, STEP, LOAD, RETRIES, STALENESS = 1000, 300, 70, 20, 5, 2, 1
DEADLINES = {"start": START, "generate": GENERATE, "score": SCORE, "step": STEP, "load": LOAD}
GRACE = (START + LOAD) * (RETRIES + 1)
"""A lost worker is started and loaded again, once for every attempt."""
IN_LINE = GENERATE * 2 * (1 + STALENESS) + GRACE
"""The last of the batches that may be in flight, behind a single generator: two groups a step, a ticket a batch."""


async def forever(*_: Any, **options: Any) -> Any:
    await asyncio.sleep(1e12)


def run_of(tmp_path: Path, **more: Any) -> Run:
    blocks = {"deadlines": {f"{name}_seconds": seconds for name, seconds in DEADLINES.items()}, **more}
    return Run(tmp_path, settings_for(steps=3, staleness=STALENESS, retries=RETRIES, **blocks))


def ends(run: Run) -> tuple[float, BaseException]:
    """When the run ended, and why; all its parts take no time but those that hang."""

    async def work() -> tuple[float, BaseException]:
        try:
            await run.controller.run()
        except Exception as error:  # whatever it is, the test compares it
            return now(), error
        raise AssertionError("the run came through")

    return jumping.run(work())


def replace(run: Run, **parts: Any) -> None:
    """Other parts for the controller."""
    run.controller.components = dataclasses.replace(run.controller.components, **parts)


Hang = Callable[[Run], None]
HANGS: dict[str, tuple[Hang, float, type[Exception], str]] = {
    "publish": (lambda run: setattr(run.controller.components.learner, "publish", forever), LOAD, LearnerLost, "step 2: .* for the learner to publish"),
    "load": (lambda run: setattr(run.generator, "load_weights", forever), LOAD + GRACE + GENERATE, Stalled, "step 2: .* for generators to load weights"),
    "score": (lambda run: setattr(run.scorer, "score", forever), SCORE + GRACE, Stalled, "step 1: .* for a scorer"),
    "generate": (lambda run: setattr(run.generator, "generate", forever), IN_LINE, Stalled, "step 1: .* for a generator"),
    "add": (lambda run: setattr(run.buffer, "add", forever), SCORE, BufferLost, "step 1: .* for the buffer to accept rows"),
    "take": (lambda run: setattr(run.buffer, "take", forever), (GENERATE + 2 * SCORE) * (RETRIES + 1) + GRACE, Stalled, "step 1: .* for rollouts of a step; "),
    "step": (lambda run: setattr(run.controller.components.learner, "step", forever), STEP, LearnerLost, "step 1: .* for the learner to step"),
    "advance": (lambda run: setattr(run.buffer, "advance", forever), SCORE, BufferLost, "step 2: .* for the buffer to advance"),
    "checkpoint": (lambda run: setattr(run.checkpoints, "save", forever), STEP, LearnerLost, "step 2: .* for the learner to save"),
    "iteration": (lambda run: setattr(run.checkpoints, "renew_reference", forever), LOAD + GRACE, LearnerLost, "step 2: .* for the reference to be renewed"),
    "fetch": (lambda run: replace(run, fetch=forever), GRACE, Stalled, "step 1: .* for evaluated rows to arrive"),
}  # fmt: skip


@pytest.mark.parametrize("name", HANGS)
def test_every_wait_has_its_deadline_and_says_for_whom(tmp_path: Path, name: str) -> None:
    hang, seconds, error, message = HANGS[name]
    blocks: dict[str, Any] = {"checkpoint": {"every_steps": 1}}
    if name == "iteration":
        blocks["reference"] = {"ref_policy": "previous", "iteration_steps": 1}
    run = run_of(tmp_path, **blocks)
    hang(run)
    ended, raised = ends(run)
    assert type(raised) is error and ended == pytest.approx(seconds, abs=0.5)
    with pytest.raises(error, match=f"^{message}"):
        raise raised
    assert f"waited {seconds} s for" in str(raised)


class Passing:
    """A scorer before the one that gives rewards."""

    async def score(self, batch: Any) -> Any:
        await asyncio.sleep(0)
        return batch, StageReceipt(batch.num_rows, 0, 0.5, "first")


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_wait_for_rollouts_counts_every_scorer(tmp_path: Path, before: int) -> None:
    run = run_of(tmp_path)
    replace(run, scorers=[Passing()] * before + [run.scorer])
    run.buffer.take = forever  # type: ignore[method-assign]
    ended, raised = ends(run)
    assert isinstance(raised, Stalled)
    assert ended == pytest.approx((GENERATE + (before + 2) * SCORE) * (RETRIES + 1) + GRACE)


def test_seconds_of_all_scorers_are_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=1))
    replace(run, scorers=[Passing(), run.scorer])
    jumping.run(run.controller.run())
    assert run.observer.totals["score_seconds_total"] == 2 * (0.5 + 0.25)
    assert run.observer.totals["generate_seconds_total"] == 2 * 0.5


def test_rows_that_are_refused_are_kept_within_a_time(tmp_path: Path) -> None:
    run = run_of(tmp_path)

    async def refuse(batch: Any) -> Any:
        raise NotFinite("step 1: the loss is nan")

    run.controller.components.learner.step = refuse  # type: ignore[method-assign]
    run.observer.quarantine = forever  # type: ignore[method-assign]
    ended, raised = ends(run)
    assert isinstance(raised, Stalled) and "for quarantine" in str(raised) and ended == pytest.approx(GRACE)


def test_the_buffer_has_its_time_to_drop_tickets(tmp_path: Path) -> None:
    run = run_of(tmp_path)

    async def lost(request: Any) -> Any:
        if request.prompts.num_rows == 3:
            return await evaluates(request)
        raise WorkerLost("killed")

    evaluates = run.generator.generate
    run.generator.generate = lost  # type: ignore[method-assign]
    run.buffer.drop = forever  # type: ignore[method-assign]
    ended, raised = ends(run)
    assert (
        isinstance(raised, BufferLost) and "the buffer to drop tickets" in str(raised) and ended == pytest.approx(SCORE)
    )


async def test_a_timeout_of_the_awaited_itself_stays_one() -> None:
    async def timing_out() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        await within(60, timing_out(), lambda: Stalled("late"))


def test_a_comparison_before_the_run_waits_a_steps_time(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.controller.components.learner.compare = forever  # type: ignore[method-assign]

    async def work() -> float:
        with pytest.raises(LearnerLost, match="waited 20 s for the learner to compare"):
            await run.controller.compare(None)  # type: ignore[arg-type]
        return now()

    assert jumping.run(work()) == pytest.approx(STEP)


# ---- what a step tells of its times


def test_the_seconds_of_a_step_are_those_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 s to generate, 2 to score, 4 to step, 1 to publish, 6 to load; at staleness 0 nothing overlaps."""
    monkeypatch.setattr(controller_module, "time", SimpleNamespace(monotonic=now, time=lambda: 1000.0 + now()))
    settings = settings_for(steps=1)
    run = Run(tmp_path, settings, generator=lambda tickets, attempt: asyncio.sleep(3))
    replace(run, scorers=[FakeScorer(hook=lambda tickets, call: asyncio.sleep(2))])
    learner, load = run.controller.components.learner, run.generator.load_weights
    step, publish = learner.step, learner.publish
    learner.step = lambda batch: after(4, step, batch)  # type: ignore[method-assign]
    learner.publish = lambda: after(1, publish)  # type: ignore[method-assign]
    run.generator.load_weights = lambda weights: after(6, load, weights)  # type: ignore[method-assign]
    done: list[str] = []
    run.observer.doing = done.append  # type: ignore[method-assign, assignment]
    jumping.run(run.controller.run())
    gauges, totals = run.observer.gauges, run.observer.totals
    assert gauges["wait_seconds"] == pytest.approx(5) and gauges["weight_sync_seconds"] == pytest.approx(7)
    assert (gauges["version"], gauges["learner_version"]) == (1.0, 1.0)
    assert gauges["generate_tokens_per_second"] == pytest.approx(20 / 1.0)
    assert (totals["generate_seconds_total"], totals["score_seconds_total"]) == (1.0, 0.5)
    assert (totals["steps_total"], totals["weight_syncs_total"], totals["weight_sync_bytes_total"]) == (1, 1, 200)
    assert totals["evaluations_total"] == 2 and totals["learner_seconds_total"] == pytest.approx(0.1)
    assert done == ["evaluation", "rollouts", "learner step", "weight sync", "evaluation", "checkpoint"]
    assert gauges["progress_timestamp_seconds"] == {"checkpoint": pytest.approx(1016.0)}


async def after(seconds: float, function: Any, *arguments: Any) -> Any:
    await asyncio.sleep(seconds)
    return await function(*arguments)


def test_a_step_without_new_rollouts_has_no_rate(tmp_path: Path) -> None:
    """At staleness 1 all rollouts of the second step may have come in the first."""
    run = Run(tmp_path, settings_for(steps=1, staleness=1))
    rates: list[float] = []
    keep = run.observer.set

    def told(values: dict[str, Any]) -> None:
        rates.extend(values[name] for name in values if name == "generate_tokens_per_second")
        keep(values)

    run.observer.set = told  # type: ignore[method-assign]
    run.controller._generated = [0.0, 0.0]
    jumping.run(run.controller.run())
    assert len(rates) == 1 and rates[0] == pytest.approx(20.0)
    assert run.controller._generated[1] >= 0


async def test_a_controller_that_is_told_no_version_starts_at_none(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=2))
    fresh = Controller(settings_for(steps=2), run.controller.components, SAMPLING, run.observer)
    await asyncio.wait_for(fresh.run(), 60)
    assert run.entries("evaluation") == [("evaluation", 0), ("evaluation", 2)]
    assert [entry[1] for entry in run.entries("stepped")] == [1, 2]


# ---- what is tried again, and how many may fail


@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_so_many_further_attempts(retries: int) -> None:
    attempts = 0

    async def once() -> str:
        nonlocal attempts
        attempts += 1
        if attempts <= retries:
            raise WorkerLost("killed")
        return "done"

    assert await retrying(once, retries) == "done" and attempts == retries + 1

    async def never() -> str:
        nonlocal attempts
        attempts += 1
        raise WorkerLost("killed")

    attempts = 0
    with pytest.raises(WorkerLost, match="killed"):
        await retrying(never, retries)
    assert attempts == retries + 1


async def test_another_error_is_not_tried_again() -> None:
    attempts = 0

    async def once() -> None:
        nonlocal attempts
        attempts += 1
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        await retrying(once, 5)
    assert attempts == 1


def test_as_many_samples_as_a_step_has_may_fail_up_to_the_ratio() -> None:
    """Four samples a step, half of them allowed: at the ratio itself a run continues, and an old failure is forgotten."""
    watch = FailureWatch(settings_for(failures={"max_failed_ratio": 0.5}))
    watch.saw({"broken": 3}, accepted=0)  # three of three, but a step has four
    watch.saw({}, accepted=2)  # broken, broken, fine, fine
    watch.saw({"broken": 1}, accepted=1)
    watch.saw({}, accepted=2)
    watch.saw({"broken": 1, "late": 1}, accepted=0)
    with pytest.raises(
        TooManyFailures, match=r"75% of the last 4 samples.*ratio=0.5; reasons: {'broken': 6, 'late': 1}"
    ):
        watch.saw({"broken": 1}, accepted=0)


@pytest.mark.parametrize(("allowed", "failed", "ends_run"), [(0.0, 1, True), (0.25, 1, False), (0.25, 2, True), (1.0, 4, False)])  # fmt: skip
def test_the_allowed_share_of_a_step(allowed: float, failed: int, ends_run: bool) -> None:
    watch = FailureWatch(settings_for(failures={"max_failed_ratio": allowed}))
    if ends_run:
        with pytest.raises(TooManyFailures, match=f"{failed / 4:.0%} of the last 4"):
            watch.saw({"broken": failed}, accepted=4 - failed)
    else:
        watch.saw({"broken": failed}, accepted=4 - failed)
        assert sum(watch._outcomes) == failed
