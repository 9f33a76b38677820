"""Makes the page of a report: one HTML file with its numbers as JSON, its style and its scripts inside.

Charts are plain SVG, drawn in the browser by report_assets/charts.js from the embedded numbers. A plotting library
was weighed: plotly.js is 4.6 MB and bokeh 1 MB of script a page, neither is among the pinned packages, and what a
report needs (lines, bands, marks, a cursor) takes 300 lines. Drawn in Python, a chart would not fit a phone.

Texts of a run (prompts, completions, reasons) are hostile until shown otherwise. They stand in a JSON block in ASCII,
in which <, > and & are escaped too, and scripts insert them with textContent alone. The content security policy
names the digests of the page's own scripts and style: no other runs, and no request leaves the page.
"""

import base64
import dataclasses
import hashlib
import json
import math
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from keel import files
from keel.analysis import report
from keel.errors import ConfigError
from keel.text import one_line

_SCRIPTS = ("charts.js", "rollouts.js", "page.js")
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
"""What HTML could read as markup; line separators are escaped by ASCII."""
_FOLLOWING = " connect-src 'self';"
"""Added to the policy of a live page, which asks its own server for the state of the files."""


def write(directories: list[Path], path: Path) -> int:
    """Write the report of run directories; its size in bytes. Raises ConfigError, one line."""
    content = html(report.collect(directories)).encode()
    if path.is_dir():
        raise ConfigError(f"--output={path}: is a folder; expected a file, for instance {path / 'report.html'}")
    try:
        files.write(path, content)
    except OSError as error:
        raise ConfigError(f"--output={path}: {one_line(error.strerror or error)}; expected a file to write") from None
    return len(content)


def html(collected: report.Report, live: str = "") -> str:
    """The page as text; `live`: seconds between looks, and the state of the files, of a page that follows a run."""
    style, scripts = _asset("report.css"), [_asset(name) for name in _SCRIPTS]
    parts = {
        "{{policy}}": (
            f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none';{_FOLLOWING if live else ''}"
            f" style-src {_digest(style)}; script-src {' '.join(map(_digest, scripts))}"
        ),
        "{{live}}": live,
        "{{style}}": f"<style>{style}</style>",
        "{{scripts}}": "\n".join(f"<script>{script}</script>" for script in scripts),
        "{{numbers}}": as_json(collected),  # the last: its text is looked through for no further mark
    }
    page = _asset("report.html")
    for mark, text in parts.items():
        page = page.replace(mark, text)
    return page


def as_json(collected: report.Report) -> str:
    """The numbers as JSON that HTML cannot misread; what is not finite is null."""
    text = json.dumps(_finite(dataclasses.asdict(collected)), separators=(",", ":"), allow_nan=False)
    for character, escape in _ESCAPED.items():
        text = text.replace(character, escape)
    return text


def _finite(node: Any) -> Any:
    if isinstance(node, float):
        return node if math.isfinite(node) else None
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return [_finite(value) for value in node] if isinstance(node, list) else node


def _asset(name: str) -> str:
    return (resources("keel.analysis") / "report_assets" / name).read_text(encoding="utf8")


def _digest(text: str) -> str:
    """The source expression of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
