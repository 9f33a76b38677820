"""Whole runs that are scaled or poisoned while they run, through the command line on a tiny model."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from commands import finish, kill
from keel import checkpoint, files, schema
from live import Start, answer, check_intact, events_of, last_step, more_steps, ranks_of, refusal, wait
from test_runs import metrics_of

pytestmark = pytest.mark.slow
STEPS = 2000


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


def check_same_numbers(result: dict[str, Any], start: int) -> None:
    assert result["start"] == start and result["refused"] is None, result
    numbers = {name: pair for name, pair in result["numbers"].items() if pair[0] is not None}
    assert {"loss", "grad_norm", "reward", "kl_nats"} <= set(result["numbers"]), sorted(result["numbers"])
    print({name: now - then for name, (then, now) in numbers.items() if now != then}, len(numbers))
    assert all(then == now for then, now in numbers.values()), numbers


def test_a_live_run_is_scaled_without_a_pause_beyond_the_cluster_and_resumes_as_wanted(
    write_config: Start, keel: Start, tmp_path: Path, pace: Path
) -> None:
    run = tmp_path / "scaled" / "run"
    pace.write_text("2.0")
    config = write_config(
        "scaled",
        run={"name": "scaled", "steps": STEPS, "directory": str(run)},
        rewards=[{"name": "low", "source": "rewards:paced"}],
        buffer={"groups_per_step": 2, "max_staleness": 1},
        scorers={"threads": 1},
        cluster={"object_store_bytes": 2**27, "min_memory_bytes": 2**31, "cpus": 6},
        checkpoint={"every_steps": 50},
        evaluation={"every_steps": 0},
        failures={"degrade_after_seconds": 30},
    )
    check_a_stop_while_it_starts(keel, keel("train", str(config)), run)
    process = keel("resume", str(run))
    wait(process, lambda: not (run / "control.json").exists(), "what led to the earlier process to go")
    wait(process, lambda: last_step(run) >= 2, "two steps")
    assert "generator=0: expected 1 to 1024" in refusal(keel, "scale", run, "--generators", 0)
    assert "learner=5: expected 1 to 4, the rows of a step" in refusal(keel, "scale", run, "--learners", 5)
    check_pools_follow_and_ranks_change(keel, process, run)

    code, table, err = finish(keel("scale", str(run), "--generators", "9", "--learners", "4"))
    assert code == 0 and "8 pending" in table and "3 pending" in table, table + err
    beyond = {"generator": 9, "reference": 1, "scorer": 1, "learner": 4}
    wait(process, lambda: events_of(run, "scale", desired=beyond), "the wish")
    assert requested_of(run) == {1.0: 15}
    wait(process, lambda: sum(actual for _, actual in counts_of(run).values()) == 6, "all CPUs in use")
    more_steps(process, run)
    kill(process)
    check_intact(keel, run)
    assert "does not answer" in refusal(keel, "scale", run)

    lives = len(ranks_of(run))
    process = keel("resume", str(run))
    wait(process, lambda: len(ranks_of(run)) > lives, "the resumed run")
    more_steps(process, run)
    wait(process, lambda: sum(actual for _, actual in counts_of(run).values()) == 6, "all CPUs in use again")
    status = answer(keel, "scale", run)
    assert status["desired"] == beyond and min(status["actual"].values()) == 1, status
    assert sum(status["actual"].values()) == 6, status  # all there is, and not one role without a worker
    answer(keel, "scale", run, "--generators", 1, "--learners", 1)
    wait(process, lambda: ranks_of(run)[-1] == 1, "one rank")
    process.send_signal(signal.SIGUSR1)  # what a batch system sends before its time limit
    code, _, err = finish(process)
    assert code == 130 and "Traceback" not in err, (code, err)
    check_intact(keel, run)
    lines = metrics_of(run)
    assert checkpoint.steps(run)[-1] == len(lines) == events_of(run, "stopped")[-1]["step"] < STEPS
    assert max(line["staleness_max_versions"] for line in lines) == 1


@pytest.mark.parametrize(("address", "reason"), [("127.0.0.1:1", "Connection refused"), ("head", "invalid literal")])
def test_a_cluster_that_cannot_be_joined_is_one_line(
    write_config: Start, keel: Start, tmp_path: Path, address: str, reason: str
) -> None:
    run = tmp_path / "nowhere" / "run"
    config = write_config("nowhere", run={"directory": str(run)}, cluster={"address": address})
    line = refusal(keel, "train", config)
    assert f"cluster.address={address}: cannot be joined (" in line and reason in line, line
    assert not (run / "config.yaml").exists()


def check_a_stop_while_it_starts(keel: Start, process: Any, run: Path) -> None:
    wait(process, (run / "control.json").is_file, "somebody who hears")
    began = time.monotonic()
    code, answer, err = finish(keel("stop", str(run)))
    print(f"stopped while it started in {time.monotonic() - began:.1f} s")
    assert code == 0 and f"stopped, as asked, at step 0 of {STEPS}; go on with: keel resume {run}" in answer, (
        answer + err
    )
    code, out, err = finish(process)
    assert code == 130 and "Traceback" not in err, (code, out, err)
    assert not ranks_of(run) and not checkpoint.steps(run)
    assert events_of(run, "stopped")[-1]["step"] == 0


def check_pools_follow_and_ranks_change(keel: Start, process: Any, run: Path) -> None:
    """1 -> 2 -> 1 generators and ranks."""
    answer(keel, "scale", run, "--generators", 2)
    wait(process, lambda: events_of(run, "worker_started", worker="generator-1"), "a second generator")
    came = events_of(run, "worker_started", worker="generator-1")[0]
    check_no_pause(run, came["time"] - came["seconds"], came["time"])
    answer(keel, "scale", run, "--generators", 2, "--learners", 2)
    wait(process, lambda: ranks_of(run) == [1, 2], "two ranks")
    more_steps(process, run)
    both = {"generator": (2, 2), "learner": (2, 2), "reference": (1, 1), "scorer": (1, 1)}
    wait(process, lambda: counts_of(run) == both, "what there is in scale.json")
    answer(keel, "scale", run, "--generators", 1, "--learners", 1)
    wait(process, lambda: ranks_of(run) == [1, 2, 1], "one rank")
    more_steps(process, run)
    assert counts_of(run)["generator"] == (1, 1)


def check_no_pause(run: Path, start: float, end: float) -> None:
    """Steps went on being recorded between two times, none of them after more than half of that."""
    times = [line["time"] for line in files.read_json_lines(run / "metrics.jsonl")]
    inside = [start, *(moment for moment in times if start < moment < end), end]
    gaps = [late - early for early, late in itertools.pairwise(inside)]
    print(f"{len(inside) - 2} steps in {end - start:.1f} s, longest pause {max(gaps):.1f} s")
    assert len(inside) >= 4 and max(gaps) < (end - start) / 2, gaps


def counts_of(run: Path) -> dict[str, tuple[int, int]]:
    """(desired, actual) by role, of scale.json."""
    counts = json.loads((run / "scale.json").read_text())
    return {role: (wanted, counts["actual"].get(role, 0)) for role, wanted in counts["desired"].items()}


def requested_of(run: Path) -> dict[float, int]:
    """Number of bundles of `cpus` CPUs that the run's Ray is asked to make room for; asked by a driver that joins it."""
    where = json.loads((run / "control.json").read_text())
    code = (
        "import ray; from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as channel;"
        "from ray.experimental.internal_kv import _internal_kv_get as get;"
        f"ray.init({where['address']!r}, log_to_driver=False, logging_level='ERROR'); print(get(channel).decode())"
    )
    subject = os.environ | {"RAY_AUTH_MODE": where["authentication"]}
    answer = subprocess.run([sys.executable, "-c", code], env=subject, capture_output=True, text=True, check=True)
    return dict(Counter(bundle["CPU"] for bundle in json.loads(answer.stdout.splitlines()[-1])))
