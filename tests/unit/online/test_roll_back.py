"""Roll backs of a run on fakes: what moves aside, what stays, and the same after a kill or a loss."""

from pathlib import Path

import pytest

import rollouts
from guarded_runs import GOLD, GuardedRun, Killed, settings_of
from keel import checkpoint, files, schema
from keel.observability import evaluations
from keel.online import roll_back
from keel.online.train import Saved
from keel.rollout import manifest, segments


@pytest.mark.parametrize("killed_in", [None, 2, 4, 5])
def test_a_roll_back_continues_from_the_best_with_what_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int | None
) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(["roll_back", "raise_kl"], max_roll_backs=2), monkeypatch)
    if killed_in:
        with pytest.raises(Killed, match="here"):
            run.process(killed_in)
    saved = run.process()
    # every time gold falls at step 3 the run returns to step 2; the third time it stops
    assert (saved.version, saved.over(run.settings)) == (3, True)
    taken = [entry for index, entry in enumerate(run.multipliers) if index == 0 or entry != run.multipliers[index - 1]]
    assert [entry for entry in taken if entry[0] == 3] == [(3, 1, 1), (3, 2, 1), (3, 4, 1)]
    assert run.state(3)["guard"]["roll_backs"] == 2 and run.state(3)["guard"]["multipliers"]["kl"] == 8
    assert run.state(3)["totals"]["guard_fired_total"] == {"proxy_gold_divergence": 3.0}
    assert [event["step"] for event in run.events if event["event"] == "roll_back"] == [2, 2]
    assert checkpoint.steps(run.directory) == [2, 3]


@pytest.mark.parametrize("killed_in", [None, 2, 4, 5])
def test_steps_made_again_pay_a_kl_that_began_at_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int | None
) -> None:
    raising = {"raise_kl": {"min_coefficient": 0.3}, "max_roll_backs": 2}
    run = GuardedRun(tmp_path / "run", settings_of(["roll_back", "raise_kl"], coefficient=0.0, **raising), monkeypatch)
    if killed_in:
        with pytest.raises(Killed, match="here"):
            run.process(killed_in)
    run.process()
    lines = files.read_json_lines(run.directory / "metrics.jsonl")
    taken = list(dict.fromkeys((line["step"], line["kl_coefficient"]) for line in lines))
    assert taken[:3] == [(1, 0.0), (2, 0.0), (3, 0.6)]  # of step 3 the last attempt
    factors = [event["multipliers"]["kl"] for event in run.events if event["event"] == "roll_back"]
    assert [run.settings.raised_kl(0.0, factor) for factor in factors] == [0.3, 0.6]


def test_a_roll_back_moves_newer_checkpoints_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2])
    run.process()
    assert [event["step"] for event in run.events if event["event"] == "roll_back"] == [3]
    names = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert names == ["rolled-back-step-000004", "step-000003", "step-000006"]
    assert [step for step, *_ in run.multipliers] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    checkpoint.check_known(run.directory)


def test_a_roll_back_leaves_no_evaluation_of_the_steps_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2])
    with pytest.raises(Killed, match="here"):
        run.process(7)  # steps 1 to 6, back to 3, and killed in step 4
    assert [row["step"] for row in evaluations.frontier(run.directory)] == [0, 3]
    names = [
        sorted(path.name for path in (folder / "evaluations").iterdir())
        for folder in (run.directory, run.directory / files.ASIDE)
    ]
    assert names == [["step-000000.arrow", "step-000003.arrow"], ["step-000006.arrow"]]
    run.process()
    assert [row["step"] for row in evaluations.frontier(run.directory)] == [0, 3, 6]


def test_what_a_dying_buffer_stores_after_the_roll_back_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows for step 5 of weights that were given up, stored when all else was moved aside."""
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2])
    late = rollouts.referenced(rollouts.generated(rollouts.prompts([8]), version=4))
    late = rollouts.scored(late, [99.0, 99.0], {"gold": [0.0, 0.0]})
    undo = manifest.undo

    def store(directory: Path, last_step: int) -> None:
        undo(directory, last_step)
        if last_step == 3:
            segments.write(directory, segments.Segment([8], late, {8: {}}, {}))

    monkeypatch.setattr("keel.online.train.manifest.undo", store)
    run.process()
    trained = schema.from_bytes((run.directory / "rollouts" / "step-000005.arrow").read_bytes())
    assert trained.column("ticket").to_pylist() == [8, 8, 9, 9]
    assert max(trained.column("reward").to_pylist()) < 5
    assert {segments.read(path).roll_backs for path in segments.paths(run.directory)} <= {1}


def test_steps_made_again_after_a_roll_back_end_a_row_of_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    checkpoints, failures = {"every_steps": 1}, {"max_rebuilds": 1}
    settings = settings.model_copy(
        update={
            "checkpoint": settings.checkpoint.model_copy(update=checkpoints),
            "failures": settings.failures.model_copy(update=failures),
        }
    )
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2])
    run.learner_lost_in = {8, 10}  # of the steps begun: 1 to 6, back to 3, 4, lost in 5, 5, lost in 6, 6
    assert run.process().version == 6
    assert [step for step, *_ in run.multipliers] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert [event["event"] for event in run.events if event["event"] in ("rebuild", "roll_back")] == [
        "roll_back",
        "rebuild",
        "rebuild",
    ]


def test_a_roll_back_to_the_start_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(["roll_back", "raise_kl"], max_roll_backs=1)
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.9, *GOLD[1:]])
    assert run.process().version == 1
    assert run.multipliers == [(1, 1, 1), (1, 2, 1)]


@pytest.mark.parametrize("done", ["nothing", "put aside", "all"])
def test_a_kill_within_a_roll_back_neither_loses_nor_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    gold = [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2]
    whole, killed = (GuardedRun(tmp_path / name, settings, monkeypatch, gold) for name in ("whole", "killed"))
    whole.process()
    with monkeypatch.context() as patch:
        if done == "all":
            patch.setattr("keel.online.train.manifest.undo", lambda *_: (_ for _ in ()).throw(Killed("here")))
        elif done == "put aside":
            patch.setattr(roll_back.segments, "paths", lambda _: (_ for _ in ()).throw(Killed("here")))
        else:
            patch.setattr(roll_back.checkpoint, "put_aside", lambda *_: (_ for _ in ()).throw(Killed("here")))
        with pytest.raises(Killed, match="here"):
            killed.process()
    saved: Saved = killed.process()
    assert saved.version == 6 and checkpoint.steps(killed.directory) == checkpoint.steps(whole.directory)
    assert killed.state(6)["guard"] == whole.state(6)["guard"]
    assert killed.state(6)["totals"]["guard_fired_total"] == whole.state(6)["totals"]["guard_fired_total"]
    assert killed.multipliers == whole.multipliers
