"""What the real libraries keep of a run, read back through their own readers. Skipped where one is not installed.

Every run here makes steps 1, 2 and 3, loses its learner after a checkpoint of step 1, makes step 2 again, is killed,
and is resumed from step 1 by another process.
"""

import json
import os
import pty
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import settings_for
from keel.observability import tracking
from keel.observability.metrics import RunMetrics
from keel.observability.tracking import Tracking

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
NAME = "reward/reward_component.gold"


class Run:
    """A run in a folder, shown by one library."""

    def __init__(self, folder: Path, library: str) -> None:
        rewards = [
            {"name": "rule", "source": "tests:length"},
            {"name": "r", "kind": "http", "source": "http://h/x", "headers": {"X-Key": "${KEY}"}},
        ]
        subject = {"trackers": [library], "project": "keel-test", "tags": ["tag"], "finish_seconds": 60}
        self.settings = settings_for(tracking=subject, rewards=rewards)
        self.folder = folder

    def start(self, version: int) -> Tracking:
        self.notes: list[str] = []
        self.metrics = RunMetrics("test", self.folder / "metrics.jsonl")
        tracking = Tracking(self.settings, self.folder, self.metrics, self.notes.append)
        tracking.begin(version)
        return tracking

    def step(self, tracking: Tracking, step: int, value: float) -> None:
        line = {"step": step, "time": 1.0, "reward": value, "reward_component": {"gold": value}}
        tracking.step(line | {"idle_seconds_total": {"learner/generator": 4.0}})

    def first_process(self) -> None:
        tracking = self.start(0)
        tracking.evaluated(0, {"step": 0.0, "proxy": 1.5})
        for step in (1, 2, 3):
            self.step(tracking, step, step / 8)
        tracking.begin(1)
        self.step(tracking, 2, 0.75)
        tracking.finish("interrupted")
        assert self.notes == []

    def second_process(self) -> None:
        tracking = self.start(1)
        for step in (2, 3):
            self.step(tracking, step, float(step))
        tracking.evaluated(3, {"step": 3.0, "proxy": 2.5})
        tracking.finish("finished")
        assert self.notes == []

    @property
    def identity(self) -> str:
        return json.loads((self.folder / "tracking.json").read_text())["identity"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tracking, "_INTERRUPTED_SECONDS", 60.0)  # libraries are imported meanwhile
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "TRACKIO_DIR", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)


def test_tensorboard_shows_the_steps_that_stand(tmp_path: Path, environment: None) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path, "tensorboard")
    run.first_process()
    run.second_process()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {
        "reward/reward": [(1, 0.125), (2, 2.0), (3, 3.0)],
        NAME: [(1, 0.125), (2, 2.0), (3, 3.0)],
        "perf/idle_seconds_total.learner.generator": [(1, 4.0), (2, 4.0), (3, 4.0)],
        "evaluation/proxy": [(0, 1.5), (3, 2.5)],
    }
    (text,) = {event.tensor_proto.string_val[0].decode() for event in events.Tensors("configuration/text_summary")}
    assert "| rewards.0.source | tests:length |" in text and "KEY" not in text


def test_tensorboard_shows_a_run_that_began_anew_once(tmp_path: Path, environment: None) -> None:
    """Killed before its first checkpoint."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path, "tensorboard")
    for value in (1.0, 2.0):
        tracking = run.start(0)
        tracking.evaluated(0, {"step": 0.0, "proxy": value})
        run.step(tracking, 1, value)
        tracking.finish("failed")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("evaluation/proxy")] == [(0, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("reward/reward")] == [(1, 2.0)]


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, environment: None) -> None:
    mlflow = pytest.importorskip("mlflow")
    run = Run(tmp_path, "mlflow")
    run.first_process()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("keel-test").experiment_id
    (result,) = client.search_runs([experiment])
    assert result.info.status == "KILLED"
    run.second_process()
    (result,) = client.search_runs([experiment], "tags.`keel_tag.tag` = 'true'")
    assert (result.info.status, result.info.run_name) == ("FINISHED", "test")
    assert result.data.metrics == {
        "reward/reward": 3.0,
        NAME: 3.0,
        "perf/idle_seconds_total.learner.generator": 4.0,
        "evaluation/proxy": 2.5,
    }
    history = [(point.step, point.value) for point in client.get_metric_history(result.info.run_id, NAME)]
    assert sorted(history) == [(1, 0.125), (2, 0.25), (2, 0.75), (2, 2.0), (3, 0.375), (3, 3.0)]
    assert result.data.params["rewards.0.source"] == "tests:length" and result.data.params["run.steps"] == "4"
    assert result.data.params["rewards.1.headers.X-Key"] == "(not shown)"


def test_trackio_goes_on_with_the_same_run(tmp_path: Path, environment: None) -> None:
    trackio = pytest.importorskip("trackio")  # it reads TRACKIO_DIR here: one test of it a process
    from trackio.utils import TRACKIO_DIR

    trackio.sqlite_storage.TRACKIO_DIR = tmp_path / "trackio"
    assert TRACKIO_DIR.is_relative_to(tmp_path / "home")
    run = Run(tmp_path, "trackio")
    run.first_process()
    run.second_process()
    (result,) = trackio.Api().runs("keel-test")
    assert result.name == f"test-{run.identity}"
    assert result.config["rewards.0.source"] == "tests:length" and "KEY" not in json.dumps(result.config)
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("keel-test", result.name)
    read = [(row["step"], row[NAME]) for row in logs if NAME in row]
    assert sorted(read) == [(1, 0.125), (2, 0.25), (2, 0.75), (2, 2.0), (3, 0.375), (3, 3.0)]
    assert [(row["step"], row["evaluation/proxy"]) for row in logs if "evaluation/proxy" in row] == [(0, 1.5), (3, 2.5)]


def test_wandb_keeps_a_step_once(tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Run(tmp_path, "wandb")
    run.first_process()
    wandb.teardown()  # as at the end of the process: its service writes the rest of the file
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert path.name == f"run-{run.identity}.wandb"
    steps: dict[int, dict[str, float]] = {}
    summary: dict[str, float] = {}
    for record in records(path):
        if record.HasField("run"):
            settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert (record.run.project, record.run.display_name, list(record.run.tags)) == (
                "keel-test",
                "test",
                ["tag"],
            )
            assert settings["rewards.0.source"] == "tests:length"
            assert settings["rewards.1.headers.X-Key"] == "(not shown)"
        if record.HasField("history"):
            items = {name(item): json.loads(item.value_json) for item in record.history.item}
            steps[record.history.step.num] = {key: value for key, value in items.items() if key[0] != "_"}
        if record.HasField("summary"):
            summary |= {name(item): json.loads(item.value_json) for item in record.summary.update}
        if record.HasField("exit"):
            assert record.exit.exit_code == 130
    idle = {"perf/idle_seconds_total.learner.generator": 4.0}
    of_steps = {
        step: {"reward/reward": step / 8, NAME: step / 8, **idle} for step in (1, 2, 3)
    }  # the first numbers stay
    assert steps == {0: {"evaluation/proxy": 1.5}, **of_steps}


ASKED = """
import sys
from pathlib import Path
from test_tracking_libraries import Run
run = Run(Path(sys.argv[1]), "wandb")
tracking = run.start(0)
run.step(tracking, 1, 0.5)
tracking.finish("finished")
print(run.metrics.totals["tracker_failures_total"], run.notes)
"""


def test_wandb_without_a_key_does_not_ask_at_the_terminal(
    tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for variable in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    program = f"import sys; sys.path[:0] = {sys.path!r}\n{ASKED}"
    terminal, end = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], stdin=end, stderr=end, stdout=subprocess.PIPE, timeout=120
        )
    finally:
        os.close(end)
        os.close(terminal)
    answer = done.stdout.decode()
    assert "{'wandb': 2.0}" in answer and "did not start: UsageError" in answer, answer


def name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes, a protobuf each."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the end of a block holds no header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""
