"""A live run in which one role after the other is starved: its processes get little time, and keel explain says whose."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import finish
from keel import files
from keel.observability.bottlenecks import largest_share
from live import answer, last_step, more_steps, title_of, wait

pytestmark = pytest.mark.slow
ROLES = {
    "generator": ("VllmGenerator", "--generators"),
    "reference": ("ReferenceScorer", "--reference"),
    "scorer": ("RewardScorer", "--scorers"),
    "learner": ("DeepSpeedLearner", "--learners"),
}
STOPPED_STEPS, RUNNING_STEPS = 4.0, 0.25
"""How long an actor stands and runs, in steps of this machine: whatever else a step needs is over while it stands."""
STEPS = 4
TRIES = 3
"""Another program may have held up another role meanwhile."""
Start = Callable[..., Any]


@contextmanager
def starved(process: Any, class_name: str, seconds_per_step: float) -> Iterator[None]:
    """The actors of a class run for a moment now and then."""
    stopped, running = STOPPED_STEPS * seconds_per_step, RUNNING_STEPS * seconds_per_step
    children = psutil.Process(process.pid).children(recursive=True)
    actors = [item for item in children if title_of(item).startswith(f"ray::{class_name}")]
    assert actors, class_name
    over = threading.Event()

    def throttle() -> None:
        while not over.is_set():
            for number, seconds in ((signal.SIGSTOP, stopped), (signal.SIGCONT, running)):
                for actor in actors:
                    actor.send_signal(number)
                over.wait(seconds)
        for actor in actors:
            actor.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_explain_names_the_role_that_is_starved(write_config: Start, keel: Start, tmp_path: Path, pace: Path) -> None:
    run = tmp_path / "starved" / "run"
    pace.write_text("0.05")
    config = write_config(
        "starved",
        run={"name": "starved", "steps": 1000, "directory": str(run)},
        sampling={"samples_per_prompt": 2, "max_tokens": 80},
        prompts={"max_tokens": 32},
        rewards=[{"name": "low", "source": "rewards:paced"}],
        checkpoint={"every_steps": 0},
        evaluation={"every_steps": 0},
    )
    process = keel("train", str(config))
    wait(process, lambda: last_step(run) >= 2, "two steps")
    for role, (class_name, option) in ROLES.items():
        for _ in range(TRIES):
            more_steps(process, run, STEPS)
            unhindered = answer(keel, "explain", run, "--last", STEPS)["seconds_per_step"]
            with starved(process, class_name, unhindered):
                more_steps(process, run, 1)
                more_steps(process, run, STEPS)
                result = answer(keel, "explain", run, "--last", STEPS)
            if next(iter(result["timeline"])) == role:
                break
        print(role, result["timeline"], result["advice"], f"{result['seconds_per_step']:.2f} s")
        assert next(iter(result["timeline"])) == role, result
        assert option in result["advice"][0], result["advice"]
        shares = {item["name"]: item["busy_ratio"] for item in result["roles"]}
        assert max(shares, key=lambda name: shares[name]) == role, shares
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    assert code == 130
    lines = files.read_json_lines(run / "metrics.jsonl")
    for before, now in itertools.pairwise(lines):
        (shown,) = [line for line in out.splitlines() if line.startswith(f"step {now['step']}/")]
        assert f"mostly {largest_share(before, now)}" in shown, shown
