"""submit, status, logs and stop: a run as a job of a Ray cluster, or a run directory on this machine."""

import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from keel import checkpoint
from keel.cli.remote import Address, job_server_of, required_address
from keel.cli.run_commands import AsJson, Run
from keel.cluster import bundle
from keel.config import loader
from keel.config.commands import COMMANDS, command_of
from keel.errors import ConfigError
from keel.observability.console import console, errors
from keel.online import status as run_status

if TYPE_CHECKING:
    from keel.cluster.jobs import Attempt, Submission

Follow = Annotated[bool, typer.Option("--follow", help="show what the job writes until it ends")]


def submit(
    config_path: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; `keel schema` lists every setting")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings to change, as a.b=c", show_default=False)
    ] = None,
    address: Address = None,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Run a configuration as a job of a Ray cluster. A live run is not started twice; one that ended resumes."""
    submission, gathered, configuration = prepare(config_path, overrides or [], Path.cwd())
    where = required_address(address)
    from keel.cluster import job_server, jobs

    with job_server.cluster(where) as client, tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "bundle.zip"
        num_bytes = gathered.write(archive, configuration, jobs.LIMIT_BYTES)
        attempt, new = jobs.submit(client, submission, archive)
        if as_json:
            answer = {"new": new, "address": where, "cluster_paths": gathered.absolute}
            uploaded = {"uploaded_bytes": num_bytes if new else 0, "uploaded": [item.label for item in gathered.items]}
            typer.echo(json.dumps(_tree(attempt) | answer | uploaded, indent=2))
        else:
            _show_submitted(attempt, new, gathered, num_bytes, where)
        if follow:
            _follow(client, attempt, errors if as_json else console)


def prepare(config_path: str, overrides: list[str], here: Path) -> tuple["Submission", bundle.Bundle, str]:
    """A checked submission, what it uploads, and its config.yaml. Raises ConfigError."""
    tree = loader.read(config_path, overrides)
    if "stages" in tree:
        raise ConfigError(f"config {config_path}: a pipeline; expected the configuration of one command")
    command = command_of(tree)
    settings: Any = loader.load_as(COMMANDS[command], config_path, overrides)
    directory = settings.run_directory
    whole = settings.model_dump(mode="json")
    bundle.check_written(whole)
    whole["cluster"]["address"] = None  # a job joins the cluster that it runs on, whatever was meant for this machine
    gathered = bundle.gather(whole, here)
    staged = loader.parse_as(COMMANDS[command], gathered.tree)
    from keel.cluster.jobs import Submission

    cluster = settings.cluster
    submission = Submission(
        settings.run.name, directory, loader.digest(staged), command, cluster.driver_cpus, cluster.driver_resources
    )
    return submission, gathered, loader.dump(staged)


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="name or job of a run of the cluster")],
    address: Address = None,
    follow: Follow = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="which attempt; default: the newest")] = None,
) -> None:
    """Show what the job of a run wrote."""
    where = required_address(address)
    from keel.cluster import job_server, jobs

    with job_server.cluster(where) as client:
        chosen = jobs.find(client, run, attempt)
        if follow:
            _follow(client, chosen, console)
        else:
            _say(console)(client.get_job_logs(chosen.job))


def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="run directory, or name or job of a run; default: all jobs")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands, or which runs a cluster has."""
    if run is not None and (where := job_server_of(run, address)) is None:
        state = run_status.of(Path(run))
        typer.echo(json.dumps(state, indent=2)) if as_json else _show_status(state)
        return
    where = required_address(address)
    from keel.cluster import job_server, jobs

    with job_server.cluster(where) as client:
        if run is None:
            _show_attempts(jobs.attempts(client), as_json)
            return
        attempt = jobs.find(client, run)
        asked: dict[str, Any] | None = None
        reason = "its job is pending"
        if attempt.state != "PENDING":
            try:
                asked = json.loads(jobs.on_cluster(client, attempt, ["status", attempt.directory, "--json"]))
            except ConfigError as error:  # of a run that has written nothing yet
                reason = str(error)
    if as_json:
        typer.echo(json.dumps({"job": _tree(attempt), "run": asked}, indent=2))
        return
    _show_attempts([attempt], as_json)
    if asked is None:
        console.print(f"Run      no numbers: {reason}", soft_wrap=True)
    else:
        _show_status(asked)


def stop(
    run: Run,
    address: Address = None,
    now: Annotated[bool, typer.Option("--now", help="end its job without the step under way and a checkpoint")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a run finish the step under way, write a checkpoint and end; wait for that."""
    where = job_server_of(run, address)
    if now:
        _stop_now(where, run, as_json)
        return
    state = _stop_remote(where, run) if where else run_status.stop(Path(run))
    if as_json:
        typer.echo(json.dumps(state, indent=2))
    else:
        console.print(run_status.sentence(state), soft_wrap=True)


def _stop_now(address: str | None, run: str, as_json: bool) -> None:
    if address is None:
        raise ConfigError("--now: ends a job of a cluster; expected --address, or SIGTERM to the process here")
    from keel.cluster import job_server, jobs

    with job_server.cluster(address) as client:
        attempt = jobs.stop_now(client, _alive(jobs.find(client, run), run))
    if as_json:
        typer.echo(json.dumps(_tree(attempt), indent=2))
    else:
        console.print(f"{attempt.job} {attempt.state}; keel submit resumes from the newest checkpoint", soft_wrap=True)


def _stop_remote(address: str, run: str) -> dict[str, Any]:
    from keel.cluster import job_server, jobs

    with job_server.cluster(address) as client:
        attempt = _alive(jobs.find(client, run), run)
        if attempt.state == "PENDING":
            raise ConfigError(f"RUN={run}: {attempt.job} is still pending; expected a run that has begun, or --now")
        with errors.status(f"{attempt.job}: waiting for the step under way and a checkpoint"):
            asked = ["stop", attempt.directory, "--json"]
            try:
                answer = jobs.on_cluster(client, attempt, asked, seconds=float("inf"))  # it has the run's own deadlines
            except ConfigError as error:  # it has not come to its run directory yet, or is a stage
                raise ConfigError(f"{error}; or --now, which ends {attempt.job} as it is") from None
            jobs.ended(client, attempt.job)
    return json.loads(answer) | {"job": attempt.job}


def _alive(attempt: "Attempt", run: str) -> "Attempt":
    if attempt.over:
        raise ConfigError(f"RUN={run}: {attempt.job} is over ({attempt.state}); expected a live run")
    return attempt


def _follow(client: Any, attempt: "Attempt", to: Any) -> None:
    """Raises JobError for a job that did not succeed; an interrupt ends only the watching."""
    from keel.cluster import job_server, jobs

    try:
        ended = jobs.follow(client, attempt.job, _say(to))
    except KeyboardInterrupt:
        to.print(f"{attempt.job} keeps running; keel stop {attempt.run} would end it", soft_wrap=True)
        return
    if ended.state != "SUCCEEDED":
        raise job_server.JobError(f"{ended.job} {ended.state}: {ended.message}")


def _say(to: Any) -> Callable[[str], None]:
    return lambda text: to.print(text, end="", soft_wrap=True, highlight=False)


def _tree(attempt: "Attempt") -> dict[str, Any]:
    names = ("job", "run", "number", "state", "since", "directory", "digest")
    return {"attempt" if name == "number" else name: vars(attempt)[name] for name in names}


def _show_attempts(attempts: "list[Attempt]", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"jobs": [_tree(attempt) for attempt in attempts]}, indent=2))
        return
    table = Table("run", "attempt", "state", "since", "directory", "job")
    for column in table.columns:
        column.overflow = "fold"
    for attempt in attempts:
        since = datetime.fromtimestamp(attempt.since).isoformat(" ", "seconds")
        table.add_row(attempt.run, str(attempt.number), attempt.state, since, attempt.directory, attempt.job)
    console.print(table)


def _show_status(state: dict[str, Any]) -> None:
    for title, text in _lines(state):
        console.print(Text(f"{title:<9}{text}"), soft_wrap=True)


def _lines(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Run", f"{state['run']}: {run_status.sentence(state)}"
    if state["reward"] is not None:
        kl = state["kl_nats"]
        yield "Step", f"reward {state['reward']:+.3f}" + (f", KL {kl:.3f} nats" if kl is not None else "")
    if best := state.get("best"):  # not of a run by an older version
        yield "Best", checkpoint.best_line(best)
    if wanted := state["wanted"]:
        pairs = [f"{role} {state['present'].get(role, 0)} of {count}" for role, count in wanted.items()]
        yield "Workers", ", ".join(pairs)
    if event := state["event"]:
        when = datetime.fromtimestamp(event["time"]).isoformat(" ", "seconds")
        yield "Event", f"{event['event']} at {when}"


def _show_submitted(attempt: "Attempt", new: bool, gathered: bundle.Bundle, num_bytes: int, address: str) -> None:
    done = f"Submitted {attempt.job}" if new else f"Attached  {attempt.job} ({attempt.state}): the run is alive"
    lines = [f"{done}, attempt {attempt.number}", f"Directory {attempt.directory}"]
    if new:
        lines.append(f"Uploaded  {bundle.megabytes(num_bytes)}: {', '.join(item.label for item in gathered.items)}")
    if gathered.absolute:
        lines.append(f"As it is  {', '.join(gathered.absolute)} (absolute: expected on the cluster, not uploaded)")
    lines.append(f"Next      keel logs {attempt.run} --address {address} --follow; also keel status, keel stop")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
