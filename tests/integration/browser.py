"""A headless Chromium that opens a page, runs JavaScript in it, presses keys and says what went wrong."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_SECONDS = 60.0
ANSWER_SECONDS = 60.0


def program() -> str:
    """The path of a Chromium; the test is skipped where there is none."""
    paths = [path for name in NAMES if (path := shutil.which(name))]
    if not paths:
        pytest.skip("no chromium on PATH (Debian: apt-get install -y --no-install-recommends chromium)")
    return paths[0]


class Tab:
    """One tab, by the DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._numbers = connection, itertools.count(1)
        self.problems: list[str] = []
        """Messages of the console and errors of scripts, of the security policy too."""
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the browser and wait for its result."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=ANSWER_SECONDS))
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(parameters))
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, page: Path | str) -> float:
        """Open a file or an address and wait until it is loaded and drawn; the seconds by the page's own clock."""
        address = page if isinstance(page, str) else page.as_uri()
        self.send("Page.navigate", url=address)
        deadline = time.monotonic() + ANSWER_SECONDS
        while self.run("document.readyState") != "complete" or self.run("location.href") != address:
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.01)
        return float(
            self.run("new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))")
            / 1e3
        )

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of its promise, as JSON has it."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        """Press and release a key."""
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **fields, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **fields)

    def show_as(self, width: int, height: int, scheme: str = "light") -> None:
        """Set the size of the window and whether the system is dark."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A tab of a new browser, whose profile lies in the folder."""
    port_file = folder / "DevToolsActivePort"
    command = [program(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    places = [f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
    process = subprocess.Popen([*command, *places], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not port_file.is_file() or not port_file.read_text().count("\n"):
            assert process.poll() is None and time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        with _attached(int(port_file.read_text().splitlines()[0])) as connection:
            yield Tab(connection)
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def _attached(port: int) -> Iterator[ClientConnection]:
    import httpx

    targets = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json()
    address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
    with connect(address, max_size=2**27, proxy=None) as connection:
        yield connection
