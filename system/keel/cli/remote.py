"""Runs on another machine: the address of their job server, and the answers of commands that run there."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from keel.errors import ConfigError

_ADDRESS = "of Ray's dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if it is such"
Address = Annotated[str | None, typer.Option(help=_ADDRESS)]


def job_server_of(run: str, address: str | None) -> str | None:
    """The address of the job server to ask about a run; None: the run is a directory here. Raises ConfigError."""
    if address is None and Path(run).is_dir():
        return None
    if server := _address(address):
        return server
    raise ConfigError(f"RUN={run}: no such directory; expected a run directory, or --address and a run of that cluster")


def required_address(address: str | None) -> str:
    """The address of the job server. Raises ConfigError where there is none."""
    if server := _address(address):
        return server
    raise ConfigError("--address: missing; expected that of Ray's dashboard, such as http://HOST:8265")


def _address(given: str | None) -> str | None:
    """The address given, or that of the environment, as `ray job` takes it."""
    variables = [os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    return given or next((address for address in variables if address.startswith("http")), None)


def answer_of(address: str, run: str, command: str, *options: str) -> dict[str, Any]:
    """The JSON answer of a command about a run, given on the cluster that the run is on."""
    from keel.cluster import job_server, jobs

    with job_server.cluster(address) as client:
        attempt = jobs.find(client, run)
        return json.loads(jobs.on_cluster(client, attempt, [command, attempt.directory, *options, "--json"]))
