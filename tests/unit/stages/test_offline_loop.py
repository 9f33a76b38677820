"""The loop of a stage: evaluations, early stopping, checkpoints, resuming. The learner is scripted."""

import dataclasses
import json
from pathlib import Path

import pytest

from keel import checkpoint
from keel.errors import ConfigError
from keel.stages import offline_loop
from keel.stages.offline_loop import OfflineRecorder
from offline_runs import ROWS, FakeOfflineLearner, Killed, Run, offline_run_of


async def test_a_course_evaluates_before_the_first_and_after_the_last_step(tmp_path: Path) -> None:
    run = Run(offline_run_of(tmp_path, steps=3), FakeOfflineLearner([3, 2, 1, 5]))
    state = await run.finish()
    assert (state.version, run.exported) == (3, 3)  # the last, though it is not the best
    assert run.done("assess") == [0, 3] and run.done("step") == [1, 2, 3] and run.done("export") == [3]
    assert [line["step"] for line in run.lines("evaluations.jsonl")] == [0, 3]
    assert [line["step"] for line in run.lines("metrics.jsonl")] == run.display.steps == [1, 2, 3]
    assert state.evaluations == run.lines("evaluations.jsonl")


async def test_evaluations_are_due_by_step_and_once_at_the_end(tmp_path: Path) -> None:
    for steps, expected in ((4, [0, 2, 4]), (5, [0, 2, 4, 5])):
        directory = tmp_path / str(steps)
        directory.mkdir()
        run = Run(offline_run_of(directory, steps=steps, every=2), FakeOfflineLearner([9] * 6))
        await run.finish()
        assert run.done("assess") == expected


@pytest.mark.parametrize(
    ("losses", "patience", "ends", "best"),
    [
        ([5, 4, 3, 4, 3.5, 2, 1], 2, 4, 2),  # two evaluations without a lower one
        ([5, 4, 3, 4, 2, 3, 1], 2, 6, 6),  # one is not enough
        ([5, 5, 5, 5, 5, 5, 5], 3, 3, 0),  # equal is not lower: what it started from is the best
        ([5, 6, 4, 6, 6, 6, 1], 1, 1, 0),
        ([7, 6, 5, 4, 3, 2, 1], 1, 6, 6),
        ([1, 2, 3, 4, 5, 6, 7], 9, 6, 0),  # patience outlives the run: still the best
    ],
)
async def test_patience_ends_a_course_and_keeps_the_best(
    tmp_path: Path, losses: list[float], patience: int, ends: int, best: int
) -> None:
    run = Run(offline_run_of(tmp_path, every=1, patience=patience), FakeOfflineLearner(losses))
    state = await run.finish()
    assert (state.version, state.best_version, run.exported) == (ends, best, best)
    assert state.best_loss == min(losses[: ends + 1])
    assert run.done("assess") == list(range(ends + 1))
    assert run.exported == losses.index(min(losses[: ends + 1]))


async def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    nan = float("nan")
    run = Run(offline_run_of(tmp_path, every=1, patience=2), FakeOfflineLearner([3, 2, nan, nan, nan, nan, nan]))
    state = await run.finish()
    assert (state.best_version, run.exported, state.version) == (1, 1, 3)


async def test_numbers_of_a_course(tmp_path: Path) -> None:
    run = Run(offline_run_of(tmp_path, steps=6, every=2), FakeOfflineLearner([6, 5, 4, 3, 2, 1, 0]))
    await run.finish()
    lines = run.lines("metrics.jsonl")
    assert [line["epochs"] for line in lines] == [step * 5 / ROWS for step in range(1, 7)]
    assert [line["loss"] for line in lines] == [1 / step for step in range(1, 7)]
    assert not {"reward", "reward_std", "trained_tokens"} & set(lines[0])  # labels of stored rows are no news
    totals = {"steps_total": 6.0, "trained_tokens_total": 42.0, "learner_seconds_total": 3.0}
    assert {name: lines[-1][name] for name in totals} == totals
    assert lines[-1]["pairs_dropped_total"] == {"tie": 12.0}
    assert run.metrics.totals["evaluations_total"] == 4.0
    # an evaluation is seen on the page at once, in the file with the step behind it
    assert [line.get("held_out_loss") for line in lines] == [6, None, 4, None, 2, None]
    assert lines[0]["held_out_accuracy_ratio"] == 0.25
    page = {sample.name: sample.value for family in run.metrics.registry.collect() for sample in family.samples}
    assert (page["keel_held_out_loss"], page["keel_epochs"]) == (0, 1.5)
    assert run.display.notes[0] == "held out at step 0: loss 6.0000  preference_accuracy_ratio 0.2500"


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("killed_at", [1, 2, 3, 4, 5, 6])
async def test_a_resumed_course_is_the_uninterrupted_one(tmp_path: Path, patience: int, killed_at: int) -> None:
    """Same model, same evaluations, same steps in the same files, whenever it was killed."""
    losses = [9, 8, 7, 7.5, 6, 6.5, 6.25]
    plans = [offline_run_of(tmp_path / name, every=1, patience=patience, checkpoints=2) for name in ("whole", "killed")]
    for plan in plans:
        plan.directory.mkdir()
    whole = Run(plans[0], FakeOfflineLearner(losses))
    expected = await whole.finish()
    with pytest.raises(Killed, match=f"at step {killed_at}"):
        await Run(plans[1], FakeOfflineLearner(losses, killed_at)).finish()
    resumed = Run(plans[1], FakeOfflineLearner(losses))
    assert await resumed.finish() == expected
    begins = (killed_at - 1) // 2 * 2  # the newest checkpoint before it
    assert resumed.done("step") == list(range(begins + 1, 7)) and len(resumed.done("restore_checkpoint")) == (
        begins > 0
    )
    assert resumed.exported == whole.exported == (4 if patience else 6)
    assert resumed.lines("evaluations.jsonl") == whole.lines("evaluations.jsonl")
    assert resumed.metrics.totals == whole.metrics.totals
    volatile = {"time", "free_memory_bytes", "held_out_loss", "held_out_accuracy_ratio"}
    numbers = [
        [{name: value for name, value in line.items() if name not in volatile} for line in run.lines("metrics.jsonl")]
        for run in (resumed, whole)
    ]
    assert numbers[0] == numbers[1]


async def test_a_course_that_ran_out_of_patience_before_a_checkpoint_trains_no_further(tmp_path: Path) -> None:
    losses = [1, 2, 3, 4, 5, 6, 7]
    plan = offline_run_of(tmp_path, every=1, patience=2, checkpoints=2)
    first = Run(plan, FakeOfflineLearner(losses))
    assert (await first.finish()).version == 2
    again = Run(plan, FakeOfflineLearner(losses))
    assert (await again.finish()).version == 2 and again.done("step") == [] and again.exported == 0


async def test_checkpoints_are_pruned_and_hold_the_objective(tmp_path: Path) -> None:
    run = Run(offline_run_of(tmp_path, checkpoints=1), FakeOfflineLearner([9] * 7))
    await run.finish()
    assert checkpoint.steps(tmp_path) == [4, 5]  # none after the last step: the model is what is left of it
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    stored = checkpoint.read_state(newest)
    assert stored["objective"] == {"moments": 5} and stored["version"] == 5 and stored["totals"]["steps_total"] == 5


async def test_an_export_replaces_the_whole_folder(tmp_path: Path) -> None:
    run = Run(offline_run_of(tmp_path, steps=1), FakeOfflineLearner([2, 1]))
    for folder in (run.plan.model, tmp_path / ".model.tmp"):  # of an earlier run, and one that was killed in it
        folder.mkdir()
        (folder / "old").write_text("old")
    await run.finish()
    assert [path.name for path in run.plan.model.iterdir()] == ["weights"] and not (tmp_path / ".model.tmp").exists()


async def test_a_finished_stage_says_what_it_did(tmp_path: Path) -> None:
    assert offline_loop.finished(tmp_path) is None
    run = Run(offline_run_of(tmp_path, steps=4, checkpoints=1), FakeOfflineLearner([2] * 5))
    state = await run.finish()
    assert offline_loop.finished(tmp_path) is None  # a model is no end yet
    summary = offline_loop.finish(run.plan, "sft", 0.0, trained_steps=state.version)
    assert offline_loop.finished(tmp_path) == summary == json.loads((tmp_path / "stage.json").read_text())
    assert {**summary, "seconds": 0} == {
        "stage": "sft", "steps": 4, "rows": ROWS, "dropped": {"empty": 3}, "digest": "", "trained_steps": 4, "seconds": 0,
    }  # fmt: skip
    assert not (tmp_path / "checkpoints").exists() and run.exported == 4


async def test_a_course_does_not_go_on_with_other_rows(tmp_path: Path) -> None:
    run = Run(offline_run_of(tmp_path, steps=4, checkpoints=1), FakeOfflineLearner([2] * 5))
    await run.finish()
    other = dataclasses.replace(run.plan, digest="of other rows")
    with pytest.raises(ConfigError, match="holds this stage on other rows"):
        await offline_loop.restore(other, FakeOfflineLearner([2] * 5), OfflineRecorder(other, run.metrics, run.display))
