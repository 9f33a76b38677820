"""The job server of a Ray cluster: found and checked by its address, asked with deadlines."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from keel.errors import ConfigError, KeelError
from keel.observability.console import errors
from keel.text import last_line

_CONNECT_SECONDS = 30.0
_ANSWER_SECONDS = 120.0
_UPLOAD_SECONDS = 3600.0
_AGENT_SECONDS = 120.0
_POLL_SECONDS = 1.0
_NO_AGENT = "No available agent to submit job"
_WHY_NONE = (
    "another Ray on the head's machine may have had its agent's port, 52365, when the head was started; expected"
    " ray start --head with another --dashboard-agent-listen-port"
)


class JobError(KeelError, RuntimeError):
    """A job, or a command on the cluster, failed or did not end in time."""


class Client(JobSubmissionClient):
    """Ray's client with deadlines; it waits for a head whose agent, which starts jobs, is not up yet."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        # urllib3 sends all of a body within the time it has for connecting
        sending = _UPLOAD_SECONDS if options.get("data") else _CONNECT_SECONDS
        return super()._do_request(method, endpoint, timeout=(sending, _ANSWER_SECONDS), **options)

    def submit_job(self, **job: Any) -> str:  # type: ignore[override]  # by name alone
        """Submit a job; its id. Raises RuntimeError as Ray does, but without an agent only after two minutes."""
        began = time.monotonic()
        announced = False
        while True:
            try:
                return super().submit_job(**job)
            except RuntimeError as error:
                if _NO_AGENT not in str(error):
                    raise
                if time.monotonic() > began + _AGENT_SECONDS:
                    raise RuntimeError(f"{_NO_AGENT}: {_WHY_NONE}") from None
            if not announced:
                errors.print("waiting for the agent of the cluster's head, which starts jobs", soft_wrap=True)
                announced = True
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Client]:
    """Connect to the job server of a cluster. Raises ConfigError where there is none, or it wants a token.

    Raises JobError when it cannot be reached any more, or refuses what it is asked.
    """
    client = _connected(address)
    try:
        yield client
    except (requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
        raise JobError(f"{address}: no answer any more ({type(error).__name__}); what runs there continues") from None
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # Ray's client has no class of its own for an answer that is an error
            raise
        raise JobError(f"{address}: {last_line(str(error))}") from None


def _connected(address: str) -> Client:
    expected = "expected that of Ray's dashboard, such as http://HOST:8265"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address={address}: {expected}")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers it, and RAY_ADDRESS, to what its client is given
    try:
        requests.get(f"{address.rstrip('/')}/api/version", timeout=_CONNECT_SECONDS)  # less than for an answer
        client = Client(address)
        client.list_jobs()  # the version is public, the jobs need a token
    except AuthenticationError as error:
        reason = error.message.splitlines()[0]
        raise ConfigError(
            f"--address={address}: the cluster wants a token ({reason}); expected RAY_AUTH_MODE=token, and its token in"
            " RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from None
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.InvalidURL, ConnectionError) as error:
        reason = f"no answer from a job server ({type(error).__name__})"
        raise ConfigError(f"--address={address}: {reason}; {expected}") from None
    except (requests.RequestException, RuntimeError, ValueError, KeyError) as error:  # 404, no JSON, another service
        reason = f"is no job server of Ray ({last_line(str(error))})"
        raise ConfigError(f"--address={address}: {reason}; {expected}") from None
    return client
