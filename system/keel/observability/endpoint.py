"""The HTTP endpoint of a run, and how a Prometheus finds it.

    GET /metrics     the numbers                                      Prometheus, people
    GET /sd          where they are, as HTTP service discovery        Prometheus
    GET /-/healthy   200 while the process answers                    probes of Kubernetes
    GET /            this list                                        people

What /sd answers also lies in metrics.discovery_directory, for Prometheus' file discovery. All of it can be read by
anything that reaches the port: there is no password, and no secret.
"""

import contextlib
import json
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import xxhash

from keel import files
from keel.config.monitoring import MetricsSettings, is_address
from keel.errors import ConfigError

_SILENCE_SECONDS = 10.0
"""A client that neither asks nor reads for this long is disconnected."""
_EVERY_ADDRESS = ("0.0.0.0", "::")
_FAR_AWAY = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses of documentation: nothing is sent to them, they only have a route."""
_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"


def check(settings: MetricsSettings) -> None:
    """Check that the port is free and the discovery folder can be written. Raises ConfigError."""
    _Server(settings).server_close()
    if settings.discovery_directory is not None:
        folder = Path(settings.discovery_directory).resolve()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(
                f"metrics.discovery_directory={folder}: cannot be written; expected a folder that Prometheus reads"
            )


@contextlib.contextmanager
def serving(settings: MetricsSettings, run: str, directory: Path, page: WSGIApplication) -> Iterator[str]:
    """Answer for the run of a directory while the block lasts; the URL of its page. Raises ConfigError.

    The discovery file goes when the block ends by itself or is interrupted. It stays when the run fails or is killed:
    its target is down then, which an alert should report. A resumed run writes the same file.
    """
    server = _Server(settings)
    target = f"{_in_url(_reached_by(settings))}:{server.server_port}"
    identity = f"{run}-{_digest(directory)}"
    labels = {"run": run, "__meta_keel_directory": str(directory), "__meta_keel_identity": identity}
    discovery = json.dumps([{"targets": [target], "labels": labels}]).encode() + b"\n"
    server.set_app(_application(page, discovery))
    threading.Thread(target=server.serve_forever, name="endpoint", daemon=True).start()
    paths = [Path(folder).resolve() / f"keel-{identity}.json" for folder in [settings.discovery_directory] if folder]
    try:
        for file in paths:
            files.write(file, discovery)
        yield f"http://{target}/metrics"
    except KeyboardInterrupt:
        _remove(paths)
        raise
    else:
        _remove(paths)
    finally:
        server.shutdown()
        server.server_close()


def _remove(paths: list[Path]) -> None:
    for file in paths:
        file.unlink(missing_ok=True)


def _application(page: WSGIApplication, discovery: bytes) -> WSGIApplication:
    """Route requests by their path."""
    paths = "/metrics    the numbers of this run\n/sd         Prometheus HTTP service discovery\n/-/healthy  200\n"
    fixed = {"/sd": (_JSON, discovery), "/-/healthy": (_TEXT, b"healthy\n"), "/": (_TEXT, paths.encode())}

    def application(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return page(environ, start)
        if path not in fixed:
            return _answer(start, "404 Not Found", _TEXT, paths.encode())
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(start, "405 Method Not Allowed", _TEXT, b"expected GET\n", ("Allow", "GET, HEAD"))
        return _answer(start, "200 OK", *fixed[path])

    return application


def _answer(start: StartResponse, status: str, kind: str, body: bytes, *more: tuple[str, str]) -> list[bytes]:
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *more])
    return [body]


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: standard error belongs to the run."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A server that listens from the start, with a thread per connection, so that a slow client delays no other."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, settings: MetricsSettings) -> None:
        try:
            addresses = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self.address_family, _, _, _, address = addresses[0]
            super().__init__((str(address[0]), settings.port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"metrics.port={settings.port}: cannot listen on {settings.host} ({error.strerror});"
                " expected a free port, or metrics.port=0 for any"
            ) from None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server's own asks the name service, which may take its time
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # of a client that went away, or fell silent
            super().handle_error(request, client_address)


def _reached_by(settings: MetricsSettings) -> str:
    if settings.advertise is not None:
        return settings.advertise
    return _own_address() if settings.host in _EVERY_ADDRESS else settings.host


def _own_address() -> str:
    """The address this machine has towards others; its name, where it has none."""
    for family, far_away in _FAR_AWAY.items():
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far_away, 9))
            return str(probe.getsockname()[0])
    return socket.gethostname()


def _in_url(host: str) -> str:
    return f"[{host}]" if is_address(host) and ":" in host else host


def _digest(directory: Path) -> str:
    """8 hexadecimal digits that stay with a run directory. The inode tells apart equal paths of two machines."""
    return xxhash.xxh3_64_hexdigest(f"{directory}:{directory.stat().st_ino}".encode())[:8]
