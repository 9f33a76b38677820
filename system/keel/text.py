"""Make third-party text safe to show: prompts, completions, replies, file names, messages of errors."""

import unicodedata

LIMIT_CHARACTERS = 2000


def printable(text: str, limit: int = LIMIT_CHARACTERS) -> str:
    """Write a text on one line, in characters that a terminal shows and never acts on.

    Control characters, escapes, line ends, bidirectional overrides and half surrogate pairs are written out (`\\x1b`,
    `\\n`, `\\u202e`, `\\ud800`), every space is a plain one. The middle of a text of more than `limit` characters is
    replaced by how many are left out.
    """
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[len(text) - half :]}"
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if unicodedata.category(character) == "Zs" else repr(character)[1:-1]


def one_line(error: object) -> str:
    """Flatten an error's message: each line end or run of spaces becomes one space."""
    return " ".join(str(error).split())


def last_line(text: str) -> str:
    """The last line of an error's text, without the traceback that Ray puts before it."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"
