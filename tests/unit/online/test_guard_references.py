"""The guard of a run whose reference is renewed: nothing is compared over a renewal, also after a kill."""

from pathlib import Path

import pytest

import fakes
from guarded_runs import GuardedRun, Killed
from keel.config.run import Settings


def settings_of(steps: int) -> Settings:
    """A new reference every three steps, an evaluation every two, a checkpoint at each."""
    return fakes.settings_for(
        steps=steps,
        evaluation={"every_steps": 2},
        checkpoint={"every_steps": 1, "keep": 9},
        reference={"ref_policy": "previous", "iteration_steps": 3},
        guard={"window_steps": 4, "min_rows": fakes.HELD_OUT},
    )


def run_of(directory: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 6) -> GuardedRun:
    run = GuardedRun(directory, settings_of(steps), monkeypatch)
    run.metrics = lambda version: {"kl_nats": 4.0 * version, "length_tokens": 40.0, "grad_norm": 1.0}
    return run


def test_series_against_the_reference_begin_again_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "run", monkeypatch)
    run.process()
    guard = {step: run.state(step)["guard"] for step in range(1, 7)}
    kl = {step: pytest.approx(state["steps"]["kl"]) for step, state in guard.items()}
    assert kl == {1: [0.1], 2: [0.1, 0.2], 3: [], 4: [0.4], 5: [0.4, 0.5], 6: [0.4, 0.5, 0.6]}  # not at the last step
    assert [guard[step]["band"] is None for step in range(1, 7)] == [False, False, True, False, False, False]
    assert [guard[step]["outside"][1] for step in range(1, 7)] == [3, 3, 0, 3, 3, 3]
    assert len(guard[6]["steps"]["grad_norm"]) == 6


@pytest.mark.parametrize("killed_in", [1, 3, 4, 5])
def test_a_killed_run_begins_the_same_series_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int
) -> None:
    whole, killed = (run_of(tmp_path / name, monkeypatch) for name in ("whole", "killed"))
    whole.process()
    with pytest.raises(Killed, match="here"):
        killed.process(killed_in)
    killed.process()
    assert killed.state(6)["guard"] == whole.state(6)["guard"]


@pytest.mark.parametrize("killed_in", [None, 1])
def test_a_run_that_is_extended_where_an_iteration_ends_begins_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int | None
) -> None:
    """Also when the first process of the extension ends between the new reference and the next checkpoint."""
    run = run_of(tmp_path / "run", monkeypatch, steps=3)
    run.process()
    assert run.state(3)["guard"]["steps"]["kl"] == pytest.approx([0.1, 0.2, 0.3])
    run.settings = settings_of(steps=4)
    if killed_in:
        with pytest.raises(Killed, match="here"):
            run.process(killed_in)
    run.process()
    assert run.state(4)["guard"]["steps"]["kl"] == pytest.approx([0.4])
