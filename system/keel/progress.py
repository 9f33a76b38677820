"""Progress of a run: a live table on a terminal, plain lines everywhere else."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_COLUMNS = (
    "step",
    "reward",
    "KL nats",
    "entropy",
    "length",
    "gap",
    "grad",
    "tok/s",
    "late",
    "wait s",
    "train s",
    "sync s",
)
_SHOWN_STEPS = 12


def _cells(line: dict[str, Any]) -> list[str]:
    """One step as text; reward with its spread over completions."""
    return [
        str(line["step"]),
        f"{line['reward']:+.3f} ±{line['reward_std']:.2f}",
        f"{line.get('kl_nats', float('nan')):.2f}",
        f"{line['entropy_nats']:.2f}",
        f"{line['length_tokens']:.1f}",
        f"{line['gap_nats']:.3f}",
        f"{line['grad_norm']:.1f}",
        f"{line['generate_tokens_per_second']:.0f}",
        f"{line['staleness_max_versions']:.0f}",
        f"{line['wait_seconds']:.1f}",
        f"{line['step_seconds']:.1f}",
        f"{line['weight_sync_seconds']:.1f}",
    ]


class PlainProgress:
    """A line a step, for logs and pipes."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps
        self._started = time.monotonic()

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        if what.startswith("starting"):
            self.note(f"{what} ...")

    def step(self, line: dict[str, Any]) -> None:
        cells = dict(zip(_COLUMNS, _cells(line), strict=True))
        position = f"step {cells.pop('step')}/{self.steps}"
        elapsed = f"{time.monotonic() - self._started:.0f} s"
        self.note(f"{position}  " + "  ".join(f"{name} {value}" for name, value in cells.items()) + f"  ({elapsed})")


class LiveProgress:
    """The last steps as a table, redrawn, with what is going on below it."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps
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
        self.console.print(text, highlight=False)

    def doing(self, what: str) -> None:
        self._doing, self._since = what, time.monotonic()

    def step(self, line: dict[str, Any]) -> None:
        self._lines.append(_cells(line))

    def _render(self) -> Group:
        table = Table(*_COLUMNS, box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for cells in self._lines[-_SHOWN_STEPS:]:
            table.add_row(*cells)
        now = time.monotonic()
        done = int(self._lines[-1][0]) if self._lines else 0
        status = (
            f"step {done}/{self.steps}, {now - self._started:.0f} s in; now: {self._doing} ({now - self._since:.0f} s)"
        )
        return Group(table, Text(status))


def display(console: Console, steps: int) -> PlainProgress | LiveProgress:
    return LiveProgress(console, steps) if console.is_terminal else PlainProgress(console, steps)
