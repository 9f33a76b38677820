"""Progress of a run: a live table on a terminal, plain lines everywhere else."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from keel.text import printable

Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]
"""What a step shows: name of the column -> text from the step's metrics."""


def number(metric: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A metric in a format; a dash where the step has none."""
    return lambda line: format(line[metric], form) if metric in line else "-"


_STEP: dict[str, Callable[[Mapping[str, Any]], str]] = {"step": lambda line: str(line["step"])}
ONLINE: Columns = {
    **_STEP,
    "reward": lambda line: f"{line['reward']:+.3f} ±{line['reward_std']:.2f}",
    "KL nats": number("kl_nats", ".2f"),
    "entropy": number("entropy_nats", ".2f"),
    "length": number("length_tokens", ".1f"),
    "gap": number("gap_nats", ".3f"),
    "grad": number("grad_norm", ".1f"),
    "tok/s": number("generate_tokens_per_second", ".0f"),
    "late": number("staleness_max_versions", ".0f"),
    "mostly": lambda line: line.get("largest_share", "-"),
    "wait s": number("wait_seconds", ".1f"),
    "train s": number("step_seconds", ".1f"),
    "sync s": number("weight_sync_seconds", ".1f"),
}
_OFFLINE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "length": number("length_tokens", ".1f"),
    "grad": number("grad_norm", ".2f"),
    "rate": number("learning_rate", ".1e"),
    "train s": number("step_seconds", ".1f"),
}
SUPERVISED: Columns = {**_STEP, "loss": number("loss", ".4f"), **_OFFLINE}
PREFERENCE: Columns = {
    **_STEP,
    "loss": number("preference_loss", ".4f"),
    "accuracy": number("preference_accuracy_ratio", ".2f"),
    "margin": number("implicit_margin", "+.3f"),
    "chosen": number("chosen_log_ratio_nats", "+.2f"),
    "rejected": number("rejected_log_ratio_nats", "+.2f"),
    **_OFFLINE,
}
REWARD_MODEL: Columns = {
    **_STEP,
    "loss": number("loss", ".4f"),
    "accuracy": number("preference_accuracy_ratio", ".2f"),
    "margin": number("implicit_margin", "+.3f"),
    **_OFFLINE,
}
_SHOWN_STEPS = 12


class PlainProgress:
    """A line a step, for logs and pipes."""

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
    """The last steps as a table, redrawn, with what is going on below it."""

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


def display(console: Console, steps: int, columns: Columns = ONLINE) -> PlainProgress | LiveProgress:
    return (LiveProgress if console.is_terminal else PlainProgress)(console, steps, columns)
