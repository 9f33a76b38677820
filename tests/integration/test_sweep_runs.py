"""A sweep of two arms and two seeds on the tiny model, interrupted as Ctrl-C does it, and started again."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from commands import finish
from keel import checkpoint, files
from live import last_step, wait

Start = Callable[..., Any]


@pytest.mark.slow
def test_an_interrupted_sweep_makes_what_is_missing(
    write_config: Start, keel: Start, tmp_path: Path, pace: Path
) -> None:
    """Ctrl-C in the second run: the first is not made again, the second goes on, the table is of all four."""
    rewards = [{"name": "low", "source": "rewards:paced"}]
    write_config("base", rewards=rewards, run={"steps": 3}, checkpoint={"every_steps": 1})
    tree = {
        "base": "base/config.yaml",
        "arms": {"kl": None, "none": {"regularizer.kl.coefficient": 0.0}},
        "seeds": [0, 1],
        "directory": str(tmp_path / "sweep"),
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    first, second = tmp_path / "sweep/kl/seed-0", tmp_path / "sweep/none/seed-0"
    process = keel("sweep", str(tmp_path / "sweep.yaml"))
    wait(process, lambda: last_step(first) >= 3, "the first run")
    pace.write_text("3.0")  # or the second could end before it is interrupted
    wait(process, lambda: last_step(second) >= 1 and checkpoint.latest(second), "a step of the second run")
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    pace.unlink()
    assert code == 130 and "interrupted: 1 of 4 runs are done" in out, err
    assert last_step(second) < 3
    written = (first / "config.yaml").stat().st_mtime_ns
    code, out, err = finish(keel("sweep", str(tmp_path / "sweep.yaml")))
    assert code == 0, err
    assert "[1/4] kl, seed 0  done" in out and "equal steps (3)" in out and "minus kl (2 seeds) (paired)" in out
    assert "resuming from step-" in out and (first / "config.yaml").stat().st_mtime_ns == written
    assert [e["event"] for e in files.read_json_lines(second / "events.jsonl")].count("resume") == 1
    table = pq.read_table(tmp_path / "sweep/metrics.parquet").to_pylist()
    rewards_of = {(row["arm"], row["seed"], row["step"]) for row in table if row["metric"] == "reward"}
    assert rewards_of == {(arm, seed, step) for arm in ("kl", "none") for seed in (0, 1) for step in (1, 2, 3)}
    start = [row["value"] for row in table if row["metric"] == "evaluation/proxy" and row["step"] == 0]
    assert len(start) == 4 and len(set(start)) == 1  # the same prompts and seeds of samples before training
    assert (tmp_path / "sweep/frontier.png").exists()
    process = keel("sweep", str(tmp_path / "sweep.yaml"), "--dry-run")
    assert finish(process)[1].count(": done (") == 4
