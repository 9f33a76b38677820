"""Commands on a run that exists; main.py registers them."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from keel.cli.remote import Address, answer_of, job_server_of
from keel.config import loader
from keel.errors import ConfigError
from keel.observability.console import console, errors, from_here, progress_display, quiet_libraries
from keel.online import status

if TYPE_CHECKING:
    from keel.analysis.audit import Finding
    from keel.analysis.verify import Report

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="directory of a run")]
_WANTED = "workers wanted from now on"
Count = Annotated[int | None, typer.Option(help=_WANTED)]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="run directory here, or name or job of a run of the cluster")]
_SHOWN = 20  # findings, and differences


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[ARM=]RUN...",
            help="run directories; the first is of the baseline; runs that differ in run.seed alone are one arm, as are"
            " those of one ARM",
        ),
    ],
    as_json: AsJson = False,
    picture: Annotated[Path | None, typer.Option(help="also draw reward against sqrt(KL): .png or .svg")] = None,
) -> None:
    """Put runs side by side at equal steps, tokens and KL, paired on held-out prompts."""
    from keel.analysis import compare as comparing

    comparing.run(runs, console, as_json=as_json, picture=picture)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run directories, of stages and sweeps too")],
    output: Annotated[
        Path | None,
        typer.Option(help="file to write; default: report.html in the run's directory, or here for several"),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="serve the page here and renew it as the run proceeds")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of --live; 0: any free one")] = 0,
) -> None:
    """Write one self-contained HTML page: what happened, the frontier, curves, rollouts, settings."""
    from keel.analysis import report_live, report_page

    if live:
        if output is not None:
            raise ConfigError(f"--output={output}: with --live no file is written; expected one of the two")
        # Ctrl-C is how this ends: done, not the interruption of a run that could be resumed
        with contextlib.suppress(KeyboardInterrupt), report_live.serving(runs, port) as (address, server):
            console.print(f"Report   {address}  (follows the files; end it with Ctrl-C)", soft_wrap=True)
            server.serve_forever()
        return
    path = output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    num_bytes = report_page.write(runs, path)
    console.print(f"Report   {from_here(path)}  ({num_bytes / 1e6:.1f} MB; open it in a browser)", soft_wrap=True)


def verify(
    run_directory: RunDirectory,
    against: Annotated[Path | None, typer.Option(help="a run that must have ended the same, bit for bit")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the files of an online run: nothing accepted was lost, nothing trained twice, every digest right."""
    from keel.analysis import verify as checking

    report = checking.check(run_directory)
    differences = checking.compare(run_directory, against) if against else []
    if as_json:
        intact = {"intact": not report.findings}
        tree = dataclasses.asdict(report) | intact | {"differences": list(map(dataclasses.asdict, differences))}
        typer.echo(json.dumps(tree, indent=2))
    else:
        _show(report, against, differences)
    if report.findings or differences:
        raise typer.Exit(1)


def scale(
    run: Run,
    generators: Count = None,
    references: Annotated[int | None, typer.Option("--reference", help=_WANTED)] = None,
    scorers: Count = None,
    learners: Annotated[int | None, typer.Option(help=_WANTED + "; the ranks change at the next commit")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Change how many workers a live run has; without counts, show them. Workers wait for resources as pending."""
    roles = {"generators": generators, "reference": references, "scorers": scorers, "learners": learners}
    wanted = {option: count for option, count in roles.items() if count is not None}
    options = [f"--{option}={count}" for option, count in wanted.items()]
    where = job_server_of(run, address)
    counts = answer_of(where, run, "scale", *options) if where else _scale_local(Path(run), wanted)
    if as_json:
        typer.echo(json.dumps(counts, indent=2))
        return
    table = Table("role", "wanted", "present", "")
    for role, count in counts["desired"].items():
        present = counts["actual"].get(role, 0)
        left = f"{count - present} pending" if count > present else f"{present - count} to end"
        table.add_row(role, str(count), str(present), left if count != present else "")
    console.print(table)


def explain(
    run: Run,
    last: Annotated[int, typer.Option(min=1, help="steps to look at, from the newest back")] = 20,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Say where the time of a run goes, what each role waits for, and which count to raise."""
    where = job_server_of(run, address)
    answer = answer_of(where, run, "explain", f"--last={last}") if where else _explain(Path(run), last)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    title = f"steps {answer['first_step']} to {answer['last_step']}, {answer['seconds_per_step']:.2f} s each"
    table = Table("role", "workers", "busy", "in line", "without work, waiting for", title=title, title_justify="left")
    for role in answer["roles"]:
        row = f"{role['workers']:.1f}", f"{role['busy_ratio']:.0%}", f"{role['waiting_batches']:.1f}"
        table.add_row(role["name"], *row, _shares(role["idle_ratios"]))
    console.print(table)
    console.print(f"Time     {_shares(answer['timeline'])}", soft_wrap=True)
    for line in answer["advice"]:
        console.print(f"Advice   {line}", soft_wrap=True)


def _explain(run_directory: Path, last: int) -> dict[str, Any]:
    from keel import files
    from keel.observability import bottlenecks as explaining

    settings = loader.load(loader.stored_config(run_directory, f"RUN_DIR={run_directory}"))
    try:
        lines = files.read_json_lines(run_directory / "metrics.jsonl")
        return dataclasses.asdict(explaining.explain(lines, settings.buffer.max_staleness, last))
    except ValueError as error:
        raise ConfigError(f"RUN_DIR={run_directory}: {error}; expected an online run of two steps or more") from None


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def _scale_local(run_directory: Path, wanted: dict[str, int]) -> dict[str, Any]:
    where = status.control_of(run_directory)
    status.authenticate_as(where)
    from keel.cluster import control

    return control.ask(run_directory, where, {option.removesuffix("s"): count for option, count in wanted.items()})


def replay(
    run_directory: RunDirectory,
    step: Annotated[int, typer.Option(min=1, help="the learner step to make again")],
    as_json: AsJson = False,
) -> None:
    """Make one learner step again from checkpoint and stored rollouts, and compare it with what the run wrote."""
    quiet_libraries()
    from keel.analysis import replay as replaying

    with progress_display(errors if as_json else console, step) as display:
        replayed = replaying.run(run_directory, step, display)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(replayed), indent=2))
        return
    if replayed.refused:
        console.print(f"The learner refuses step {step} again: {replayed.refused}", soft_wrap=True)
        return
    table = Table("metric", "then", "now", "difference", title=f"step {step}, replayed from version {replayed.start}")
    for name, (then, now) in replayed.numbers.items():
        table.add_row(name, "-" if then is None else f"{then:.6g}", f"{now:.6g}", *_difference(then, now))
    console.print(table)


def _difference(then: float | None, now: float) -> list[str]:
    return [] if then is None else [f"{now - then:+.2g}"]


def _show(report: "Report", against: Path | None, differences: "list[Finding]") -> None:
    table = Table("checked", "", title=Text(report.directory), title_justify="left")
    for name, value in report.counts.items():
        parts = value.items() if not isinstance(value, int) else []
        shown = str(value) if isinstance(value, int) else ", ".join(f"{count} {key}" for key, count in parts) or "none"
        table.add_row(name.replace("_", " "), Text(shown))
    console.print(table)
    lines = [f"Note     {note}" for note in report.notes]
    for title, findings in (("Finding", report.findings), ("Differs", differences)):
        lines += [f"{title}  {item.file}: expected {item.expected}; found {item.found}" for item in findings[:_SHOWN]]
        lines += [f"{title}  ... and {len(findings) - _SHOWN} more; --json has all"] if len(findings) > _SHOWN else []
    lines += [] if report.findings else ["Intact   every file is what its place in the run demands"]
    lines += [f"Same     as {against}"] if against and not differences else []
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
