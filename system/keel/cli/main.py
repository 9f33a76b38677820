"""The commands. Configuration is parsed before any heavy import, so help and --dry-run answer at once."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from keel import __version__
from keel.cli import deploy_commands, job_commands, plan_commands, run_commands
from keel.config import loader
from keel.config.base import Section
from keel.config.commands import CONFIGURATIONS, command_of
from keel.config.label import LabelSettings
from keel.config.pipeline import PipelineSettings
from keel.config.run import Settings
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings
from keel.errors import ConfigError, KeelError
from keel.observability.console import (
    REWARD_MODEL_COLUMNS,
    console,
    errors,
    from_here,
    progress_display,
    quiet_libraries,
)

app = typer.Typer(
    help="Keel: RLHF with entropy or KL regularization, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; `keel schema` lists every setting")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings to change, as a.b=c", show_default=False)]
Address = Annotated[str | None, typer.Option(help="Ray address to join; default: an embedded Ray")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved configuration and stop")]


@app.command()
def train(config_path: Config, overrides: Overrides = None, address: Address = None, dry_run: DryRun = False) -> None:
    """Run online training. On the run directory of an unfinished run of the same settings, go on from there."""
    settings = loader.load(config_path, _with(overrides, address))
    if not _shown(settings, dry_run):
        _train(settings, config_path)


@app.command()
def sft(config_path: Config, overrides: Overrides = None, address: Address = None, dry_run: DryRun = False) -> None:
    """Supervised fine-tuning on demonstrations: the loss of completions alone."""
    settings = loader.load_as(SupervisedSettings, config_path, _with(overrides, address))
    if not _shown(settings, dry_run):
        _likelihood(settings)


@app.command()
def prefer(config_path: Config, overrides: Overrides = None, address: Address = None, dry_run: DryRun = False) -> None:
    """Train on preferences: stored pairs, or (a configuration with `rewards`) pairs of samples, scored and selected."""
    changes = _with(overrides, address)
    if "rewards" in loader.read(config_path, changes):
        online = loader.load(config_path, changes)
        if online.objective.kind != "preference":
            raise ConfigError(f"objective.kind={online.objective.kind}: keel prefer expected preference")
        if not _shown(online, dry_run):
            _train(online, config_path)
        return
    settings = loader.load_as(PreferSettings, config_path, changes)
    if not _shown(settings, dry_run):
        _likelihood(settings)


@app.command()
def resume(run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="directory of a run")]) -> None:
    """Go on from the last committed checkpoint of a run."""
    stored = loader.stored_config(run_directory, f"RUN_DIR={run_directory}")
    own = [f"run.directory={json.dumps(str(run_directory), ensure_ascii=False)}"]
    command = command_of(loader.read(stored))
    _COMMANDS[command](str(stored), own)


@app.command()
def schema(
    command: Annotated[str, typer.Argument(help="train, sft, prefer, reward, label, evaluate or pipeline")] = "train",
) -> None:
    """Print the JSON schema of a command's configuration, with defaults and descriptions."""
    if command not in CONFIGURATIONS:
        raise ConfigError(f"COMMAND={command}: has no configuration; expected one of {', '.join(CONFIGURATIONS)}")
    typer.echo(json.dumps(CONFIGURATIONS[command].model_json_schema(), indent=2))


@app.command("settings")
def setting_tables() -> None:
    """Print the reference tables of all settings."""
    from keel.config.reference import page

    typer.echo(page())


@app.command()
def metrics() -> None:
    """Print the reference table of all Prometheus metrics."""
    from keel.observability.metric_table import reference_table

    typer.echo(reference_table())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    self_test: Annotated[bool, typer.Option(help="train a tiny model for one step through the whole stack")] = True,
) -> None:
    """Check this machine: Python, compiler, memory, ports, packages, and one step of training."""
    from keel.cli import doctor as checks

    quiet_libraries()
    if not checks.run(console, as_json=as_json, self_test=self_test):
        raise typer.Exit(1)


@app.command()
def reward(config_path: Config, overrides: Overrides = None, address: Address = None, dry_run: DryRun = False) -> None:
    """Train a reward model, or an ensemble of them, on preference pairs (Bradley-Terry)."""
    settings = loader.load_as(RewardModelSettings, config_path, _with(overrides, address))
    if _shown(settings, dry_run):
        return
    quiet_libraries()
    from keel.cli import summary
    from keel.stages import reward as stage

    prepared = stage.prepare(settings)
    with progress_display(console, prepared.steps, REWARD_MODEL_COLUMNS) as display:
        members = f"{settings.members.count} x {prepared.steps} steps"
        display.note(f"keel {__version__}: {settings.run.name}, reward, {members}, {prepared.rows.counts}")
        done = stage.run(prepared, display)
    summary.show_stage(console, prepared.directory, done)
    summary.show_reward_report(console, done["report"])


@app.command()
def label(config_path: Config, overrides: Overrides = None, address: Address = None, dry_run: DryRun = False) -> None:
    """Make preference pairs: sample from a policy (or read runs' rollouts), let a judge score, pair, write Parquet."""
    settings = loader.load_as(LabelSettings, config_path, _with(overrides, address))
    if _shown(settings, dry_run):
        return
    quiet_libraries()
    from keel.cli import summary
    from keel.stages import label as stage

    prepared = stage.prepare(settings)
    with progress_display(console, 0) as display:
        what = f"{prepared.completions} completions, judged by {settings.judge.name}"
        display.note(f"keel {__version__}: {settings.run.name}, label, {what}")
        done = stage.run(prepared, display)
    summary.show_labels(console, prepared.directory, done)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run directory, model folder, hub name or wheel:NAME")],
    overrides: Overrides = None,
    config_path: Annotated[
        str | None, typer.Option("--config", help="YAML file of a run: prompts, rewards, reference; default: the run's")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the result; default: MODEL/evaluation")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    address: Address = None,
) -> None:
    """Evaluate a model on held-out prompts: rewards, KL, win rates, pass@k, with intervals."""
    stored = Path(model) / "config.yaml"
    if config_path is None and stored.is_file():
        loader.stored_config(Path(model), f"MODEL={model}")
    if config_path is None and not (stored.is_file() and command_of(loader.read(stored)) == "train"):
        raise ConfigError(f"MODEL={model}: is no online run; expected --config with prompts and rewards")
    settings = loader.load(config_path or stored, _with(overrides, address))
    quiet_libraries()
    from keel.cli import summary
    from keel.stages import evaluate as stage

    default = Path(model) if Path(model).is_dir() else Path(settings.run_directory)
    prepared = stage.prepare(settings, model, output or default / "evaluation")
    with progress_display(errors if as_json else console, 0) as display:
        display.note(f"keel {__version__}: evaluating {model}, {prepared.prompts.counts['held_out']} held-out prompts")
        found = stage.run(prepared, display)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        summary.show_evaluation(console, prepared.directory, found)


@app.command()
def pipeline(
    config_path: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every stage and say which are cached")] = False,
) -> None:
    """Run stages one after the other (label, reward, train, ...); what did not change is taken from before."""
    settings = loader.load_as(PipelineSettings, config_path, overrides or [])
    from keel.stages import pipeline as stages

    planned = stages.plan(settings, Path(config_path))
    if dry_run:
        for stage in planned:
            typer.echo(f"{stage.entry.name}: {'cached' if stage.done else 'to do'} ({from_here(stage.directory)})")
        return
    stages.run(planned, console)


app.command()(run_commands.compare)
app.command()(run_commands.verify)
app.command()(run_commands.scale)
app.command()(run_commands.replay)
app.command()(run_commands.explain)
app.add_typer(deploy_commands.app, name="deploy")
app.command()(job_commands.submit)
app.command()(job_commands.status)
app.command()(job_commands.logs)
app.command()(job_commands.stop)
app.command()(plan_commands.plan)
_COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    "train": train,
    "sft": sft,
    "prefer": prefer,
    "reward": reward,
    "label": label,
}


def _with(overrides: list[str] | None, address: str | None) -> list[str]:
    return [*(overrides or []), *([f"cluster.address={address}"] if address else [])]


def _shown(settings: Section, dry_run: bool) -> bool:
    """Print the resolved settings where that is all that was asked for."""
    if dry_run:
        typer.echo(loader.dump(settings), nl=False)
    return dry_run


def _likelihood(settings: SupervisedSettings | PreferSettings) -> None:
    quiet_libraries()
    from keel.cli import summary
    from keel.stages import policy

    prepared = policy.prepare(settings)
    steps = prepared.spec.run.steps
    with progress_display(console, steps, prepared.columns) as display:
        display.note(f"keel {__version__}: {settings.run.name}, {prepared.name}, {steps} steps, {prepared.rows.counts}")
        done = policy.run(prepared, display)
    summary.show_stage(console, prepared.directory, done)


def _train(settings: Settings, config_path: str) -> None:
    quiet_libraries()
    from keel.cli import summary
    from keel.online import preflight

    prepared = preflight.prepare(settings)
    from keel.online import train as training  # Ray and vLLM: only once the input is known to be good

    with progress_display(console, settings.run.steps) as display:
        display.note(f"keel {__version__}: {settings.run.name}, {settings.run.steps} steps, {prepared.prompts.counts}")
        outcome = training.run(prepared, display)
    if outcome.stopped:
        raise typer.Exit(loader.INTERRUPTED)
    summary.show(console, outcome.directory, settings, outcome.seconds, config_path)
    if picture := summary.draw_frontier(outcome.directory, settings):
        console.print(f"Picture  {picture}  (reward against sqrt(KL))", soft_wrap=True)


def main() -> None:
    """Exit codes: 0 done, 2 bad input, 1 the run failed, 130 interrupted."""
    try:
        code = app(standalone_mode=False)  # the code of a typer.Exit, and 130 of Ctrl-C, come back as a value
    except ConfigError as error:
        _fail(str(error), 2)
    except Exception as error:
        _fail_run(error)
    if code == loader.INTERRUPTED:
        _fail("interrupted; `keel resume RUN_DIR` goes on from the last checkpoint", loader.INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail_run(error: Any) -> NoReturn:
    """Usage errors of the command line end with 2; a failed run shows its cause and ends with 1."""
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's own exceptions
        _fail(error.format_message(), error.exit_code)
    if isinstance(error, KeelError):
        _fail(f"{type(error).__name__}: {error}", 1)
    _fail("".join(traceback.format_exception(error)).rstrip(), 1)


def _fail(message: str, code: int) -> NoReturn:
    if message:  # none where a command was missing and the help was shown
        errors.print(f"keel: {message}", style="red", highlight=False, soft_wrap=True)
    sys.exit(code)
