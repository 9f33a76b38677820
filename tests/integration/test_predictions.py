"""`keel plan` against a run: what one measured, another takes."""

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import finish
from keel import files

PACED = {"rewards": [{"name": "paced", "source": "rewards:paced"}], "evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": 0}}  # fmt: skip


@pytest.mark.exhaustive  # two runs, and a bound of 20 % that a crowded machine breaks
@pytest.mark.slow
def test_one_run_tells_how_long_steps_of_another_take(write_config: Any, pace: Path, keel: Any, tmp_path: Path) -> None:
    """Measured: synchronous, one scorer. Predicted: two scorers, one version late, half the groups in a batch.

    The reward sleeps, so that most of a step does not depend on what else the machine does.
    """
    pace.write_text("0.7")
    measured = write_config("measured", run={"steps": 6}, buffer={"groups_per_step": 4}, **PACED)
    sizes = {"groups_per_step": 4, "groups_per_batch": 1, "max_staleness": 1}
    other = write_config("other", run={"steps": 12}, buffer=sizes, scorers={"count": 2}, **PACED)
    for path in (measured, other):
        code, _, err = finish(keel("train", str(path)))
        assert code == 0, err
    saved = tmp_path / "rates.yaml"
    plan = planned(keel, measured, "--from", str(measured.parent / "run"), "--save-rates", str(saved))
    assert plan["step_seconds"] == pytest.approx(step_seconds(measured), rel=0.2)
    rates = yaml.safe_load(saved.read_text())
    rates["scorer"]["cpu_ratio"] = 0.0  # it sleeps
    saved.write_text(yaml.safe_dump(rates))
    result = planned(keel, other, "--rates", str(saved))
    assert result["step_seconds"] == pytest.approx(step_seconds(other), rel=0.2)
    assert result["step_seconds"] == pytest.approx(4 * 0.7 / 2, rel=0.2), "four batches of a step through two scorers"


def planned(keel: Any, path: Path, *arguments: str) -> Any:
    code, out, err = finish(keel("plan", str(path), *arguments, "--json"))
    assert code == 0, err
    return json.loads(out)["plans"][0]["configured"]


def step_seconds(path: Path) -> float:
    """Median of a run's steps, without the first two and the last, which evaluates."""
    lines = files.read_json_lines(path.parent / "run" / "metrics.jsonl")[1:-1]
    return statistics.median(after["time"] - before["time"] for before, after in pairwise(lines))
