"""A real Prometheus on loopback for a test: started with the shipped configuration, asked through its HTTP API."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from commands import wait_for

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
PATIENCE_SECONDS = 400
Samples = list[tuple[float, float]]
"""(Unix time, value), in order."""


def program(name: str) -> str:
    """The path of prometheus or promtool; the test is skipped where it is missing."""
    result = shutil.which(name)
    if result is None:
        pytest.skip(f"{name} is not there (deploy/prometheus/fetch.sh FOLDER, and the folder on PATH)")
    return result


def shipped(folder: Path, discovery: Path, address: str, scrape_seconds: int = 1) -> str:
    """deploy/prometheus/prometheus.yml with other places and shorter times, and nothing else."""
    text = CONFIG.read_text()
    changes = {
        "http://localhost:9464/sd": f"http://{address}/sd",
        "discovery/keel-*.json": str(discovery / "keel-*.json"),
        "http://localhost:8265/": f"http://{address}/no-ray/",
        "rules/*.yml": str(CONFIG.parent / "rules" / "*.yml"),
        "scrape_interval: 5s": f"scrape_interval: {scrape_seconds}s",
        "evaluation_interval: 15s": f"evaluation_interval: {scrape_seconds}s",
    }
    for ours, theirs in changes.items():
        assert ours in text, ours
        text = text.replace(ours, theirs)
    return text


@dataclass(frozen=True)
class Series:
    labels: dict[str, str]
    samples: Samples

    @property
    def name(self) -> str:
        return self.labels.get("__name__", "")

    @property
    def value(self) -> float:
        return self.samples[-1][1]


class Prometheus:
    """Runs while the block lasts, with its storage in `folder`."""

    def __init__(self, folder: Path, config: str) -> None:
        self.program = program("prometheus")
        self.folder, self.config = folder, config
        self.address = ""

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "prometheus.yml").write_text(self.config)
        log = self.folder / "log"
        command = [self.program, "--config.file=prometheus.yml", "--storage.tsdb.path=storage"]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--web.listen-address=127.0.0.1:0"], cwd=self.folder, stderr=file, stdout=file
            )
        try:
            self._wait(lambda: bool(re.search(r'msg="Listening on" address=(\S+)', log.read_text())), "an address")
            self.address = re.findall(r'msg="Listening on" address=(\S+)', log.read_text())[0]
            self._wait(self._ready, "Prometheus to be ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _wait(self, condition: Any, what: str) -> None:
        wait_for(lambda: condition() or self.process.poll() is not None, PATIENCE_SECONDS, what)
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]

    def _ready(self) -> bool:
        try:
            return self.page("/-/ready") != ""
        except OSError:
            return False

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as answer:
            return answer.read().decode()

    def api(self, path: str, **parameters: Any) -> Any:
        """What GET /api/v1/PATH answers."""
        answer = json.loads(self.page(f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str, time: float | None = None) -> list[Series]:
        """Series of an expression, at a Unix time or now. A range expression (`x[30s]`) gives all its samples."""
        answer = self.api("query", query=expression, **({} if time is None else {"time": f"{time:.3f}"}))
        if answer["resultType"] in ("scalar", "string"):
            return [Series({}, [_sample(answer["result"])])]
        return [
            Series(item["metric"], [_sample(pair) for pair in item.get("values") or [item["value"]]])
            for item in answer["result"]
        ]

    def value(self, expression: str, time: float | None = None) -> float:
        """The one number of an expression."""
        (series,) = self.query(expression, time)
        return series.value

    def wait_until(self, expression: str, seconds: float = PATIENCE_SECONDS) -> list[Series]:
        """Ask until an expression has an answer, as `keel_steps_total > 3` has; the answer."""
        deadline = time.monotonic() + seconds
        while not (result := self.query(expression)):
            assert time.monotonic() < deadline, f"{expression}: nothing within {seconds:.0f} s"
            time.sleep(0.3)
        return result


def _sample(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
