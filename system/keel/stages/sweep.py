"""`keel sweep`: arms x seeds, some runs at a time, as one unit that can be interrupted and continued.

    base, arms, grid, seeds -> runs, all checked before the first one starts
    every run: a checkpoint at its last step: skipped; else `keel train`, which resumes what was interrupted
    -> DIRECTORY/ARM/seed-N/        the run directories
       DIRECTORY/configs/           their configurations
       DIRECTORY/output/            what they printed, where several are under way at a time
       DIRECTORY/metrics.parquet    all metrics of all runs, a row a number
       DIRECTORY/frontier.png       reward against the root of the KL, a curve an arm
       the table of `keel compare`

Each run is a process of its own: one that fails takes neither the memory nor the Ray of the next one with it. A run
that fails is named at the end; the others continue.
"""

import contextlib
import copy
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from keel import checkpoint, files
from keel.analysis import compare, compared_runs
from keel.config import loader
from keel.config.pipeline import as_override
from keel.config.run import Settings
from keel.config.sweep import SweepSettings
from keel.errors import ConfigError, KeelError
from keel.observability import evaluations
from keel.observability.console import from_here
from keel.online import preflight

_METRICS = pa.schema(
    [
        ("run", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("step", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)


class SweepFailed(KeelError, RuntimeError):
    """Runs of a sweep ended with an error; their output names the reasons."""


@dataclass(frozen=True)
class SweepRun:
    """One run of an arm."""

    arm: str
    seed: int
    settings: Settings
    directory: Path
    config_path: Path

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def trained(self) -> int:
        """Steps up to the newest checkpoint."""
        return max(checkpoint.steps(self.directory), default=0)

    @property
    def done(self) -> bool:
        """Whether the newest checkpoint is of the last step, or of one at which the objective was finished."""
        step = self.trained
        if step == 0 or step >= self.settings.run.steps:
            return step > 0
        return bool(checkpoint.state_of(self.directory, step).get("finished"))


def plan(settings: SweepSettings, path: Path) -> list[SweepRun]:
    """The runs, the first seed of every arm first; `path` is the sweep's file. Raises ConfigError, one line."""
    root = Path(settings.directory).resolve()
    runs = []
    for seed in settings.seeds:
        for arm, changes in settings.changes().items():
            directory = root / arm / f"seed-{seed}"
            identity = {"run.name": f"{arm}-seed-{seed}", "run.seed": seed, "run.directory": str(directory)}
            if settings.concurrent_runs > 1:
                identity["metrics.port"] = 0  # one fixed port serves one run
            overrides = [f"{setting}={as_override(value)}" for setting, value in (changes | identity).items()]
            try:
                run_settings = loader.parse(_base(settings.base, path, overrides))
                preflight.check_directory(directory, run_settings)
            except ConfigError as error:
                raise ConfigError(f"arms.{arm}: {error}") from None
            config_path = root / "configs" / f"{arm}-seed-{seed}.yaml"
            runs.append(SweepRun(arm, seed, run_settings, directory, config_path))
    _check_shared_prompts(runs)
    return runs


def _base(base: str | Mapping[str, Any], path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of settings of a run."""
    if isinstance(base, str):
        return loader.read(path.parent / base, overrides)
    return loader.changed(copy.deepcopy(dict(base)), overrides)


def _check_shared_prompts(runs: Sequence[SweepRun]) -> None:
    """Refuse arms that would be evaluated on different prompts. Raises ConfigError."""
    first = _evaluated_on(runs[0].settings)
    for run in runs:
        for setting, value in _evaluated_on(run.settings).items():
            if value != first.get(setting):
                raise ConfigError(
                    f"arms.{run.arm}: {setting}={value}, but {first.get(setting)} in arm {runs[0].arm}; expected one"
                    " evaluation set for all arms (evaluation.source may give it)"
                )


def _evaluated_on(settings: Settings) -> dict[str, Any]:
    """The settings that decide on which prompts a run is evaluated."""
    config = settings.evaluation_prompts or settings.prompts
    shared = ("options", "column", "columns", "system_prompt", "max_tokens", "overlong", "held_out", "held_out_seed")
    tokens = ("model", "chat_template", "chat_template_options")
    return {
        config.source_setting: config.source,
        config.split_setting: config.split,
        **{f"prompts.{name}": getattr(config, name) for name in shared},
        **{f"policy.{name}": getattr(settings.policy, name) for name in tokens},
    }


def check(runs: Sequence[SweepRun]) -> None:
    """Check models, prompts and rewards of every arm that has something to do, as `keel train` does."""
    for run in {run.arm: run for run in reversed(runs) if not run.done}.values():
        try:
            preflight.prepare(run.settings)
        except ConfigError as error:
            raise ConfigError(f"arms.{run.arm}: {error}") from None


def run(settings: SweepSettings, runs: Sequence[SweepRun], console: Console) -> None:
    """Make the runs that are not done, then the table, the picture and metrics.parquet of all that are.

    Raises SystemExit (130) when it was interrupted or its time is used up, SweepFailed when runs have failed.
    """
    end = time.monotonic() + (settings.budget_seconds or math.inf)
    with _only_noting_signals() as signals, ThreadPoolExecutor(settings.concurrent_runs) as pool:
        executor = SweepExecutor(settings, runs, console, end, signals)
        codes = list(pool.map(executor.execute, range(len(runs))))
    if executor.stopped.is_set():
        count = sum(planned.done for planned in runs)
        console.print(f"{executor.why_stopped()}: {count} of {len(runs)} runs are done; the same command continues")
        raise SystemExit(loader.INTERRUPTED)
    conclude(settings, runs, console)
    failed = [f"{sweep_run.name} (exit code {code})" for sweep_run, code in zip(runs, codes, strict=True) if code]
    if failed:
        named = "; ".join(failed)
        raise SweepFailed(f"{len(failed)} of {len(runs)} runs failed: {named}; the same command tries them again")


@dataclass
class SweepExecutor:
    """The runs of a sweep in their order, as many at the same time as the pool has threads."""

    settings: SweepSettings
    runs: Sequence[SweepRun]
    console: Console
    end: float
    """When the budget is over (time.monotonic)."""
    signals: list[int]
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set once no further run may start: a signal came, or the budget is over."""

    def execute(self, number: int) -> int:
        """The exit code of a run; 0 for one that is done already, INTERRUPTED for one that did not start."""
        sweep_run = self.runs[number]
        title = f"[{number + 1}/{len(self.runs)}] {sweep_run.name}"
        if self.stopped.is_set():
            return loader.INTERRUPTED
        if sweep_run.done:
            self.console.print(f"{title}  done ({from_here(sweep_run.directory)})", soft_wrap=True)
            return 0
        if self.signals or time.monotonic() >= self.end:
            self.stopped.set()
            return loader.INTERRUPTED
        output = self._announce(title, sweep_run)
        files.write(sweep_run.config_path, loader.dump(sweep_run.settings).encode())
        code = train(sweep_run.config_path, self.end, self.signals, output)
        if self.signals or code in (loader.INTERRUPTED, -signal.SIGUSR1):
            self.stopped.set()
        elif code:
            self.console.print(f"{sweep_run.name} failed with exit code {code}; the others continue")
        elif output:
            self.console.print(f"{title}  done", soft_wrap=True)
        return code

    def _announce(self, title: str, sweep_run: SweepRun) -> Path | None:
        """Say that a run starts; the file that its output goes to, or None for this terminal."""
        if self.settings.concurrent_runs == 1:
            self.console.rule(title)
            return None
        output = Path(self.settings.directory).resolve() / "output" / f"{sweep_run.config_path.stem}.txt"
        self.console.print(f"{title}  starts; its output: {from_here(output)}", soft_wrap=True)
        return output

    def why_stopped(self) -> str:
        if not self.signals and time.monotonic() >= self.end:
            return f"budget_seconds={self.settings.budget_seconds:g} are over"
        return "interrupted"


@contextlib.contextmanager
def _only_noting_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM while a run is under way, which ends by itself; the list has those that came.

    Ctrl-C reaches the run, too. subprocess.run would kill it a quarter of a second later.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config_path: Path, end: float, signals: Sequence[int], output: Path | None = None) -> int:
    """Run `keel train` in a process of its own, which prints here or to the end of a file; its exit code.

    At the time `end` (time.monotonic) the run is asked to stop; a SIGTERM among `signals` is passed on.
    """
    command = [sys.executable, "-P", "-m", "keel", "train", str(config_path)]  # -P: nothing of the current directory
    if output is None:
        return _wait(subprocess.Popen(command), end, signals)
    files.make_folder(output.parent)
    with output.open("ab") as printed:
        return _wait(subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT), end, signals)


def _wait(process: subprocess.Popen[bytes], end: float, signals: Sequence[int]) -> int:
    told: set[int] = set()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.5)
        wanted = {signal.SIGTERM} & set(signals)
        if time.monotonic() >= end:
            wanted.add(signal.SIGUSR1)  # the run ends after the step under way, with a checkpoint
        for number in wanted - told:
            process.send_signal(number)
        told |= wanted


def conclude(settings: SweepSettings, runs: Sequence[SweepRun], console: Console) -> None:
    """Write metrics.parquet and frontier.png, and print the table of the runs that are done."""
    done = [sweep_run for sweep_run in runs if sweep_run.done]
    root = Path(settings.directory).resolve()
    content = pa.BufferOutputStream()
    pq.write_table(metrics_table(done), content)
    files.write(root / "metrics.parquet", content.getvalue())
    console.print(
        f"Metrics  {from_here(root / 'metrics.parquet')}  (run, arm, seed, step, metric, value)", soft_wrap=True
    )
    if len(done) < 2:
        console.print(f"Table    none: {len(done)} run is done; expected at least 2", soft_wrap=True)
        return
    in_order = sorted(done, key=lambda sweep_run: list(settings.changes()).index(sweep_run.arm))
    loaded = [compared_runs.load(sweep_run.directory) for sweep_run in in_order]
    comparison = compare.compare(loaded, [sweep_run.arm for sweep_run in in_order])
    compare.show(comparison, console)
    try:
        compare.draw(comparison, root / "frontier.png")
        console.print(f"Picture  {from_here(root / 'frontier.png')}  (reward against sqrt(KL))", soft_wrap=True)
    except ConfigError as error:
        console.print(f"Picture  none: {error}", soft_wrap=True)


def metrics_table(runs: Sequence[SweepRun]) -> pa.Table:
    """Every number of metrics.jsonl, labels behind a dot, and of frontier.arrow, as evaluation/NAME: a row each."""
    rows = []
    for sweep_run in runs:
        lines = files.read_json_lines(sweep_run.directory / "metrics.jsonl")
        numbers = [(line["step"], name, value) for line in lines for name, value in loader.leaves(line).items()]
        frontier = evaluations.frontier(sweep_run.directory)
        numbers += [(row["step"], f"evaluation/{name}", value) for row in frontier for name, value in row.items()]
        rows += [
            (sweep_run.settings.run.name, sweep_run.arm, sweep_run.seed, int(step), name, float(value))
            for step, name, value in numbers
            if isinstance(value, int | float) and name not in ("step", "evaluation/step")
        ]
    columns = zip(*rows, strict=True) if rows else [[] for _ in _METRICS]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, _METRICS, strict=True)], _METRICS)
