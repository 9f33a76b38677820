"""Return a run to its best checkpoint: asked for in one file, so that a kill neither loses nor repeats it.

    roll_back.json {pending: true}  ->  newer checkpoints and evaluations, and accepted rows, are moved aside
           {pending: false}         ->  the run starts from its newest checkpoint, as after a loss

The buffer of the steps given up may still be dying: what it stores later has the former number of roll backs, by which
the next buffer knows it (rollout/segments.py).

What the guard decided stays: the file's `carried` is laid over the state of every checkpoint up to its step. Later ones
have it in their own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel import checkpoint, files, reads
from keel.errors import KeelError
from keel.observability import evaluations
from keel.rollout import segments

_FILE = "roll_back.json"


class RollBack(KeelError, RuntimeError):
    """The guard wants the run to continue from an earlier step."""

    def __init__(self, step: int, carried: Mapping[str, Any]) -> None:
        super().__init__(f"roll back to step {step}")
        self.step, self.carried = step, carried


def request(run_directory: Path, asked: RollBack, totals: Mapping[str, Any]) -> None:
    """Make the roll back certain. `totals`: counters that it does not undo."""
    order = {"pending": True, "step": asked.step, "carried": asked.carried, "totals": totals}
    files.write_json(run_directory / _FILE, order)


def carry_out(run_directory: Path) -> None:
    """Move aside what was made after the step of a pending request: checkpoints, evaluations, accepted rows."""
    order = _order(run_directory)
    if order is None or not order["pending"]:
        return
    checkpoint.put_aside(run_directory, order["step"], checkpoint.ROLLED_BACK)
    evaluations.undo(run_directory, order["step"])
    for path in segments.paths(run_directory):
        files.move_aside(run_directory, path)
    files.write_json(run_directory / _FILE, {**order, "pending": False})


def laid_over(run_directory: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint ({}: of the start) with what the last roll back carries over it."""
    order = _order(run_directory)
    if order is None or state.get("version", 0) > order["step"]:
        return dict(state)
    guard = {**state.get("guard", {}), **order["carried"]}
    return {**state, "guard": guard, "totals": {**state.get("totals", {}), **order["totals"]}}


def _order(run_directory: Path) -> dict[str, Any] | None:
    path = run_directory / _FILE
    return reads.read_json(path) if reads.is_there(path) else None
