"""The gap between learner and sampler: judged at the start, and at every step after it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import rollouts
from fakes import Run, settings_for
from keel import schema
from keel.learner.policy_learner import DeepSpeedLearner
from keel.online import parity
from keel.online.parity import ParityError
from keel.protocols import Observer


class Told(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.notes: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("samples", "ranks", "prompts"), [(1, 1, 8), (4, 1, 2), (3, 1, 3), (64, 1, 2), (2, 1, 4), (1, 16, 16), (4, 12, 3)]
)
def test_the_start_is_judged_on_several_samples_of_several_prompts(samples: int, ranks: int, prompts: int) -> None:
    """Sharing and packing are in the passes that are tested: two prompts at least, as many samples as in training."""
    assert parity.num_prompts(samples, ranks) == prompts
    assert prompts * samples >= ranks


@pytest.mark.parametrize("mean", [0.11, 2.7, float("nan"), float("inf")])
def test_a_run_does_not_start_beyond_the_bound(mean: float) -> None:
    told = Told()
    with pytest.raises(ParityError, match=r"differ by .* nats a token.*parity\.max_gap_nats=0\.1"):
        parity.judge_start({"gap_mean_nats": mean, "gap_max_nats": 9.0}, settings_for(), told)
    assert told.events == [("parity", {"gap_mean_nats": pytest.approx(mean, nan_ok=True), "gap_max_nats": 9.0})]


def test_a_run_starts_within_the_bound_and_says_how_large_the_gap_is() -> None:
    told = Told()
    parity.judge_start({"gap_mean_nats": 0.0456, "gap_max_nats": 0.3}, settings_for(), told)
    assert told.notes == ["parity: learner and sampler differ by 0.0456 nats a token (bound 0.1)"]


def judge(gap: float | None, **settings: Any) -> tuple[str | None, Told]:
    told = Told()
    metrics = {"gap_nats": 5.0} | ({} if gap is None else {"fresh_gap_nats": gap})
    return parity.judge_step(7, metrics, settings_for(parity=settings), told), told


def test_a_step_is_judged_on_its_own_versions_tokens_alone() -> None:
    """gap_nats also holds what late tokens lack of the newer weights: no fault, whatever its size."""
    for gap in (None, 0.0, 0.5):
        problem, told = judge(gap)
        assert problem is None and told.events == [] and told.notes == []


@pytest.mark.parametrize("gap", [0.51, 2.7, float("inf"), float("nan")])
def test_a_step_beyond_the_bound_ends_the_run_or_warns(gap: float) -> None:
    problem, told = judge(gap)
    assert problem is not None and problem.startswith("step 7: learner and sampler log-probs")
    assert "parity.max_step_gap_nats=0.5" in problem and [name for name, _ in told.events] == ["parity"]
    warned, told = judge(gap, on_step_gap="warn")
    assert warned is None and len(told.notes) == 1 and told.notes[0].startswith("warning: step 7")


def test_the_bound_is_a_setting() -> None:
    assert judge(2.0, max_step_gap_nats=3.0)[0] is None
    assert judge(0.2, max_step_gap_nats=0.1)[0] is not None


def drifting(run: Run, gaps: dict[int, float]) -> None:
    """Let the run's learner report these gaps by version."""
    step = run.controller.components.learner.step

    async def with_gap(batch: Any) -> Any:
        report = await step(batch)
        return dataclasses.replace(report, metrics=dict(report.metrics) | {"fresh_gap_nats": gaps[report.version]})

    run.controller.components.learner.step = with_gap  # type: ignore[method-assign]


async def test_a_run_whose_sampler_drifts_away_ends_before_its_weights_are_served(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=4))
    drifting(run, {1: 0.02, 2: 0.04, 3: 1.5, 4: 0.0})
    with pytest.raises(ParityError, match=r"step 3: .* differ by 1\.500 nats"):
        await run.finish()
    assert run.entries("loaded")[-1] == ("loaded", 2)
    assert run.entries("quarantined") == [("quarantined", 3, 4, 5)], "keel replay can see the step again"


async def test_a_run_that_only_warns_takes_all_its_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, settings_for(steps=3, parity={"on_step_gap": "warn"}))
    drifting(run, {1: 0.0, 2: 3.0, 3: 0.0})
    await run.finish()
    assert len(run.entries("stepped")) == 3
    assert [event["step"] for event in run.observer.events if event["event"] == "parity"] == [2]


def test_fresh_tokens_are_those_of_the_version_under_training() -> None:
    learner = DeepSpeedLearner.__new__(DeepSpeedLearner)
    late, subject = (rollouts.generated(rollouts.prompts([ticket]), version) for ticket, version in ((0, 3), (1, 4)))
    batch = schema.concat([late, subject])
    lengths = [int(schema.lengths(part, "completion_tokens").sum()) for part in (late, subject)]
    for version, expected in ((4, [False, True]), (3, [True, False]), (5, [False, False])):
        learner.version = version
        assert learner._fresh(batch).tolist() == np.repeat(expected, lengths).tolist()
    stored = batch.set_column(batch.schema.names.index("generator"), "generator", pa.array(["stored"] * batch.num_rows))
    learner.version = 4
    assert not learner._fresh(stored).any(), "read under the weights of now, but sampled by another"
    learner.version = 0
    assert not learner._fresh(batch.select(["ticket", "completion_tokens"])).any(), "stored rows: no sampler"
