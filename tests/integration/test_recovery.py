"""Whole runs that are scaled, ended, doubled or poisoned while they run, through the command line on a tiny model."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import rewards
from conftest import finish, kill, wait_for
from test_runs import metrics_of

from keel import checkpoint, durable, schema

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
PATIENCE_SECONDS = 240
ENDS_WITHIN_SECONDS = 10
LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own agents end a minute after their raylet, having tried to tell a GCS that is gone; they hold nothing."""
Start = Callable[..., Any]


@pytest.fixture
def pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file whose seconds a batch of rewards takes; without it, none."""
    file = tmp_path / "pace"
    monkeypatch.setenv(rewards.PACE, str(file))
    return file


def events_of(run: Path, name: str, **fields: Any) -> list[dict[str, Any]]:
    found = durable.read_json_lines(run / "events.jsonl")
    return [each for each in found if each["event"] == name and all(each.get(k) == v for k, v in fields.items())]


def last_step(run: Path) -> int:
    lines = durable.read_json_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def two_more_steps(run: Path) -> None:
    before = last_step(run)
    wait_for(lambda: last_step(run) >= before + 2, PATIENCE_SECONDS, f"two steps after {before}")


def ranks_of(run: Path) -> list[int]:
    return [event["ranks"] for event in events_of(run, "running")]


def answer(keel: Start, *arguments: Any) -> Any:
    """The JSON of a command that ends well."""
    code, out, err = finish(keel(*map(str, arguments), "--json"))
    assert code == 0, err
    return json.loads(out)


def refusal(keel: Start, *arguments: Any, code: int = 2) -> str:
    """The one line of a command that is refused."""
    ended, _, err = finish(keel(*map(str, arguments)))
    lines = err.strip().splitlines()
    assert (ended, len(lines)) == (code, 1), err
    return lines[0]


def check_intact(keel: Start, run: Path) -> Any:
    report = answer(keel, "verify", run)
    assert report["intact"] and not report["findings"], report
    return report


def test_a_step_that_is_not_finite_ends_the_run_and_can_be_made_again(
    write_config: Start, keel: Start, tmp_path: Path
) -> None:
    """Also good steps made again: bit for bit, with a checkpoint before them and without one."""
    run = tmp_path / "poisoned" / "run"
    config = write_config(
        "poisoned",
        run={"name": "poisoned", "steps": 9, "directory": str(run)},
        objective={"kind": "custom", "source": "objectives:Poisoned", "options": {"step": 6}},
        checkpoint={"every_steps": 2, "keep": 1},
        evaluation={"every_steps": 0},
    )
    code, out, err = finish(keel("train", str(config)))
    lines = err.strip().splitlines()
    assert (code, len(lines)) == (1, 1), err
    assert "step 6: the loss is nan" in lines[0], err
    assert f"to see it again: keel replay {run} --step 6" in out, out
    assert [path.name for path in checkpoint.committed(run)] == ["step-000004"]
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5]
    rows = schema.from_bytes((run / "quarantine" / "step-000006.arrow").read_bytes())
    assert rows.num_rows == 4 and rows.column("reward").null_count == 0
    why = json.loads((run / "quarantine" / "step-000006.json").read_text())
    assert why["step"] == 6 and "the loss is nan" in why["reason"] and why["replay"] in out
    check_intact(keel, run)

    again = answer(keel, "replay", run, "--step", 6)
    assert again["start"] == 4 and again["refused"] == why["reason"], again
    for step, start in ((5, 4), (2, 0)):
        check_same_numbers(answer(keel, "replay", run, "--step", step), start)
    assert f"--step 7: {run} has no rows of step 7" in refusal(keel, "replay", run, "--step", 7)


def check_same_numbers(found: dict[str, Any], start: int) -> None:
    assert found["start"] == start and found["refused"] is None, found
    numbers = {name: pair for name, pair in found["numbers"].items() if pair[0] is not None}
    assert {"loss", "grad_norm", "reward", "kl_nats"} <= set(found["numbers"]), sorted(found["numbers"])
    print({name: now - then for name, (then, now) in numbers.items() if now != then}, len(numbers))
    assert all(then == now for then, now in numbers.values()), numbers
