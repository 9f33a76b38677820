"""Serves the report of runs that last: a page made again whenever their files have changed.

    GET /        the page
    GET /state   a digest of sizes and times of the files; the page asks for it and reloads when it is another

It listens on the loopback address alone, and answers only requests that name it: prompts and completions are not for
pages of other hosts that a browser of this machine shows.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from keel import files, reads
from keel.analysis import report, report_page
from keel.errors import ConfigError, KeelError

_HOST = "127.0.0.1"
_LOOK_SECONDS = 10
_WATCHED = ("metrics.jsonl", "events.jsonl", "evaluations.jsonl", "frontier.arrow", "members/*/metrics.jsonl")
"""Files of a run that say that something new is there."""


@contextlib.contextmanager
def serving(directories: Sequence[Path], port: int) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """The URL and the server, which answers while it is run. Raises ConfigError for bad input."""
    page = _Page(directories)
    page.content()  # refuses bad directories before anything is served
    try:
        server = ThreadingHTTPServer((_HOST, port), _handler(page))
    except OSError as error:
        raise ConfigError(f"--port={port}: {error.strerror}; expected a free port, or 0 for any") from None
    with server:
        yield f"http://{_HOST}:{server.server_port}/", server


class _Page:
    """The newest page, made once for a state of the files."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._state, self._content = "", b""

    def state(self) -> str:
        paths = [path for run in self._directories for pattern in _WATCHED for path in sorted(run.glob(pattern))]
        seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if reads.is_there(path)]
        return files.digest_of(repr(seen).encode())

    def content(self) -> bytes:
        with self._lock:
            state = self.state()
            if state != self._state:
                collected = report.collect(self._directories)
                self._content, self._state = report_page.html(collected, f"{_LOOK_SECONDS} {state}").encode(), state
            return self._content

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, type and body for a path of the address."""
        try:
            if path == "/state":
                return 200, "text/plain", self.state().encode()
            if path == "/":
                return 200, "text/html", self.content()
        except (KeelError, OSError) as error:  # of files that are moved while they are read: the next look has them
            return 503, "text/plain", f"{error}\n".encode(errors="replace")
        return 404, "text/plain", b"expected / or /state\n"


def _handler(page: _Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client has left, as a tab does that is closed
                super().handle()

        def do_GET(self) -> None:
            name = (self.headers.get("Host") or "").rpartition(":")[0]
            if name not in (_HOST, "localhost"):
                self._answer(403, "text/plain", b"expected the address that keel report printed\n")
            else:
                self._answer(*page.answer(self.path))

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": len(body),
                "Cache-Control": "no-store",
            }
            for header, value in headers.items():
                self.send_header(header, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the terminal shows the address alone."""

    return Handler
