"""What is done to a run from outside, and leaves it the run that it was: ends, doubles, another number of ranks."""

import signal
from pathlib import Path
from typing import Any

import pytest

from commands import finish
from keel import schema
from live import Start, answer, check_intact, end, events_of, last_step, more_steps, ranks_of, refusal, wait
from test_runs import metrics_of

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
CURVE_STEPS = 60
LOSS_TOLERANCE = 1e-5


def test_an_ended_and_a_scaled_run_are_the_run_that_nothing_happened_to(
    write_config: Start, keel: Start, tmp_path: Path, pace: Path
) -> None:
    """One run is doubled, terminated and interrupted twice; another goes from one rank to two and back. Samples are
    those of the weights (max_staleness 0), so their losses and rewards agree as far as their weights do."""
    changes = {
        "rewards": [{"name": "low", "source": "rewards:paced"}],
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 0},
        "scorers": {"threads": 1},
    }
    runs = {name: tmp_path / name / "run" for name in ("ended", "scaled")}
    blocks = {
        name: {**changes, "run": {"name": "same", "steps": CURVE_STEPS, "directory": str(run)}}
        for name, run in runs.items()
    }
    pace.write_text("1.0")
    check_ends_leave_a_run_that_goes_on(keel, str(write_config("ended", **blocks["ended"])), runs["ended"], pace)

    run = runs["scaled"]
    pace.write_text("1.5")
    process = keel("train", str(write_config("scaled", **blocks["scaled"])))
    wait(process, lambda: last_step(run) >= 2, "two steps")
    for ranks in ([1, 2], [1, 2, 1]):
        answer(keel, "scale", run, "--learners", ranks[-1])
        wait(process, lambda ranks=ranks: ranks_of(run) == ranks, f"ranks {ranks}")
        more_steps(process, run)
    pace.unlink()
    code, _, err = finish(process)
    assert code == 0, err
    check_intact(keel, run)
    check_same_curve(runs["scaled"], runs["ended"])


def check_ends_leave_a_run_that_goes_on(keel: Start, config: str, run: Path, pace: Path) -> None:
    process = keel("train", config)
    wait(process, lambda: last_step(run) >= 3, "three steps")
    taken = f"run.directory={run}: another process works on it"
    assert taken in refusal(keel, "resume", run) and taken in refusal(keel, "train", config)
    more_steps(process, run, 1)  # unharmed
    end(process, signal.SIGTERM)
    for signals in ([signal.SIGINT, signal.SIGINT], []):
        before = last_step(run)
        process = keel("resume", str(run))
        wait(process, lambda before=before: last_step(run) > before, f"a step after {before}")
        if signals:
            end(process, *signals)
    pace.unlink()
    code, _, err = finish(process)
    assert code == 0, err
    check_intact(keel, run)


def check_same_curve(scaled: Path, whole: Path) -> None:
    """Steps of equal samples have equal rewards and, but for the order of sums over ranks, equal losses.

    Two ranks add the same fp32 gradients in another order: some parts in 1e7 of each sum, which Adam's division makes
    some parts in 1e4 of an update at most where a gradient is hardly more than its rounding. Samples are equal until
    that tips a draw; from there on the runs are two samples of one curve, and nothing is compared.
    """
    ours, theirs = (metrics_of(run) for run in (scaled, whole))
    assert len(ours) == len(theirs) == CURVE_STEPS
    same = [
        one["step"]
        for one, other in zip(ours, theirs, strict=True)
        if samples_of(scaled, one) == samples_of(whole, other)
    ]
    changed = [event["step"] for event in events_of(scaled, "running")][1:]
    worst = max(abs(ours[step - 1]["loss"] - theirs[step - 1]["loss"]) for step in same)
    print(
        f"ranks changed at {changed}; equal samples in {len(same)} of {CURVE_STEPS} steps; losses differ by {worst:.1e}"
    )
    assert same[: changed[1] + 1] == list(range(1, changed[1] + 2)), same  # also the first step after the last change
    for step in same:
        one, other = ours[step - 1], theirs[step - 1]
        assert one["reward"] == other["reward"], step
        assert one["loss"] == pytest.approx(other["loss"], abs=LOSS_TOLERANCE), step


def samples_of(run: Path, line: dict[str, Any]) -> list[list[int]]:
    batch = schema.from_bytes((run / "rollouts" / f"step-{line['step']:06d}.arrow").read_bytes())
    return batch.column("completion_tokens").to_pylist()
