"""A paced run with two generators and a gold reward, which a real Prometheus watches by the shipped configuration."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import rewards
from commands import kill, start_keel
from keel.cli import doctor
from live import last_step, wait
from prometheus import Prometheus, program, shipped

RUN = "observed"
GENERATORS = 2
UP = 'up{job="keel"} == 1'
"""A scrape that took too long, as beside an engine that starts, ends every series until the next one."""


@dataclass
class Observed:
    """A live run that a Prometheus watches."""

    process: subprocess.Popen[str]
    directory: Path
    discovery: Path
    """The folder of metrics.discovery_directory."""
    pace: Path
    prometheus: Prometheus
    config: Path
    """Of Prometheus."""


@contextmanager
def observed(folder: Path, model: Path, steps: int) -> Iterator[Observed]:
    """The run, six steps after its start; it is killed where it is not over at the end of the block."""
    program("prometheus")
    directory, discovery, pace = folder / "run", folder / "discovery", folder / "pace"
    discovery.mkdir()
    pace.write_text("1.5")
    config = doctor.self_test_config(folder, str(model))
    tree = yaml.safe_load(config.read_text())
    tree["run"] = {"name": RUN, "steps": steps, "directory": str(directory)}
    tree["rewards"] = [
        {"name": "low", "source": "rewards:paced"},
        {"name": "gold", "source": "keel.examples:distinct_token_ratio", "role": "monitor"},
    ]
    tree["generators"] |= {"count": GENERATORS}
    tree["buffer"] |= {"max_staleness": 1}
    tree["scorers"] = {"threads": 1}
    tree["evaluation"], tree["checkpoint"] = {"every_steps": 20}, {"every_steps": 5}
    tree["metrics"] = {"port": 0, "discovery_directory": str(discovery)}
    config.write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(rewards.PACE, str(pace))
        process = start_keel("train", str(config))
    try:
        wait(process, lambda: list(discovery.glob("*.json")), "the discovery file")
        (group,) = json.loads(next(discovery.glob("*.json")).read_text())
        with Prometheus(folder / "prometheus", shipped(folder, discovery, group["targets"][0])) as prometheus:
            wait(process, lambda: last_step(directory) >= 6, "six steps")
            prometheus.wait_until("keel_steps_total >= 6")
            yield Observed(process, directory, discovery, pace, prometheus, folder / "prometheus" / "prometheus.yml")
    finally:
        kill(process)
