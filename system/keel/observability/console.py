"""The terminal as Keel writes to it: whatever is printed is shown, nothing in it is obeyed."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from keel.text import printable


class Terminal(Console):
    """A console without markup whose every text, also in cells and titles of tables, went through `printable`.

    Line ends stay, and nothing is cut. Colors are those of `style=` and of rich's own Text.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        lines = [printable(line, limit=len(line)) for line in text.split("\n")]
        return super().render_str("\n".join(lines), **{**options, "markup": False, "emoji": False})


console = Terminal(width=None if sys.stdout.isatty() else 120)
errors = Terminal(stderr=True)


def from_here(path: Path) -> str:
    """A path as it is typed in this folder, where it lies below it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the folder of a job: Ray may take it away once the last actor has gone
        return str(path)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
