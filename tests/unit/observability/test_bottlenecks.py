"""Shares and advice, from counters whose shares are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.config import loader
from keel.errors import ConfigError
from keel.observability.bottlenecks import explain, largest_share
from keel.observability.utilization import Utilization
from runs import settings


class Run:
    """Lines of a run whose time passes as told: the counters are those of the real Utilization."""

    def __init__(self) -> None:
        self.now = 0.0
        self.utilization = Utilization(lambda: self.now)
        self.totals: dict[str, dict[str, float]] = {}
        self.lines: list[dict[str, Any]] = []
        for role in ("generator", "reference", "scorer"):
            self.utilization.occupied(role, 0, 0, 1)
        self.utilization.ranks(1)

    def stage(self, role: str, seconds: float, *, waiting: int = 0, serving: int = 1, phase: str = "rollouts") -> None:
        """One worker of a role works, the learn loop in a phase; then none does."""
        self.utilization.doing(phase)
        self.utilization.occupied(role, 1, waiting, serving)
        self.now += seconds
        self.utilization.occupied(role, 0, 0, serving)

    def phase(self, name: str, seconds: float) -> None:
        self.utilization.doing(name)
        self.now += seconds

    def step(self) -> None:
        for name, values in self.utilization.drain().items():
            total = self.totals.setdefault(name, {})
            for label, value in values.items():
                total[label] = total.get(label, 0.0) + value
        copies = {name: dict(values) for name, values in self.totals.items()}
        self.lines.append({"step": len(self.lines) + 1, "time": self.now + 1e9, **copies})


def synchronous(**seconds: float) -> Run:
    """Three steps in which the roles work one after the other, for the given seconds."""
    run = Run()
    run.phase("start", 100.0)
    for _ in range(3):
        for role in ("generator", "reference", "scorer"):
            run.stage(role, seconds.get(role, 1.0))
        run.phase("learner_step", seconds.get("learner", 1.0))
        run.phase("weight_sync", seconds.get("weight_sync", 1.0))
        run.step()
    return run


@pytest.mark.parametrize("slow", ["generator", "reference", "scorer", "learner", "weight_sync"])
def test_the_slow_one_is_what_the_time_goes_to(slow: str) -> None:
    result = explain(synchronous(**{slow: 6.0}).lines, max_staleness=1)
    assert result.timeline == pytest.approx({slow: 0.6} | {name: 0.1 for name in result.timeline if name != slow})
    assert next(iter(result.timeline)) == slow and sum(result.timeline.values()) == pytest.approx(1)
    assert (result.first_step, result.last_step, result.seconds_per_step) == (2, 3, pytest.approx(10.0))
    option = {"generator": "--generators", "reference": "--reference", "scorer": "--scorers", "learner": "--learners"}
    expected = option.get(slow, "buffer.groups_per_step")
    assert len(result.advice) == 1 and expected in result.advice[0] and "60%" in result.advice[0], result.advice


def test_a_run_that_was_built_again_says_so() -> None:
    run = synchronous()
    run.phase("start", 40.0)
    run.step()
    result = explain(run.lines)
    assert next(iter(result.timeline)) == "start"
    assert result.advice[0].startswith("start takes") and "resumed, or built again" in result.advice[0], result.advice


def test_busy_and_idle_add_up_and_say_whom_a_role_waits_for() -> None:
    (generator, reference, scorer, learner) = explain(synchronous(scorer=6.0).lines).roles
    assert [role.name for role in (generator, reference, scorer, learner)] == [
        "generator",
        "reference",
        "scorer",
        "learner",
    ]
    for role in (generator, reference, scorer, learner):
        assert role.busy_ratio + sum(role.idle_ratios.values()) == pytest.approx(1), role
        assert role.workers == pytest.approx(1) and role.waiting_batches == 0
    assert scorer.idle_ratios == pytest.approx({"generator": 0.1, "reference": 0.1, "learner": 0.1, "weight_sync": 0.1})
    assert generator.idle_ratios == pytest.approx({"scorer": 0.6, "reference": 0.1, "learner": 0.1, "weight_sync": 0.1})


def test_turns_of_equal_length_are_told_to_overlap() -> None:
    equal = synchronous(generator=3.0, learner=3.0).lines
    advice = explain(equal, max_staleness=0).advice
    assert ["learner works" in advice[0], "generator" in advice[1], "max_staleness" in advice[2]] == [True] * 3, advice
    assert len(explain(equal, max_staleness=1).advice) == 2


def test_the_line_and_the_workers_that_too_many_are() -> None:
    run = Run()
    for _ in range(2):
        run.stage("scorer", 8.0, waiting=3)
        run.stage("generator", 2.0, serving=3)
        run.step()
    result = explain(run.lines)
    scorer = next(role for role in result.roles if role.name == "scorer")
    assert scorer.waiting_batches == pytest.approx(2.4) and scorer.busy_ratio == pytest.approx(0.8)
    assert "3 workers of generator are busy 7%" in result.advice[-1], result.advice


def test_only_the_last_steps_count() -> None:
    run = synchronous(generator=6.0)
    for _ in range(2):
        run.stage("scorer", 5.0)
        run.step()
    assert list(explain(run.lines, steps=2).timeline) == ["scorer"]
    assert (explain(run.lines, steps=2).first_step, explain(run.lines, steps=99).first_step) == (4, 2)
    assert largest_share(run.lines[-2], run.lines[-1]) == "scorer 100%"
    assert largest_share(run.lines[1], run.lines[2]) == "generator 60%"


@pytest.mark.parametrize("lines", [[], [{"step": 1}], [{"step": 1}, {"step": 2}]])
def test_nothing_counted_is_said(lines: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="no two steps"):
        explain(lines)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from keel.cli import run_commands

    lines = synchronous(reference=6.0).lines
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=r"RUN_DIR=.*: no config.yaml in it; expected the directory of a run"):
        run_commands.explain(tmp_path)
    (tmp_path / "config.yaml").write_text(loader.dump(settings()))
    run_commands.explain(tmp_path)
    shown = capsys.readouterr().out
    assert "steps 2 to 3, 10.00 s each" in shown and "Time     reference 60%" in shown
    assert "Advice   reference is what the learner waits for 60% of the time" in shown
    run_commands.explain(tmp_path, last=1, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["first_step"], result["timeline"]["reference"]) == (3, pytest.approx(0.6))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0}\n')
    with pytest.raises(ConfigError, match="no two steps"):
        run_commands.explain(tmp_path)
