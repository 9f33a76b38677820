"""train, sft, prefer, reward and label: one table of commands, and one body that runs any of them.

A configuration is checked before anything heavy is imported, and Ray and vLLM are imported only for a checked one.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from keel import __version__
from keel.config import loader
from keel.config.commands import COMMANDS, AnySettings
from keel.config.label import LabelSettings
from keel.config.run import Settings
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings
from keel.errors import ConfigError
from keel.observability.console import (
    ONLINE_COLUMNS,
    REWARD_MODEL_COLUMNS,
    Columns,
    Display,
    console,
    progress_display,
    quiet_libraries,
)

HELP = {
    "train": "Run online training. On the run directory of an unfinished run of the same settings, resume it.",
    "sft": "Supervised fine-tuning on demonstrations: the loss of completions alone.",
    "prefer": "Train on preferences: stored pairs, or (a configuration with `rewards`) pairs of samples, scored and"
    " selected.",
    "reward": "Train a reward model, or an ensemble of them, on preference pairs (Bradley-Terry).",
    "label": "Make preference pairs: sample from a policy (or read runs' rollouts), let a judge score, pair, write"
    " Parquet.",
}
"""Command -> its help."""
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; `keel settings` lists every setting")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings to change, as a.b=c", show_default=False)]
RayAddress = Annotated[str | None, typer.Option(help="Ray address to join; default: an embedded Ray")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved configuration and stop")]


class Job(NamedTuple):
    """A checked configuration: what is run, and what the terminal shows of it."""

    headline: str
    run: Callable[[Display], Any]
    show: Callable[[Any], None]
    """Shows what `run` returned."""
    steps: int = 0
    columns: Columns = ONLINE_COLUMNS


def add_to(app: typer.Typer) -> None:
    """Add the commands of the table, all with the same options."""
    for name, text in HELP.items():
        app.command(name, help=text)(_command(name))


def _command(name: str) -> Callable[..., None]:
    def command(
        config_path: Config, overrides: Overrides = None, address: RayAddress = None, dry_run: DryRun = False
    ) -> None:
        settings = read(name, config_path, with_address(overrides, address))
        if dry_run:
            typer.echo(loader.dump(settings), nl=False)
        else:
            start(settings, config_path)

    return command


def read(command: str, config_path: str, changes: list[str]) -> AnySettings:
    """The settings of a command. `keel prefer` is online training where its configuration has rewards."""
    online = command == "prefer" and "rewards" in loader.read(config_path, changes)
    settings: Any = loader.load_as(Settings if online else COMMANDS[command], config_path, changes)
    if online and settings.objective.kind != "preference":
        raise ConfigError(f"objective.kind={settings.objective.kind}: keel prefer expected preference")
    return settings


def with_address(overrides: list[str] | None, address: str | None) -> list[str]:
    return [*(overrides or []), *([f"cluster.address={address}"] if address else [])]


def start(settings: AnySettings, config_path: str) -> None:
    """Check a configuration against this machine, run it and show its result."""
    quiet_libraries()
    execute(_JOBS[type(settings)](settings, config_path), console)


def execute(job: Job, progress: Console) -> None:
    """Run a job with its progress on a console."""
    with progress_display(progress, job.steps, job.columns) as display:
        display.note(f"keel {__version__}: {job.headline}")
        result = job.run(display)
    job.show(result)


def _online(settings: Settings, config_path: str) -> Job:
    from keel.cli import summary
    from keel.online import preflight

    prepared = preflight.prepare(settings)
    from keel.online import train  # Ray and vLLM: only once the input is known to be good

    def show(outcome: train.Outcome) -> None:
        if outcome.stopped:
            raise typer.Exit(loader.INTERRUPTED)
        summary.show(console, outcome.directory, settings, outcome.seconds, config_path)
        if picture := summary.draw_frontier(outcome.directory, settings):
            console.print(f"Picture  {picture}  (reward against sqrt(KL))", soft_wrap=True)
        console.print(f"Report   {summary.write_report(outcome.directory)}", soft_wrap=True)

    steps = settings.run.steps
    headline = f"{settings.run.name}, {steps} steps, {prepared.prompts.counts}"
    return Job(headline, lambda display: train.run(prepared, display), show, steps)


def _policy(settings: SupervisedSettings | PreferSettings, config_path: str) -> Job:
    from keel.cli import summary
    from keel.stages import policy

    prepared = policy.prepare(settings)
    steps = prepared.spec.run.steps
    return Job(
        f"{settings.run.name}, {prepared.name}, {steps} steps, {prepared.rows.counts}",
        lambda display: policy.run(prepared, display),
        lambda result: summary.show_stage(console, prepared.directory, result),
        steps,
        prepared.columns,
    )


def _reward(settings: RewardModelSettings, config_path: str) -> Job:
    from keel.cli import summary
    from keel.stages import reward

    prepared = reward.prepare(settings)

    def show(result: dict[str, Any]) -> None:
        summary.show_stage(console, prepared.directory, result)
        summary.show_reward_report(console, result["report"])

    steps = f"{settings.members.count} x {prepared.steps} steps"
    headline = f"{settings.run.name}, reward, {steps}, {prepared.rows.counts}"
    return Job(headline, lambda display: reward.run(prepared, display), show, prepared.steps, REWARD_MODEL_COLUMNS)


def _label(settings: LabelSettings, config_path: str) -> Job:
    from keel.cli import summary
    from keel.stages import label

    prepared = label.prepare(settings)
    return Job(
        f"{settings.run.name}, label, {prepared.completions} completions, judged by {settings.judge.name}",
        lambda display: label.run(prepared, display),
        lambda result: summary.show_labels(console, prepared.directory, result),
    )


_JOBS: dict[type, Callable[[Any, str], Job]] = {
    Settings: _online,
    SupervisedSettings: _policy,
    PreferSettings: _policy,
    RewardModelSettings: _reward,
    LabelSettings: _label,
}
"""The job of each kind of configuration."""
