"""What a scrape of the metrics page costs while 64 actors are busy, and what it costs the run.

    python benchmarks/scrape_cost.py [--actors 64] [--scrapes 500] [--call-seconds 0.1]
    python benchmarks/scrape_cost.py --run [--steps 120] [--block-seconds 10]

The first simulates: an event loop in a thread of its own in which every actor of the three roles, every `call-seconds`,
changes the utilization of its role and the gauge of its line, as a pool does at the start and end of a call; once a
second everything of a step is set and counted and a line of metrics.jsonl written. Every metric has a series, and as
many as there are actors where its label is free: names of rewards, terms, heads, reasons. (Roles and phases are few and
fixed.) A client asks for the page over HTTP, again and again; printed are milliseconds from the connection to the last
byte, and the largest delay of the loop beyond what it slept.

The second is a real run of a tiny model (vLLM, Ray, DeepSpeed) without a pause in it. A client asks for its page once a
second in every other block of `block-seconds`, and nothing in those between; printed are seconds from step to step of
both. A slow minute of the machine hits both alike.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from keel.config.monitoring import MetricsSettings
from keel.observability import endpoint
from keel.observability.metric_table import TABLE
from keel.observability.metrics import RunMetrics
from keel.observability.utilization import STAGES, Utilization

FIXED = ("role", "on", "phase", "stage")


@dataclass
class Cost:
    """Of some scrapes."""

    milliseconds: list[float]
    page_bytes: int
    series: int
    calls: int
    """Of the actors, meanwhile."""
    late_milliseconds: float
    """Largest delay of the actors' event loop."""

    def quantile(self, share: float) -> float:
        return sorted(self.milliseconds)[min(int(share * len(self.milliseconds)), len(self.milliseconds) - 1)]

    def __str__(self) -> str:
        return (
            f"{len(self.milliseconds)} scrapes: p50 {self.quantile(0.5):.1f} ms, p99 {self.quantile(0.99):.1f} ms,"
            f" largest {max(self.milliseconds):.1f} ms; page {self.page_bytes} bytes, {self.series} series;"
            f" {self.calls} calls of the actors meanwhile, loop late by {self.late_milliseconds:.1f} ms at most"
        )


@dataclass
class Actors:
    """Callers in an event loop, as the pools of a run are."""

    metrics: RunMetrics
    count: int
    call_seconds: float
    utilization: Utilization = field(default_factory=Utilization)
    running: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    calls: int = 0
    late_seconds: float = 0.0

    async def work(self, stop: threading.Event) -> None:
        acting = [asyncio.create_task(self._act(number, stop)) for number in range(self.count)]
        step = 0
        while not stop.is_set():
            step += 1
            self._step(step)
            await self._sleep(1.0)
        await asyncio.gather(*acting)

    async def _act(self, number: int, stop: threading.Event) -> None:
        role = STAGES[number % len(STAGES)]
        serving, change = -(-(self.count - number % len(STAGES)) // len(STAGES)), 1
        while not stop.is_set():
            self.running[role] += change
            change = -change
            waiting = serving - self.running[role]
            self.utilization.occupied(role, self.running[role], waiting, serving)
            self.metrics.set({"batches_waiting": {role: float(waiting)}})
            self.calls += 1
            await self._sleep(self.call_seconds)

    async def _sleep(self, seconds: float) -> None:
        began = time.monotonic()
        await asyncio.sleep(seconds)
        self.late_seconds = max(self.late_seconds, time.monotonic() - began - seconds)

    def _values(self, label: str) -> list[str]:
        return list(STAGES) if label in FIXED else [f"name-{number:02d}" for number in range(self.count)]

    def _step(self, step: int) -> None:
        """Everything there is to set and count."""
        self.metrics.add(self.utilization.drain())
        for metric in TABLE:
            names = [name for label in metric.labels[:1] for name in self._values(label)]
            value = dict.fromkeys(["/".join([name] * len(metric.labels)) for name in names], step / 3) or step / 3
            (self.metrics.set if metric.kind == "gauge" else self.metrics.add)({metric.name: value})
        self.metrics.record(step, time.time())


@contextmanager
def acting(folder: Path, count: int, call_seconds: float) -> Iterator[tuple[str, Actors]]:
    """The URL of a page, and the actors that fill it from another thread."""
    actors = Actors(RunMetrics("simulated", folder / "metrics.jsonl"), count, call_seconds)
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(actors.work(stop)), daemon=True)
    with endpoint.serving(MetricsSettings(port=0), "simulated", folder, actors.metrics.page) as url:
        thread.start()
        while not actors.calls:
            time.sleep(0.01)
        try:
            yield url, actors
        finally:
            stop.set()
            thread.join()


def measure(folder: Path, actors: int = 64, scrapes: int = 500, call_seconds: float = 0.1, tries: int = 1) -> Cost:
    """The fastest of `tries` scrapes in a row counts; the others waited for something else on the machine."""
    with acting(folder, actors, call_seconds) as (url, working):
        page = ask(url)
        working.calls, working.late_seconds = 0, 0.0
        taken = [min(_milliseconds(url) for _ in range(tries)) for _ in range(scrapes)]
        series = sum(not line.startswith(b"#") for line in page.splitlines())
        return Cost(taken, len(page), series, working.calls, 1000 * working.late_seconds)


def _milliseconds(url: str) -> float:
    began = time.perf_counter()
    ask(url)
    return 1000 * (time.perf_counter() - began)


def ask(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bytes(answer.read())


def with_and_without(steps: int, block_seconds: float) -> dict[bool, list[float]]:
    """Seconds from step to step of a real run, by whether its page was asked for once a second then."""
    import yaml

    from keel.cli import doctor
    from keel.learner import tiny

    blocks: list[float] = []  # when each began; every other one, from the second, is scraped
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = doctor.self_test_config(folder, str(tiny.write(folder / "model")))
        tree = yaml.safe_load(config.read_text())
        tree["run"] |= {"steps": steps}
        tree |= {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": 0}}
        tree["metrics"] = {"port": 0, "discovery_directory": str(folder)}
        config.write_text(yaml.safe_dump(tree))
        lines = folder / "run" / "metrics.jsonl"
        with subprocess.Popen([sys.executable, "-m", "keel", "train", str(config)], stdout=subprocess.DEVNULL) as run:
            while run.poll() is None and not (lines.exists() and lines.read_text().count("\n") >= 5):
                time.sleep(0.2)
            blocks.append(time.time())
            while run.poll() is None:
                if time.time() - blocks[-1] > block_seconds:
                    blocks.append(time.time())
                for file in folder.glob("keel-*.json") if len(blocks) % 2 == 0 else []:
                    ask(f"http://{json.loads(file.read_text())[0]['targets'][0]}/metrics")
                time.sleep(1.0)
        times = [json.loads(line)["time"] for line in lines.read_text().splitlines()]
    found: dict[bool, list[float]] = {True: [], False: []}
    for early, late in itertools.pairwise(times):
        if early >= blocks[0]:
            found[sum(block <= early for block in blocks) % 2 == 0].append(late - early)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=64)
    parser.add_argument("--scrapes", type=int, default=500)
    parser.add_argument("--call-seconds", type=float, default=0.1)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--block-seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    if arguments.run:
        for scraped, seconds in with_and_without(arguments.steps, arguments.block_seconds).items():
            middle, quartiles = statistics.median(seconds), statistics.quantiles(seconds, n=4)
            print(
                f"{'with' if scraped else 'without'} a scrape a second: {len(seconds)} steps, median {middle:.3f} s,"
                f" middle half {quartiles[0]:.3f} to {quartiles[2]:.3f} s"
            )
        return
    with tempfile.TemporaryDirectory() as folder:
        print(measure(Path(folder), arguments.actors, arguments.scrapes, arguments.call_seconds))


if __name__ == "__main__":
    main()
