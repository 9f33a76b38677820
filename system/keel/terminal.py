"""The terminal as Keel writes to it: whatever is printed is shown, nothing in it is obeyed."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from keel.printable import printable


class Terminal(Console):
    """A console without markup whose every text, also in cells and titles of tables, went through `printable`.

    Line ends stay, and nothing is cut. Colours are those of `style=` and of rich's own Text.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        lines = [printable(line, limit=len(line)) for line in text.split("\n")]
        return super().render_str("\n".join(lines), **{**options, "markup": False, "emoji": False})


console = Terminal(width=None if sys.stdout.isatty() else 120)
errors = Terminal(stderr=True)
