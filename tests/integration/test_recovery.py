"""Whole runs that are scaled, ended, doubled or poisoned while they run, through the command line on a tiny model."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rewards
from conftest import finish, kill, wait_for
from test_runs import metrics_of

from keel import checkpoint, durable, schema


@pytest.fixture(autouse=True)
def a_terminal_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that an earlier test started here leaves this variable behind; a user's next command does not have it."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


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


def test_a_live_run_is_scaled_without_a_pause_beyond_the_cluster_and_resumes_as_wanted(
    write_config: Start, keel: Start, tmp_path: Path, pace: Path
) -> None:
    run = tmp_path / "scaled" / "run"
    pace.write_text("0.5")
    config = write_config(
        "scaled",
        run={"name": "scaled", "steps": 1000, "directory": str(run)},
        rewards=[{"name": "low", "source": "rewards:paced"}],
        buffer={"groups_per_step": 2, "max_staleness": 1},
        scorers={"threads": 1},
        cluster={"object_store_bytes": 2**27, "min_memory_bytes": 2**31, "cpus": 6},
        checkpoint={"every_steps": 50},
        evaluation={"every_steps": 0},
        failures={"degrade_after_seconds": 5},
    )
    process = keel("train", str(config))
    wait_for(lambda: last_step(run) >= 2, PATIENCE_SECONDS, "two steps")
    for wanted, expected in (
        (["--generators", 0], "generator=0: expected 1 or more"),
        (["--learners", 5], "learner=5: expected 1 to 4, the rows of a step"),
    ):
        assert expected in refusal(keel, "scale", run, *wanted)

    answer(keel, "scale", run, "--generators", 2)
    wait_for(lambda: events_of(run, "worker_started", worker="generator-1"), PATIENCE_SECONDS, "a second generator")
    came = events_of(run, "worker_started", worker="generator-1")[0]
    check_no_pause(run, came["time"] - came["seconds"], came["time"])

    answer(keel, "scale", run, "--generators", 2, "--learners", 2)
    wait_for(lambda: ranks_of(run) == [1, 2], PATIENCE_SECONDS, "two ranks")
    two_more_steps(run)
    wait_for(
        lambda: counts_of(run) == {"generator": (2, 2), "learner": (2, 2), "reference": (1, 1), "scorer": (1, 1)},
        PATIENCE_SECONDS,
        "scale.json with what there is",
    )
    answer(keel, "scale", run, "--generators", 1, "--learners", 1)
    wait_for(lambda: ranks_of(run) == [1, 2, 1], PATIENCE_SECONDS, "one rank")
    two_more_steps(run)
    assert counts_of(run)["generator"] == (1, 1)

    code, table, err = finish(keel("scale", str(run), "--generators", "9", "--learners", "4"))
    assert code == 0 and "8 pending" in table and "3 pending" in table, table + err
    wait_for(
        lambda: (
            last_step(run)
            and events_of(run, "scale", desired={"generator": 9, "learner": 4, "reference": 1, "scorer": 1}) != []
        ),
        30,
        "the wish",
    )
    assert requested_of(run) == {1.0: 15}
    wait_for(lambda: sum(actual for _, actual in counts_of(run).values()) == 6, PATIENCE_SECONDS, "all CPUs in use")
    two_more_steps(run)
    kill(process)
    check_intact(keel, run)
    assert "does not answer" in refusal(keel, "scale", run)

    kept = checkpoint.latest(run)
    began = time.time()
    process = keel("resume", str(run))
    wait_for(
        lambda: [each for each in events_of(run, "running") if each["time"] > began] != [],
        PATIENCE_SECONDS,
        "the resumed run",
    )
    two_more_steps(run)
    status = answer(keel, "scale", run)
    assert status["desired"] == {"generator": 9, "learner": 4, "reference": 1, "scorer": 1}, status
    assert sum(status["actual"].values()) == 6 and min(status["actual"].values()) == 1, (status, kept)
    kill(process)


def check_no_pause(run: Path, start: float, end: float) -> None:
    """Steps went on being recorded between two times, none of them after more than half of that."""
    times = [line["time"] for line in durable.read_json_lines(run / "metrics.jsonl")]
    inside = [start, *(moment for moment in times if start < moment < end), end]
    gaps = [late - early for early, late in zip(inside, inside[1:], strict=False)]
    print(f"{len(inside) - 2} steps in {end - start:.1f} s, longest pause {max(gaps):.1f} s")
    assert len(inside) > 4 and max(gaps) < (end - start) / 2, gaps


def counts_of(run: Path) -> dict[str, tuple[int, int]]:
    """(desired, actual) by role, of scale.json."""
    counts = json.loads((run / "scale.json").read_text())
    return {role: (wanted, counts["actual"].get(role, 0)) for role, wanted in counts["desired"].items()}


def requested_of(run: Path) -> dict[float, int]:
    """How many bundles of so many CPUs the run's Ray is asked to make room for; asked by a driver that joins it."""
    where = json.loads((run / "control.json").read_text())
    code = (
        "import ray; from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as channel;"
        "from ray.experimental.internal_kv import _internal_kv_get as get;"
        f"ray.init({where['address']!r}, log_to_driver=False, logging_level='ERROR'); print(get(channel).decode())"
    )
    own = os.environ | {"RAY_AUTH_MODE": where["authentication"]}
    answer = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True)
    return dict(Counter(bundle["CPU"] for bundle in json.loads(answer.stdout.splitlines()[-1])))
