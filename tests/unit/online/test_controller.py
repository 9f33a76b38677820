"""The two loops on in-process fakes: the order of things, and every way a run ends."""

import asyncio
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeScorer, Run, settings_for
from keel import schema
from keel.errors import LearnerLost, NotFinite, WorkerLost
from keel.observability import metric_table
from keel.online.controller import Stalled
from keel.online.retries import TooManyFailures
from keel.protocols import LoadReceipt

forever = asyncio.Event  # .wait() of a fresh one never returns


async def nothing_left(run: Run) -> None:
    """No task of the run is alive and no generator call is open."""
    await asyncio.sleep(0)
    assert run.generator.busy == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


# ---- the run as it should be


async def test_a_run_takes_its_steps_in_order_and_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=3, evaluation={"every_steps": 2}, checkpoint={"every_steps": 1}))
    await run.finish()
    await nothing_left(run)
    learn_loop = ("evaluated", "evaluation", "stepped", "staleness", "loaded", "recorded", "checkpoint")
    assert run.entries(*learn_loop) == [
        *[("evaluated", 0), ("evaluation", 0)],
        *[("stepped", 1, 0, 1), ("staleness", 0), ("loaded", 1), ("recorded", 1), ("checkpoint", 1)],
        *[("stepped", 2, 2, 3), ("staleness", 0), ("loaded", 2)],
        *[("evaluated", 2), ("evaluation", 2), ("recorded", 2), ("checkpoint", 2)],
        *[("stepped", 3, 4, 5), ("staleness", 0), ("loaded", 3)],
        *[("evaluated", 3), ("evaluation", 3), ("recorded", 3), ("checkpoint", 3)],
    ]
    # the rollouts of a step come while the checkpoint before it is written, and never before its weights are loaded
    generated = [("generated", 0, 0), ("generated", 1, 0), ("generated", 2, 1), ("generated", 3, 1)]
    assert run.entries("generated") == [*generated, ("generated", 4, 2), ("generated", 5, 2)]
    for step in (1, 2):
        tickets = [run.log.index(entry) for entry in run.entries("generated") if entry[2] == step]
        assert run.log.index(("loaded", step)) < min(tickets)
        assert max(tickets) < run.log.index(("stepped", step + 1, 2 * step, 2 * step + 1))
    assert run.log.index(("generated", 2, 1)) < run.log.index(("checkpoint", 1))
    assert run.log.index(("evaluation", 2)) < run.log.index(("generated", 4, 2))


async def test_with_every_steps_0_only_the_ends_are_evaluated_and_stored(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=3, evaluation={"every_steps": 0}, checkpoint={"every_steps": 0}))
    await run.finish()
    assert run.entries("evaluation") == [("evaluation", 0), ("evaluation", 3)]
    assert run.entries("checkpoint") == [("checkpoint", 3)]


async def test_a_resumed_run_starts_at_its_version_without_a_first_evaluation(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=4), version=2)
    await run.finish()
    assert run.entries("stepped") == [("stepped", 3, 4, 5), ("stepped", 4, 6, 7)]
    assert run.entries("evaluation") == [("evaluation", 4)]


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_no_row_is_trained_later_than_the_bound(tmp_path: Path, staleness: int) -> None:
    """Stragglers of every length; groups are still trained in order of their tickets."""
    choices = random.Random(staleness)

    async def straggle() -> None:
        for _ in range(choices.choice([0, 1, 5, 40])):
            await asyncio.sleep(0)

    run = Run(tmp_path, settings_for(steps=6, staleness=staleness), generator=lambda tickets, _: straggle())
    await run.finish()
    assert run.entries("stepped") == [("stepped", step, 2 * step - 2, 2 * step - 1) for step in range(1, 7)]
    behind = [late for _, late in run.entries("staleness")]
    assert max(behind) <= staleness
    assert staleness == 0 or max(behind) > 0  # generators really run ahead


async def test_numbers_come_under_names_the_metrics_table_has(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=3))
    await run.finish()
    kinds = {metric.name: metric.kind for metric in metric_table.TABLE}
    assert {kinds[name] for name in run.observer.gauges} == {"gauge"}
    assert {kinds[name if isinstance(name, str) else name[0]] for name in run.observer.totals} == {"counter"}
    expected = {"steps_total": 3, "samples_accepted_total": 12, "trained_tokens_total": 21, "evaluations_total": 2}
    stored = [schema.from_bytes(path.read_bytes()) for path in (tmp_path / "rollouts").glob("*.arrow")]
    tokens = sum(int(schema.lengths(batch, "completion_tokens").sum()) for batch in stored)
    expected |= {"completion_tokens_total": tokens, "weight_syncs_total": 3, "weight_sync_bytes_total": 600}
    assert {name: run.observer.totals[name] for name in expected} == expected
    assert run.observer.gauges["version"] == 3
    assert run.observer.gauges["reward_component"] == {"length": 0.5}
    assert run.observer.gauges["generate_tokens_per_second"] == 20  # 10 tokens in half a second


# ---- lost workers and failed samples


async def test_a_lost_worker_is_tried_again_with_the_same_rows(tmp_path: Path) -> None:
    def once(tickets: list[int], attempt: int) -> None:
        if tickets == [1] and attempt < 3:
            raise WorkerLost("killed")

    run = Run(tmp_path, settings_for(steps=2, retries=2), generator=once)
    await run.finish()
    assert run.generator.attempts[(1,)] == 3  # the fake also compares the seeds
    assert run.entries("stepped") == [("stepped", 1, 0, 1), ("stepped", 2, 2, 3)]
    assert run.observer.totals["retries_total"] == 2
    assert run.observer.events == [{"event": "retry", "reason": "killed"}] * 2


async def test_tickets_that_lose_every_worker_are_dropped_and_replaced(tmp_path: Path) -> None:
    def always(tickets: list[int], attempt: int) -> None:
        if tickets == [1]:
            raise WorkerLost("killed")

    scorer = FakeScorer(hook=lambda tickets, _: always(sorted(set(tickets)), 1))
    run = Run(tmp_path, settings_for(steps=2, retries=1), scorer=scorer)
    await run.finish()
    assert run.generator.attempts[(1,)] == 2
    assert run.entries("stepped") == [("stepped", 1, 0, 2), ("stepped", 2, 3, 4)]
    assert run.observer.totals["groups_dropped_total", "worker_lost"] == 1


async def test_failed_groups_are_counted_and_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=2), scorer=FakeScorer(failed=lambda ticket: ticket == 2))
    await run.finish()
    assert run.entries("stepped") == [("stepped", 1, 0, 1), ("stepped", 2, 3, 4)]
    assert run.observer.totals["samples_failed_total", "broken"] == 2  # both samples of ticket 2
    assert run.observer.totals["groups_dropped_total", "too_few_samples"] == 1


async def test_too_many_failed_samples_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(failures={"max_failed_ratio": 0.4}), scorer=FakeScorer(lambda t: t % 2 == 1))
    with pytest.raises(TooManyFailures, match=r"50% of the last 4 samples failed.*max_failed_ratio=0\.4"):
        await run.finish()
    await nothing_left(run)


async def test_lost_workers_count_as_failures(tmp_path: Path) -> None:
    def always(tickets: list[int], attempt: int) -> None:
        raise WorkerLost("killed")

    run = Run(tmp_path, settings_for(retries=0), generator=always)
    with pytest.raises(TooManyFailures, match="100% of the last 4 samples"):
        await run.finish()


# ---- crashes, stalls, cancellation


async def test_a_crash_of_a_generator_surfaces_with_its_cause_and_cancels_the_rest(tmp_path: Path) -> None:
    def crash(tickets: list[int], attempt: int) -> Any:
        if tickets != [1]:
            return forever().wait()
        try:
            raise OSError("disk full")
        except OSError as error:
            raise RuntimeError("engine died") from error

    run = Run(tmp_path, settings_for(), generator=crash)
    with pytest.raises(RuntimeError, match="engine died") as caught:
        await run.finish()
    await nothing_left(run)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_crash_of_the_learner_cancels_open_generator_calls(tmp_path: Path) -> None:
    def crash(tickets: list[int], version: int) -> None:
        raise FloatingPointError(f"step {version}: the loss is nan")

    def hang(tickets: list[int], attempt: int) -> Any:
        return forever().wait() if tickets[0] >= 2 else None

    run = Run(tmp_path, settings_for(staleness=1), generator=hang, learner=crash)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan"):
        await run.finish()
    await nothing_left(run)


@pytest.mark.parametrize(
    ("who", "limit", "message", "error"),
    [
        ("generator", {"generate_seconds": 0.05, "start_seconds": 0.05, "load_seconds": 0.05}, "a generator", Stalled),
        ("scorer", {"score_seconds": 0.05, "start_seconds": 0.05, "load_seconds": 0.05}, "a scorer", Stalled),
        ("learner", {"step_seconds": 0.05}, "the learner to step", LearnerLost),
    ],
)
async def test_a_stall_names_who_is_waited_for(
    tmp_path: Path, who: str, limit: Any, message: str, error: type[Exception]
) -> None:
    def hang(tickets: list[int], attempt: int) -> Any:
        return forever().wait()

    hangs: Any = {who: FakeScorer(hook=hang) if who == "scorer" else hang}
    run = Run(tmp_path, settings_for(deadlines=limit), **hangs)
    with pytest.raises(error, match=f"step 1: waited 0 s for {message}$"):
        await run.finish()
    await nothing_left(run)


async def test_a_buffer_that_does_not_deliver_says_what_it_has(tmp_path: Path) -> None:
    limit = {f"{what}_seconds": 0.02 for what in ("generate", "start", "load")}
    run = Run(tmp_path, settings_for(deadlines={**limit, "score_seconds": 0.2}, retries=0))
    run.buffer.take = lambda groups: forever().wait()  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(Stalled, match=r"step 1: waited \d s for rollouts of a step; .*2 of 2 groups ready"):
        await run.finish()
    await nothing_left(run)


async def test_a_controller_that_is_asked_to_leave_ends_with_a_checkpoint(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        settings_for(steps=6),
        learner=lambda tickets, version: run.controller.leave() if version == 3 else None,
    )
    await run.finish()
    await nothing_left(run)
    assert run.entries("stepped")[-1][1] == 3
    assert run.entries("recorded", "checkpoint")[-2:] == [("recorded", 3), ("checkpoint", 3)]
    assert run.entries("stepped", "recorded", "checkpoint")[-1] == ("checkpoint", 3)


async def test_rows_the_learner_refuses_are_handed_on_before_the_run_ends(tmp_path: Path) -> None:
    def refuse(tickets: list[int], version: int) -> None:
        if version == 2:
            raise NotFinite("step 2: the loss is nan")

    run = Run(tmp_path, settings_for(steps=4), learner=refuse)
    with pytest.raises(NotFinite, match="step 2: the loss is nan"):
        await run.finish()
    await nothing_left(run)
    assert run.entries("quarantined") == [("quarantined", 2, 2, 3)]


async def test_generators_with_other_weights_than_published_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for())

    async def one_is_wrong(weights: Any) -> list[LoadReceipt]:
        version, digest = weights
        return [LoadReceipt(version, digest, 100, 0.1), LoadReceipt(version, "other", 100, 0.1)]

    run.generator.load_weights = one_is_wrong  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="other"):
        await run.finish()
    assert run.buffer.window.version == 0  # nothing was admitted on their account


async def test_a_cancelled_run_leaves_nothing_behind(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(), generator=lambda tickets, _: forever().wait())
    task = asyncio.create_task(run.controller.run())
    while run.generator.busy < 2:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError, match=r"\A\Z"):
        await task
    await nothing_left(run)


async def test_a_finished_run_does_not_wait_for_rows_nobody_trains_on(tmp_path: Path) -> None:
    """At max_staleness 1 two groups more than needed are under way when the last step is done."""

    def hang(tickets: list[int], attempt: int) -> Any:
        return forever().wait() if tickets[0] >= 4 else None

    async def until_two_hang() -> None:
        while run.generator.busy < 2:
            await asyncio.sleep(0)

    run = Run(
        tmp_path,
        settings_for(steps=2, staleness=1),
        generator=hang,
        learner=lambda tickets, version: until_two_hang() if version == 2 else None,
    )
    await asyncio.wait_for(run.controller.run(), 60)
    assert run.entries("evaluation")[-1] == ("evaluation", 2)
    await nothing_left(run)


# ---- the weights


class Collective:
    """A transport whose ends wait for one another, as those of a collective do."""

    def begin(self, learner: Any, generators: Any) -> tuple[Any, Any]:
        meeting = asyncio.Barrier(2)

        async def publish() -> LoadReceipt:
            self.weights, receipt = await learner.publish()
            await meeting.wait()
            return receipt

        async def load() -> Any:
            await meeting.wait()
            return await generators.load_weights(self.weights)

        return publish(), load()


async def test_publish_and_load_begin_together(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=2))
    run.controller.components = dataclasses.replace(run.controller.components, transport=Collective())
    await run.finish()
    await nothing_left(run)
    assert run.entries("loaded") == [("loaded", 1), ("loaded", 2)]


async def test_an_end_of_the_transport_that_fails_ends_the_other(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=2))

    async def refuse(weights: Any) -> Any:
        raise LearnerLost("the weights were lost with their node")

    run.generator.load_weights = refuse  # type: ignore[method-assign]
    with pytest.raises(LearnerLost, match="lost with their node"):
        await run.finish()
    await nothing_left(run)


# ---- objectives that end the run, references of iterations


async def test_an_objective_that_is_done_ends_the_run_with_an_evaluation_and_a_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=9))
    learner = run.controller.components.learner
    step = learner.step

    async def done_at_two(batch: Any) -> Any:
        report = await step(batch)
        return dataclasses.replace(report, finished=report.version == 2, counts={"pairs_dropped_total": {"tie": 1.0}})

    learner.step = done_at_two  # type: ignore[method-assign]
    await run.finish()
    await nothing_left(run)
    assert run.entries("stepped")[-1][1] == 2
    assert run.entries("evaluation", "checkpoint")[-2:] == [("evaluation", 2), ("checkpoint", 2)]
    assert run.observer.events == [{"event": "objective_finished", "step": 2}]
    assert run.observer.totals["pairs_dropped_total", "tie"] == 2


async def test_a_reference_is_renewed_before_the_tickets_of_the_next_step_open(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=5, reference={"ref_policy": "previous", "iteration_steps": 2}))
    await run.finish()
    order = run.entries("loaded", "iteration", "generated")
    assert run.entries("iteration") == [("iteration", 2), ("iteration", 4)]
    for step in (2, 4):
        place = order.index(("iteration", step))
        assert order[place - 1] == ("loaded", step)
        assert order[place + 1][0] == "generated" and order[place + 1][2] == step
