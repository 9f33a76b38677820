"""Commands on a run that exists; cli.py registers them."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from keel.audit import Finding
    from keel.verify import Report

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="directory of a run")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object")]
_SHOWN = 20  # findings, and differences
console = Console(width=None if sys.stdout.isatty() else 120)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories; the first is the baseline")],
    as_json: AsJson = False,
    picture: Annotated[Path | None, typer.Option(help="also draw reward against sqrt(KL): .png or .svg")] = None,
) -> None:
    """Put runs side by side at equal steps, tokens and KL, paired on held-out prompts."""
    from keel import compare as comparing

    comparing.run(runs, console, as_json=as_json, picture=picture)


def verify(
    run_directory: RunDirectory,
    against: Annotated[Path | None, typer.Option(help="a run that must have ended the same, bit for bit")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the files of an online run: nothing accepted was lost, nothing trained twice, every digest right."""
    from keel import verify as checking

    report = checking.check(run_directory)
    differences = checking.compare(run_directory, against) if against else []
    if as_json:
        intact = {"intact": not report.findings}
        tree = dataclasses.asdict(report) | intact | {"differences": [dataclasses.asdict(each) for each in differences]}
        typer.echo(json.dumps(tree, indent=2))
    else:
        _show(report, against, differences)
    if report.findings or differences:
        raise typer.Exit(1)


def _show(report: "Report", against: Path | None, differences: "list[Finding]") -> None:
    table = Table("checked", "", title=Text(report.directory), title_justify="left")
    for name, value in report.counts.items():
        parts = value.items() if not isinstance(value, int) else []
        shown = str(value) if isinstance(value, int) else ", ".join(f"{count} {key}" for key, count in parts) or "none"
        table.add_row(name.replace("_", " "), Text(shown))
    console.print(table)
    lines = [f"Note     {note}" for note in report.notes]
    for title, found in (("Finding", report.findings), ("Differs", differences)):
        lines += [f"{title}  {each.file}: expected {each.expected}; found {each.found}" for each in found[:_SHOWN]]
        lines += [f"{title}  ... and {len(found) - _SHOWN} more; --json has all"] if len(found) > _SHOWN else []
    lines += [] if report.findings else ["Intact   every file is what its place in the run demands"]
    lines += [f"Same     as {against}"] if against and not differences else []
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
