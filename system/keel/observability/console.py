"""The terminal: consoles that never interpret what they print, and the progress display of a run.

A run shows its steps as a live table on a terminal, as plain lines everywhere else.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from keel.text import printable


class Terminal(Console):
    """A console without markup that passes every text, cells and titles of tables included, through `printable`.

    Line ends stay, and nothing is cut. Colors are those of `style=` and of rich's own Text.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        lines = [printable(line, limit=len(line)) for line in text.split("\n")]
        return super().render_str("\n".join(lines), **{**options, "markup": False, "emoji": False})


console = Terminal(width=None if sys.stdout.isatty() else 120)
errors = Terminal(stderr=True)


def from_here(path: Path) -> str:
    """Shorten a path to one relative to the current folder, where it lies below it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the folder of a job: Ray may delete it after the last actor has ended
        return str(path)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


class Display(Protocol):
    """A display of progress: a live table, plain lines, or none."""

    def note(self, text: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, line: dict[str, Any]) -> None: ...


def quiet_libraries() -> None:
    """Keep libraries from writing over the progress display; call before importing transformers or deepspeed.

    Actors are not concerned: their output goes to Ray's log files.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]
"""The columns of a step: heading -> text from the step's metrics."""


def _number(metric: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A metric in a format; a dash where the step has none."""
    return lambda line: format(line[metric], form) if metric in line else "-"


_STEP: dict[str, Callable[[Mapping[str, Any]], str]] = {"step": lambda line: str(line["step"])}
ONLINE_COLUMNS: Columns = {
    **_STEP,
    "reward": lambda line: f"{line['reward']:+.3f} ±{line['reward_std']:.2f}",
    "KL nats": _number("kl_nats", ".2f"),
    "entropy": _number("entropy_nats", ".2f"),
    "length": _number("length_tokens", ".1f"),
    "gap": _number("gap_nats", ".3f"),
    "grad": _number("grad_norm", ".1f"),
    "tok/s": _number("generate_tokens_per_second", ".0f"),
    "late": _number("staleness_max_versions", ".0f"),
    "mostly": lambda line: line.get("largest_share", "-"),
    "wait s": _number("wait_seconds", ".1f"),
    "train s": _number("step_seconds", ".1f"),
    "sync s": _number("weight_sync_seconds", ".1f"),
}
_OFFLINE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "length": _number("length_tokens", ".1f"),
    "grad": _number("grad_norm", ".2f"),
    "rate": _number("learning_rate", ".1e"),
    "train s": _number("step_seconds", ".1f"),
}
SUPERVISED_COLUMNS: Columns = {**_STEP, "loss": _number("loss", ".4f"), **_OFFLINE}
PREFERENCE_COLUMNS: Columns = {
    **_STEP,
    "loss": _number("preference_loss", ".4f"),
    "accuracy": _number("preference_accuracy_ratio", ".2f"),
    "margin": _number("implicit_margin", "+.3f"),
    "chosen": _number("chosen_log_ratio_nats", "+.2f"),
    "rejected": _number("rejected_log_ratio_nats", "+.2f"),
    **_OFFLINE,
}
REWARD_MODEL_COLUMNS: Columns = {
    **_STEP,
    "loss": _number("loss", ".4f"),
    "accuracy": _number("preference_accuracy_ratio", ".2f"),
    "margin": _number("implicit_margin", "+.3f"),
    **_OFFLINE,
}
_SHOWN_STEPS = 12


class PlainProgress:
    """Prints one line per step, for logs and pipes."""

    def __init__(self, console: Console, steps: int, columns: Columns) -> None:
        self.console, self.steps, self.columns = console, steps, columns
        self._started = time.monotonic()

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def note(self, text: str) -> None:
        self.console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        if what.startswith("starting"):
            self.note(f"{what} ...")

    def step(self, line: dict[str, Any]) -> None:
        cells = {name: cell(line) for name, cell in self.columns.items()}
        position = f"step {cells.pop('step')}/{self.steps}"
        elapsed = f"{time.monotonic() - self._started:.0f} s"
        self.note(f"{position}  " + "  ".join(f"{name} {value}" for name, value in cells.items()) + f"  ({elapsed})")


class LiveProgress:
    """Redraws a table of the last steps, with the current activity below it."""

    def __init__(self, console: Console, steps: int, columns: Columns) -> None:
        self.console, self.steps, self.columns = console, steps, columns
        self._lines: list[list[str]] = []
        self._doing = "starting"
        self._since = self._started = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> "LiveProgress":
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def note(self, text: str) -> None:
        self.console.print(printable(text), markup=False, emoji=False, highlight=False)

    def doing(self, what: str) -> None:
        self._doing, self._since = what, time.monotonic()

    def step(self, line: dict[str, Any]) -> None:
        self._lines.append([cell(line) for cell in self.columns.values()])

    def _render(self) -> Group:
        table = Table(*self.columns, box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for cells in self._lines[-_SHOWN_STEPS:]:
            table.add_row(*cells)
        now = time.monotonic()
        done = int(self._lines[-1][0]) if self._lines else 0
        status = (
            f"step {done}/{self.steps}, {now - self._started:.0f} s in; now: {self._doing} ({now - self._since:.0f} s)"
        )
        return Group(table, Text(printable(status)))


def progress_display(console: Console, steps: int, columns: Columns = ONLINE_COLUMNS) -> PlainProgress | LiveProgress:
    return (LiveProgress if console.is_terminal else PlainProgress)(console, steps, columns)
