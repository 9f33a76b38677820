"""The state of a run, from the files of its directory alone; and the request to stop it.

status: config.yaml, metrics.jsonl, events.jsonl, checkpoints -> one mapping: no model, no Ray, at once
stop:   control actor --> the run, within a second --> the step under way, a checkpoint, the end of its process
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel import checkpoint, files, reads
from keel.config import loader
from keel.config.commands import command_of
from keel.errors import ConfigError, KeelError
from keel.observability.console import errors

_ANSWER_SECONDS = 60.0
_STARTS_SECONDS = 600.0
"""A run that starts answers only after it has read its newest checkpoint and joined Ray."""
_POLL_SECONDS = 0.5


class NotStopped(KeelError, RuntimeError):
    """A run has not ended within its own deadlines after it was asked to, or broke off instead."""


def of(directory: Path) -> dict[str, Any]:
    """State, step of steps, best checkpoint, reward, KL, workers wanted and present, last event. Raises ConfigError.

    `state`: live (a process works on it), ended, stopped (as it was asked to) or broken off; a number that the run has
    not written is null.
    """
    tree = loader.read(loader.stored_config(directory, f"RUN_DIR={directory}", any_version=True))
    if not isinstance(tree.get("run"), dict) or "name" not in tree["run"]:
        raise ConfigError(f"RUN_DIR={directory}: its config.yaml is no run's own; expected the directory of a run")
    command = command_of(tree)
    steps = tree["run"].get("steps") if command == "train" else None
    lines = files.read_json_lines(directory / "metrics.jsonl")
    events = files.read_json_lines(directory / "events.jsonl")
    last, event = lines[-1] if lines else {}, events[-1] if events else None
    committed = checkpoint.steps(directory)
    counts = _counts(directory)
    return {
        "run": tree["run"]["name"],
        "command": command,
        "directory": str(directory),
        "state": _state(directory, steps, committed, event),
        "step": last.get("step", 0),
        "steps": steps,
        "checkpoint": committed[-1] if committed else None,
        "best": checkpoint.best(directory),
        "reward": last.get("reward"),
        "kl_nats": last.get("kl_nats"),
        "wanted": counts.get("desired", {}),
        "present": counts.get("actual", {}),
        "event": event,
    }


def sentence(state: dict[str, Any]) -> str:
    """The state in words, with the command that continues a run which is not over."""
    place = f"step {state['step']}" + (f" of {state['steps']}" if state["steps"] is not None else "")
    if state["state"] == "live":
        return f"live, at {place}"
    if state["state"] == "ended":
        return f"ended at {place}"
    what = "stopped, as asked, at" if state["state"] == "stopped" else "not running, broken off at"
    return f"{what} {place}; go on with: keel resume {state['directory']}"


def control_of(directory: Path) -> dict[str, str]:
    """Read control.json: how the control actor of a run is reached. Raises ConfigError when there is none."""
    path = directory / "control.json"
    if not path.is_file():
        raise ConfigError(f"RUN_DIR={directory}: no control.json in it; expected the directory of a live run")
    return json.loads(path.read_text(encoding="utf8"))


def authenticate_as(where: Mapping[str, str]) -> None:
    """Choose the authentication of a run's Ray, by its control.json; call before this process imports Ray."""
    os.environ.setdefault("RAY_AUTH_MODE", where["authentication"])


def stop(directory: Path) -> dict[str, Any]:
    """Ask a live run to stop, wait for its end and return its state. Raises ConfigError, NotStopped."""
    state = _live(directory)
    deadlines = loader.load(loader.stored_config(directory, f"RUN_DIR={directory}")).deadlines
    _ask(directory)
    patience = deadlines.generate_seconds + deadlines.score_seconds + 2 * deadlines.step_seconds + _ANSWER_SECONDS
    deadline = time.monotonic() + patience
    with errors.status(f"step {state['step']}: waiting for the step under way and a checkpoint"):
        while files.held(directory):
            if time.monotonic() > deadline:
                raise NotStopped(f"{directory}: still runs {patience:.0f} s after it was asked to stop")
            time.sleep(_POLL_SECONDS)
    ended = of(directory)
    if ended["state"] == "broken off":
        raise NotStopped(f"{directory}: {sentence(ended)}")
    return ended


def _live(directory: Path) -> dict[str, Any]:
    state = of(directory)
    if state["state"] != "live":
        raise ConfigError(f"RUN={directory}: {sentence(state)}; expected a live run")
    if state["command"] != "train":
        raise ConfigError(
            f"RUN={directory}: keel {state['command']} stops by SIGTERM, as a job by --now; expected an online run"
        )
    return state


def _ask(directory: Path) -> None:
    """Repeat the request until it is answered: a run that starts has no control actor yet."""
    deadline = time.monotonic() + _STARTS_SECONDS
    while True:
        try:
            where = control_of(directory)
            authenticate_as(where)
            from keel.cluster import control

            control.ask_to_stop(directory, where)
            return
        except ConfigError as error:
            if type(error) is not ConfigError:  # asking again would not help
                raise
            if not files.held(directory):  # it has ended by itself
                return
            if time.monotonic() > deadline:
                raise NotStopped(f"{directory}: has not answered for {_STARTS_SECONDS:.0f} s ({error})") from None
            time.sleep(_POLL_SECONDS)


def _state(directory: Path, steps: int | None, committed: list[int], event: dict[str, Any] | None) -> str:
    if files.held(directory):
        return "live"
    if (directory / "stage.json").is_file():
        return "ended"
    if committed and steps is not None:
        state = checkpoint.state_of(directory, committed[-1])
        if state["version"] >= steps or state["finished"]:
            return "ended"
    return "stopped" if event and event["event"] == "stopped" else "broken off"


def _counts(directory: Path) -> dict[str, Any]:
    path = directory / "scale.json"
    return reads.read_json(path) if path.is_file() else {}
