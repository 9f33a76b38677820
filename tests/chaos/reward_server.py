"""A reward server that fails on demand: the next requests, in a given way, then answers as before."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAYS = ("http_500", "http_slow", "http_not_json", "http_wrong_length", "http_closed")
SLOW_SECONDS = 4.0
"""Longer than the timeout of the runs' reward."""


class RewardServer:
    """Reward of a completion: its share of vowels. `fail` makes the next requests fail."""

    def __init__(self) -> None:
        self._way, self._left = "", 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                completions = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["completions"]
                outer.answer(self, completions)

            def log_message(self, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def fail(self, way: str, requests: int) -> None:
        with self._lock:
            self._way, self._left = way, requests

    @property
    def failing(self) -> bool:
        return self._left > 0

    def answer(self, handler: BaseHTTPRequestHandler, completions: list[str]) -> None:
        with self._lock:
            way, self._left = (self._way if self._left else ""), max(0, self._left - 1)
        rewards = [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
        if way == "http_slow":
            time.sleep(SLOW_SECONDS)
        if way == "http_closed":
            handler.close_connection = True
            return
        body = json.dumps({"rewards": rewards[1:] if way == "http_wrong_length" else rewards}).encode()
        if way == "http_not_json":
            body = b"<html>busy</html>"
        try:
            handler.send_response(500 if way == "http_500" else 200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            return  # the client's deadline was shorter
