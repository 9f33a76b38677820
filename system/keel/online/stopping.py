"""Asks a run in a directory here to end, and waits until it has.

stop --> control actor --> the run, within a second --> the step under way, a checkpoint, the end of its process
"""

import time
from pathlib import Path
from typing import Any

from keel import files
from keel.config import loader
from keel.errors import ConfigError, KeelError
from keel.observability.console import errors
from keel.online import status

_HEARD_SECONDS = 60.0
_STARTS_SECONDS = 600.0
"""Until a run that starts can hear: it reads its newest checkpoint and joins Ray before."""
_POLL_SECONDS = 0.5


class NotStopped(KeelError, RuntimeError):
    """A run has not ended within its own deadlines after it was asked to, or broke off instead."""


def stop(directory: Path) -> dict[str, Any]:
    """Where the run stands when it has ended. Raises ConfigError where none is alive, NotStopped."""
    found = _alive(directory)
    by = loader.load(loader.stored_config(directory, f"RUN_DIR={directory}")).deadlines
    _ask(directory)
    patience = by.generate_seconds + by.score_seconds + 2 * by.step_seconds + _HEARD_SECONDS
    deadline = time.monotonic() + patience
    with errors.status(f"step {found['step']}: waiting for the step under way and a checkpoint"):
        while files.held(directory):
            if time.monotonic() > deadline:
                raise NotStopped(f"{directory}: goes on {patience:.0f} s after it was asked to stop")
            time.sleep(_POLL_SECONDS)
    ended = status.of(directory)
    if ended["state"] == "broken off":
        raise NotStopped(f"{directory}: {status.sentence(ended)}")
    return ended


def _alive(directory: Path) -> dict[str, Any]:
    found = status.of(directory)
    if found["state"] != "live":
        raise ConfigError(f"RUN={directory}: {status.sentence(found)}; expected a live run")
    if found["command"] != "train":
        raise ConfigError(
            f"RUN={directory}: keel {found['command']} stops by SIGTERM, as a job by --now; expected an online run"
        )
    return found


def _ask(directory: Path) -> None:
    """Until it is heard: a run that starts has no control actor yet."""
    deadline = time.monotonic() + _STARTS_SECONDS
    while True:
        try:
            where = status.control_of(directory)
            status.authenticate_as(where)
            from keel.cluster import control

            control.ask_to_stop(directory, where)
            return
        except ConfigError as error:
            if type(error) is not ConfigError:  # trying again helps nothing
                raise
            if not files.held(directory):  # it has ended by itself
                return
            if time.monotonic() > deadline:
                raise NotStopped(f"{directory}: has not answered for {_STARTS_SECONDS:.0f} s ({error})") from None
            time.sleep(_POLL_SECONDS)
