"""A display that shows nothing."""

from typing import Any


class Quiet:
    """A display that shows nothing, and keeps all."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.now = ""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def doing(self, what: str) -> None:
        self.now = what

    def step(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
