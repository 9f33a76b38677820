"""The commands of `keel`. Nothing heavy is imported for help, so that it is printed at once.

A new command is a function here or in a module beside it. A command that trains is an entry of `_JOBS` and `HELP` in
training_commands.py and of `COMMANDS` in config/commands.py."""

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from keel import checkpoint
from keel.cli import deploy_commands, job_commands, plan_commands, run_commands, training_commands
from keel.cli.training_commands import Config, Overrides, RayAddress
from keel.config import loader
from keel.config.commands import CONFIGURATIONS, command_of
from keel.config.pipeline import PipelineSettings
from keel.config.sweep import SweepSettings
from keel.errors import ConfigError, KeelError
from keel.observability.console import console, errors, from_here, quiet_libraries

app = typer.Typer(
    help="Keel: RLHF with entropy or KL regularization, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
training_commands.add_to(app)


@app.command()
def resume(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="directory of a run")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="new number of steps (run.steps): extends a finished online run")
    ] = None,
) -> None:
    """Resume a run from its last committed checkpoint."""
    stored = loader.stored_config(run_directory, f"RUN_DIR={run_directory}")
    changes = [f"run.directory={json.dumps(str(run_directory), ensure_ascii=False)}"]
    command = command_of(loader.read(stored))
    if steps is not None and command != "train":
        raise ConfigError(f"--steps={steps}: {run_directory} is a run of keel {command}; expected an online run")
    changes += [f"run.steps={steps}"] if steps is not None else []
    training_commands.start(training_commands.read(command, str(stored), changes), str(stored))


@app.command()
def schema(
    command: Annotated[str, typer.Argument(help="a command that reads a configuration")] = "train",
) -> None:
    """Print the JSON schema of a command's configuration, with defaults and descriptions."""
    if command not in CONFIGURATIONS:
        raise ConfigError(f"COMMAND={command}: has no configuration; expected one of {', '.join(CONFIGURATIONS)}")
    typer.echo(json.dumps(CONFIGURATIONS[command].model_json_schema(), indent=2))


@app.command("settings")
def setting_tables() -> None:
    """Print the reference tables of all settings."""
    from keel.config.settings_page import page

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
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="run directory, RUN_DIR/best, model folder, hub name or wheel:NAME")
    ],
    overrides: Overrides = None,
    config_path: Annotated[
        str | None, typer.Option("--config", help="YAML file of a run: prompts, rewards, reference; default: the run's")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the result; default: MODEL/evaluation")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    address: RayAddress = None,
) -> None:
    """Evaluate a model on held-out prompts: rewards, KL, win rates, pass@k, with intervals."""
    run_of_best = checkpoint.run_of_best(Path(model))
    directory = run_of_best or Path(model)
    stored = directory / "config.yaml"
    if config_path is None and stored.is_file():
        loader.stored_config(directory, f"MODEL={model}")
    if config_path is None and not (stored.is_file() and command_of(loader.read(stored)) == "train"):
        raise ConfigError(f"MODEL={model}: is no online run; expected --config with prompts and rewards")
    settings = loader.load(config_path or stored, training_commands.with_address(overrides, address))
    quiet_libraries()
    from keel.cli import summary
    from keel.stages import evaluate as stage

    default = directory if directory.is_dir() else Path(settings.run_directory)
    prepared = stage.prepare(settings, model, output or default / ("evaluation-best" if run_of_best else "evaluation"))

    def show(result: dict[str, Any]) -> None:
        if as_json:
            typer.echo(json.dumps(result, indent=2))
        else:
            summary.show_evaluation(console, prepared.directory, result)

    headline = f"evaluating {model}, {prepared.prompts.counts['held_out']} held-out prompts"
    job = training_commands.Job(headline, lambda display: stage.run(prepared, display), show)
    training_commands.execute(job, errors if as_json else console)


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


@app.command()
def sweep(
    config_path: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every arm and say which runs are done")] = False,
) -> None:
    """Run arms x seeds one after the other, resumable, then compare them: a table, a picture, all metrics."""
    settings = loader.load_as(SweepSettings, config_path, overrides or [])
    quiet_libraries()
    from keel.stages import sweep as sweeping

    runs = sweeping.plan(settings, Path(config_path))
    if dry_run:
        for run in runs:
            state = "done" if run.done else f"to do, {run.trained} of {run.settings.run.steps} steps are trained"
            typer.echo(f"{run.name}: {state} ({from_here(run.directory)})")
        return
    sweeping.check(runs)
    sweeping.run(settings, runs, console)


for command in (
    run_commands.compare,
    run_commands.report,
    run_commands.verify,
    run_commands.scale,
    run_commands.replay,
    run_commands.explain,
    job_commands.submit,
    job_commands.status,
    job_commands.logs,
    job_commands.stop,
    plan_commands.plan,
):
    app.command()(command)
app.add_typer(deploy_commands.app, name="deploy")


def main() -> None:
    """Exit codes: 0 done, 2 bad input, 1 the run failed, 130 interrupted."""
    try:
        code = app(standalone_mode=False)  # the code of a typer.Exit, and 130 of Ctrl-C, come back as a value
    except ConfigError as error:
        _fail(str(error), 2)
    except Exception as error:
        _fail_run(error)
    if code == loader.INTERRUPTED:
        _fail("; ".join(["interrupted", *_way_on(sys.argv[1:2])]), loader.INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _way_on(command: list[str]) -> list[str]:
    """How an interrupted command continues; nothing for one that only reads."""
    if {*training_commands.HELP, "resume"} & {*command}:
        return ["`keel resume RUN_DIR` resumes from the last checkpoint"]
    return ["the same command continues"] if {"pipeline", "sweep"} & {*command} else []


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
