"""A real run to be mistreated: the command line in its own process, its files, and the processes of its Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

import chaos_rewards
import keel
from keel import files
from keel.cli import doctor
from reward_server import RewardServer

PROCESSES = {
    "generator": "VllmGenerator",
    "reference": "ReferenceScorer",
    "scorer": "RewardScorer",
    "learner": "DeepSpeedLearner",
    "buffer": "RolloutBuffer",
    "control": "Control",
}
GROUPS_PER_STEP = 2
DEADLINE_SECONDS = 40
"""A generator batch, a score, a learner step: what hangs longer is lost."""
RECOVERY_SECONDS = 900


class Arena:
    """One run directory, and the process that works on it."""

    def __init__(self, folder: Path, model: Path, steps: int, staleness: int, pace_seconds: float) -> None:
        self.folder, self.run = folder, folder / "run"
        self.server = RewardServer()
        self._pace = folder / "pace"
        self._pace.write_text(str(pace_seconds))
        self.config = self._write_config(model, steps, staleness)
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}

    def _write_config(self, model: Path, steps: int, staleness: int) -> Path:
        path = doctor.self_test_config(self.folder, str(model))
        tree = yaml.safe_load(path.read_text())
        tree["run"] |= {"name": "chaos", "steps": steps}
        tree["rewards"] = [
            {"name": "low", "source": "chaos_rewards:paced"},
            {"name": "vowels", "kind": "http", "source": self.server.url, "timeout_seconds": 2, "retries": 4},
        ]
        tree["buffer"] = {"groups_per_step": GROUPS_PER_STEP, "groups_per_batch": 1, "max_staleness": staleness}
        tree["generators"]["count"] = 2
        tree["learners"]["count"] = 2
        tree["checkpoint"] = {"every_steps": 5, "keep": 3}
        tree["evaluation"] = {"every_steps": 0}
        tree["failures"] = {"retries": 8, "max_rebuilds": 1000, "degrade_after_seconds": 60, "max_failed_ratio": 1.0}
        tree["deadlines"] = {f"{what}_seconds": DEADLINE_SECONDS for what in ("generate", "score", "step", "load")}
        tree["deadlines"]["start_seconds"] = 600
        path.write_text(yaml.safe_dump(tree))
        return path

    def start(self) -> None:
        """Start the run, or go on with it."""
        going_on = (self.run / "config.yaml").is_file()
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background job passes on that it is ignored
        log = (self.folder / "log.txt").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keel", *(["resume", str(self.run)] if going_on else ["train", str(self.config)])],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=self.variables(),
        )

    def variables(self) -> dict[str, str]:
        """Environment of a run in this arena."""
        paths = [str(Path(__file__).parent), str(Path(keel.__file__).parent.parent)]
        subject = {"PYTHONPATH": os.pathsep.join(paths), chaos_rewards.PACE: str(self._pace), "HF_HUB_OFFLINE": "1"}
        return os.environ | subject | self.environment

    def hurry(self) -> None:
        """No more pauses: the run goes to its end as fast as it can."""
        self._pace.unlink(missing_ok=True)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def victims(self, role: str) -> list[psutil.Process]:
        """Processes of a role, by age."""
        assert self.process is not None
        result = []
        for child in self.processes():
            try:
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if title.startswith(f"ray::{PROCESSES[role]}"):
                result.append(child)
        return sorted(result, key=lambda child: child.pid)

    def processes(self) -> list[psutil.Process]:
        """Everything the run has started."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def end(self, *signals: signal.Signals) -> None:
        """Send signals to the driver alone and wait until it and all it started are gone."""
        assert self.process is not None
        started = [item for item in self.processes() if not _agent_of_ray(item)]
        for item in signals:
            self.process.send_signal(item)
            time.sleep(0.3)
        self.process.wait(180)
        _, alive = psutil.wait_procs(started, timeout=180)
        assert not alive, f"left behind: {[item.cmdline()[:1] for item in alive if item.is_running()]}"

    def kill_all(self) -> None:
        """Leave nothing of the run, whatever state it is in."""
        if self.process is None:
            return
        for child in [*self.processes(), psutil.Process(self.process.pid)] if self.running() else []:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(30)

    def events(self, since: float = 0.0, *names: str, **fields: Any) -> list[dict[str, Any]]:
        """Events of some names and fields since a time."""
        result = files.read_json_lines(self.run / "events.jsonl")
        return [
            event
            for event in result
            if event["time"] >= since
            and (not names or event["event"] in names)
            and all(event.get(key) == value for key, value in fields.items())
        ]

    def last_step(self) -> dict[str, Any]:
        lines = files.read_json_lines(self.run / "metrics.jsonl")
        return lines[-1] if lines else {"step": 0, "time": 0.0}

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = RECOVERY_SECONDS) -> Any:
        """Wait until something true comes back, and return it; a run that ended meanwhile is an error."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert self.running(), (
                f"the run ended ({self.process and self.process.returncode}) before {what}; {self.tail()}"
            )
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s; {self.tail()}"
            time.sleep(0.05)
        return result

    def wait_for_step(self, since: float) -> None:
        self.wait(lambda: self.last_step()["time"] > since, "a step")

    def tail(self) -> str:
        log = (self.folder / "log.txt").read_text(errors="replace")[-1500:]
        return f"{log}\nlast events: {json.dumps(self.events()[-5:])}"


def _agent_of_ray(process: psutil.Process) -> bool:
    """Ray's own agents end a minute after their raylet, having tried to tell a GCS that is gone; they hold nothing."""
    try:
        return process.cmdline()[:1] in (["ray::DashboardAgent"], ["ray::RuntimeEnvAgent"])
    except psutil.Error:
        return False
