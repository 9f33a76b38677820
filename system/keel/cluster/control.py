"""The control actor: the named Ray actor through which commands reach a live run.

keel scale, keel stop --> control.json (address, namespace, authentication) --> Control
                            the run reads the wanted counts from it once a second
"""

import asyncio
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayTaskError

from keel import files
from keel.cluster.worker import remote_method
from keel.config.run import Settings
from keel.errors import ConfigError, KeelError
from keel.text import one_line

AUTHENTICATION = "RAY_AUTH_MODE"
_ANSWER_SECONDS = 60.0
_MOST_WORKERS = 1024


class ScaleError(KeelError, ValueError):
    """Counts that a run cannot have."""


class AnotherRay(ConfigError):
    """The cluster of a run has another version of Ray or Python than this process."""


class Control:
    """Wanted and present workers by role. The run starts another one when it is lost."""

    def __init__(self, desired: Mapping[str, int], largest: Mapping[str, int]) -> None:
        """`largest`: the most workers of a role."""
        self._desired, self._largest = dict(desired), dict(largest)
        self._actual: dict[str, int] = {}
        self._stop = False

    def scale(self, wanted: Mapping[str, int]) -> dict[str, Any]:
        """Want these counts from now on. Raises ScaleError, changing nothing."""
        for role, count in wanted.items():
            if role not in self._desired:
                raise ScaleError(f"{role}={count}: the run has none; expected one of {', '.join(self._desired)}")
            largest = self._largest[role]
            if not 1 <= count <= largest:
                rows = ", the rows of a step" if role == "learner" else ""
                raise ScaleError(f"{role}={count}: expected 1 to {largest}{rows}")
        self._desired |= wanted
        return self.status()

    def stop(self) -> dict[str, Any]:
        """Want the run to end after the step under way."""
        self._stop = True
        return self.status()

    def status(self) -> dict[str, Any]:
        return {"desired": dict(self._desired), "actual": dict(self._actual)}

    def exchange(self, actual: Mapping[str, int]) -> tuple[dict[str, int], bool]:
        """Store the run's counts; return the wanted ones, and whether the run is to stop."""
        self._actual = dict(actual)
        return dict(self._desired), self._stop


class ControlLink:
    """The driver's end of the connection; it restarts a control actor that died, with the last counts it reported."""

    def __init__(self, settings: Settings, directory: Path, desired: Mapping[str, int]) -> None:
        self.desired = dict(desired)
        self.stopping = False
        """The run was asked to stop; kept here because an actor that is started again does not know."""
        rows = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt
        self._largest = {role: rows if role == "learner" else _MOST_WORKERS for role in desired}
        # of this process alone: the actor of one that was killed, which Ray has not missed yet, may have heard a stop
        self._name = f"keel-control-{uuid.uuid4().hex[:12]}"
        self._actor = self._start()
        context = ray.get_runtime_context()
        # an embedded Ray asks for a token, which a driver that joins by address offers only in this mode
        mode = os.environ.get(AUTHENTICATION, "disabled")
        where = {"address": context.gcs_address, "namespace": context.namespace, "actor": self._name}
        where["authentication"] = mode
        files.write_json(directory / "control.json", where)

    def _start(self) -> Any:
        remote = ray.remote(num_cpus=0)(Control).options(name=self._name, get_if_exists=True)
        return remote.remote(self.desired, self._largest)

    async def exchange(self, actual: Mapping[str, int]) -> None:
        """Read the wanted counts and the request to stop; both stay as they are when the actor does not answer."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                self.desired, stop = await remote_method(self._actor, Control.exchange).remote(dict(actual))
            self.stopping |= stop
        except (RayActorError, TimeoutError):
            self._actor = self._start()


def ask(run_directory: Path, where: Mapping[str, str], wanted: Mapping[str, int]) -> dict[str, Any]:
    """Scale a live run, or only ask where `wanted` is empty; desired and actual counts. Raises ConfigError.

    `where`: its control.json. Ray must have been imported with the authentication that it names.
    """
    return _ask(run_directory, where, lambda actor: remote_method(actor, Control.scale).remote(dict(wanted)))


def ask_to_stop(run_directory: Path, where: Mapping[str, str]) -> None:
    """Ask a live run to end after the step under way, without waiting for it. Raises ConfigError, as `ask`."""
    _ask(run_directory, where, lambda actor: remote_method(actor, Control.stop).remote())


def reach(address: str) -> None:
    """Raise OSError or ValueError where no process listens: Ray itself tries for minutes, then ends the process."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()


def _ask(run_directory: Path, where: Mapping[str, str], call: Callable[[Any], Any]) -> dict[str, Any]:
    silent = f"RUN_DIR={run_directory}: its run does not answer at {where['address']}; expected a live run"
    try:
        reach(where["address"])
        ray.init(where["address"], namespace=where["namespace"], log_to_driver=False, logging_level="CRITICAL")
        return ray.get(call(ray.get_actor(where["actor"])), timeout=_ANSWER_SECONDS)
    except ScaleError as error:
        raise ConfigError(str(error.cause if isinstance(error, RayTaskError) else error)) from None
    except AuthenticationError as error:
        raise ConfigError(f"{silent}, and Ray's token for it: {error.message.splitlines()[0]}") from None
    except (OSError, ValueError, RayActorError, GetTimeoutError):  # ValueError: no such actor
        raise ConfigError(silent) from None
    except RuntimeError as error:
        raise AnotherRay(f"RUN_DIR={run_directory}: its Ray cannot be joined ({one_line(error)})") from None
    finally:
        ray.shutdown()
