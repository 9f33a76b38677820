"""Runs as jobs of a Ray cluster, through the one address of its job server.

submit --> keel-NAME-HASH, -2, -3 ...   attempts at one run: a new one where the newest is over, else that one
ask    --> keel-ask-...                 a command of Keel on the cluster, beside the run, for what it prints
"""

import asyncio
import hashlib
import json
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
from ray.job_submission import JobDetails

from keel import __version__
from keel.cluster import bundle
from keel.cluster.job_server import Client, JobError
from keel.config.loader import INTERRUPTED
from keel.errors import ConfigError
from keel.text import last_line

LIMIT_BYTES = min(GCS_STORAGE_MAX_SIZE, DASHBOARD_CLIENT_MAX_SIZE)
"""The largest zip that Ray's store takes, and that its job server lets through to it."""
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_BEGIN_SECONDS = 120.0
_END_SECONDS = 60.0
_POLL_SECONDS = 0.5
_SILENCE_SECONDS = 30.0
_SEEN_SECONDS = 2.0  # the monitor looks every second
_BEGINS, _ENDS = "keel-answer", "keel-errors"


@dataclass(frozen=True)
class Submission:
    """A checked run on its way to a cluster."""

    run: str
    directory: str
    digest: str
    """The digest of the settings, as `loader.digest` makes it."""
    command: str
    """The command of Keel that runs config.yaml."""
    driver_cpus: float
    driver_resources: Mapping[str, float]

    def job(self, number: int) -> str:
        """The id of an attempt, from 1."""
        place = hashlib.sha256(self.directory.encode()).hexdigest()[:8]
        return f"keel-{self.run}-{place}" + (f"-{number}" if number > 1 else "")

    def metadata(self, number: int) -> dict[str, str]:
        return {
            "keel_run": self.run,
            "keel_directory": self.directory,
            "keel_digest": self.digest,
            "keel_command": self.command,
            "keel_attempt": str(number),
            "keel_version": __version__,
            "keel_driver_resources": json.dumps(dict(self.driver_resources)),
        }


@dataclass(frozen=True)
class Attempt:
    """One job of a run, as the cluster knows it."""

    job: str
    run: str
    directory: str
    digest: str
    number: int
    state: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED (also as `keel stop` ends it) or FAILED."""
    since: float
    """Unix seconds at which the job began, or ended."""
    message: str
    runtime_env: Mapping[str, Any]
    driver_resources: Mapping[str, float]

    @property
    def over(self) -> bool:
        return self.state in _OVER


def attempts(client: Client) -> list[Attempt]:
    """List the jobs of the cluster that `keel submit` made, oldest first."""
    jobs = [details for details in client.list_jobs() if "keel_run" in (details.metadata or {})]
    return sorted(map(_attempt, jobs), key=lambda attempt: (attempt.directory, attempt.number))


def find(client: Client, run: str, number: int | None = None) -> Attempt:
    """Find the newest attempt at a run, or one by its number or job id. Raises ConfigError."""
    known = attempts(client)
    matches = [one for one in known if run in (one.job, one.run) and number in (None, one.number)]
    if not matches:
        names = ", ".join(sorted({attempt.run for attempt in known})) or "none"
        what = f"attempt {number} at it" if number else "run of that name and no such job"
        raise ConfigError(f"RUN={run}: the cluster has no {what}; expected one of its runs ({names})")
    if len({attempt.directory for attempt in matches}) > 1:
        jobs = ", ".join(attempt.job for attempt in matches)
        raise ConfigError(f"RUN={run}: several runs have that name; expected the id of a job: {jobs}")
    return matches[-1]


def submit(client: Client, submission: Submission, archive: Path) -> tuple[Attempt, bool]:
    """Start an attempt, or attach to the one that runs; whether it is new. Raises ConfigError for other settings.

    Of two submissions at once the cluster takes one; the other attaches to its job.
    """
    place = (submission.run, submission.directory)
    earlier = [one for one in attempts(client) if (one.run, one.directory) == place]
    if earlier and not earlier[-1].over:
        return _attach(earlier[-1], submission), False
    number = earlier[-1].number + 1 if earlier else 1
    job = submission.job(number)
    try:
        client.submit_job(
            entrypoint=f"python -m keel {submission.command} config.yaml",
            submission_id=job,
            runtime_env={"working_dir": str(archive)},
            metadata=submission.metadata(number),
            entrypoint_num_cpus=submission.driver_cpus or None,
            entrypoint_resources=dict(submission.driver_resources) or None,
        )
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise JobError(f"{job}: {last_line(str(error))}") from None
        return _attach(_attempt(client.get_job_info(job)), submission), False
    return _attempt(client.get_job_info(job)), True


def _attach(running: Attempt, submission: Submission) -> Attempt:
    if running.digest != submission.digest:
        raise ConfigError(
            f"run.name={submission.run}: runs with other settings as {running.job}; expected those, or another run.name"
        )
    return running


def stop_now(client: Client, attempt: Attempt) -> Attempt:
    """Send SIGTERM, and a few seconds later SIGKILL, to the driver and wait for its end. Raises JobError."""
    client.stop_job(attempt.job)
    return ended(client, attempt.job)


def ended(client: Client, job: str) -> Attempt:
    """Wait for the end of an attempt that is about to end. Raises JobError when it does not."""
    return _attempt(_end_of(client, job, _END_SECONDS))


def follow(client: Client, job: str, say: Callable[[str], None]) -> Attempt:
    """Print what the job writes until it is over; return the attempt. Raises JobError when the connection breaks."""

    async def tail() -> None:
        lines = aiter(client.tail_job_logs(job))
        coming = asyncio.ensure_future(anext(lines, None))
        while True:
            if not (await asyncio.wait([coming], timeout=_SILENCE_SECONDS))[0]:
                # the open connection has no deadline, and outlives a node without power
                if (await asyncio.to_thread(client.get_job_info, job)).status.value in _OVER:
                    return
            elif (text := await coming) is None:
                return
            else:
                say(text)
                coming = asyncio.ensure_future(anext(lines, None))

    try:
        asyncio.run(tail())
    except (RuntimeError, TimeoutError, aiohttp.ClientError) as error:
        raise JobError(f"{job}: {last_line(str(error))}; the job continues") from None
    return ended(client, job)


def on_cluster(client: Client, attempt: Attempt, arguments: Sequence[str], seconds: float = 120.0) -> str:
    """Run `keel ARGUMENTS` on the cluster, beside the run directory of an attempt, and return what it prints.

    A job of its own beside the run, with the run's files while it is alive (of a job that is over Ray may have thrown
    them away: then with this Keel), deleted in the end. Raises ConfigError for what the command refuses, JobError for
    a command that fails, does not begin, or has not ended after `seconds`.
    """
    job = f"keel-ask-{uuid.uuid4().hex[:12]}"
    command = shlex.join(["python", "-m", "keel", *arguments])
    # Only at its end does it write to the log: at its beginning Ray does, at any moment
    begin = f"folder=$(mktemp -d); trap 'rm -r $folder' EXIT; {command} >$folder/answer 2>$folder/errors; code=$?"
    asked = f"{begin}; echo {_BEGINS}; cat $folder/answer; echo {_ENDS}; cat $folder/errors; exit $code"
    try:
        with tempfile.TemporaryDirectory() as folder:
            client.submit_job(
                entrypoint=asked,
                submission_id=job,
                runtime_env={"working_dir": _package(Path(folder))} if attempt.over else dict(attempt.runtime_env),
                entrypoint_resources=dict.fromkeys(attempt.driver_resources, 0.001) or None,  # the driver's node
            )
        details = _end_of(client, job, seconds)
        text = client.get_job_logs(job)
    finally:
        _forget(client, job)
    answer, ends, complaint = text.partition(f"\n{_BEGINS}\n")[2].partition(f"{_ENDS}\n")
    if details.driver_exit_code == 2:
        raise ConfigError(last_line(complaint).removeprefix("keel: "))
    if details.status.value != "SUCCEEDED" or not ends:
        raise JobError(f"{command}: {last_line(complaint or details.message or '')}")
    return answer


def _end_of(client: Client, job: str, seconds: float) -> JobDetails:
    """Wait for the end of a job. Raises JobError when it has not ended after `seconds`, or has not begun in time."""
    began = time.monotonic()
    while (details := client.get_job_info(job)).status.value not in _OVER:
        state, waited = details.status.value, time.monotonic() - began
        if waited > (min(seconds, _BEGIN_SECONDS) if state == "PENDING" else seconds):
            raise JobError(f"{job}: still {state} after {waited:.0f} s: {last_line(details.message or '')}")
        time.sleep(_POLL_SECONDS)
    return details


def _forget(client: Client, job: str) -> None:
    """Delete a job once it is over: Ray refuses before, and its monitor restores a record whose end it has not seen."""
    if job not in {details.submission_id for details in client.list_jobs()}:  # not taken
        return
    if client.get_job_info(job).status.value not in _OVER:
        client.stop_job(job)
        _end_of(client, job, _END_SECONDS)
    time.sleep(_SEEN_SECONDS)
    client.delete_job(job)


def _package(folder: Path) -> str:
    """Write Keel alone as a zip; its path."""
    archive = folder / "keel.zip"
    bundle.Bundle({}, [bundle.package()], []).write(archive, "", LIMIT_BYTES)
    return str(archive)


def _attempt(details: JobDetails) -> Attempt:
    metadata, state = details.metadata or {}, details.status.value
    stopped = state == "FAILED" and details.driver_exit_code == INTERRUPTED
    return Attempt(
        job=details.submission_id or "",
        run=metadata["keel_run"],
        directory=metadata["keel_directory"],
        digest=metadata["keel_digest"],
        number=int(metadata["keel_attempt"]),
        state="STOPPED" if stopped else state,
        since=(details.end_time or details.start_time or 0) / 1000,
        message=last_line(details.message or ""),
        runtime_env=details.runtime_env or {},
        driver_resources=json.loads(metadata["keel_driver_resources"]),
    )
