"""Where a run stands, from the files of its directory alone: no model, no Ray, answered at once."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel import checkpoint, files, reads
from keel.config import loader
from keel.config.commands import command_of
from keel.errors import ConfigError


def of(directory: Path) -> dict[str, Any]:
    """State, step of steps, reward, KL, workers wanted and present, last event. Raises ConfigError for no run.

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
        "reward": last.get("reward"),
        "kl_nats": last.get("kl_nats"),
        "wanted": counts.get("desired", {}),
        "present": counts.get("actual", {}),
        "event": event,
    }


def sentence(found: dict[str, Any]) -> str:
    """The state in words, with what to do about it."""
    place = f"step {found['step']}" + (f" of {found['steps']}" if found["steps"] is not None else "")
    if found["state"] == "live":
        return f"live, at {place}"
    if found["state"] == "ended":
        return f"ended at {place}"
    what = "stopped, as asked, at" if found["state"] == "stopped" else "not running, broken off at"
    return f"{what} {place}; go on with: keel resume {found['directory']}"


def control_of(directory: Path) -> dict[str, str]:
    """How the control actor of a run is reached: its control.json. Raises ConfigError when there is none."""
    path = directory / "control.json"
    if not path.is_file():
        raise ConfigError(f"RUN_DIR={directory}: no control.json in it; expected the directory of a live run")
    return json.loads(path.read_text(encoding="utf8"))


def authenticate_as(where: Mapping[str, str]) -> None:
    """Let this process authenticate as the Ray of a run does, by its control.json: before it imports Ray."""
    os.environ.setdefault("RAY_AUTH_MODE", where["authentication"])


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
