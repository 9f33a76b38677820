"""The guard in a run on fakes: what is kept, what fires, what the actions do, and all of it again after a kill."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fakes
import rollouts
from guarded_runs import GOLD, GuardedRun, Killed
from keel import checkpoint, files
from keel.analysis import replay
from keel.cluster import actors
from keel.config import loader
from keel.config.run import Settings
from keel.errors import ConfigError, NotFinite
from keel.observability import evaluations
from keel.online import status
from keel.online.guard import Guard
from keel.online.train import Saved
from keel.protocols import StepReport

GOLD_MONITOR = {"name": "gold", "source": "tests:gold", "role": "monitor"}
REWARDS = [{"name": "length", "source": "tests:length"}, GOLD_MONITOR]


def settings_of(actions: list[str] | None = None, every: int = 1, **guard: Any) -> Settings:
    """Six steps, an evaluation at each, only the newest of the checkpoints kept beside the best; KL 0.1."""
    divergence = {"proxy_gold_divergence": {"actions": actions}} if actions else {}
    return fakes.settings_for(
        steps=6,
        rewards=REWARDS,
        evaluation={"every_steps": every},
        checkpoint={"every_steps": 2, "keep": 1},
        regularizer={"kl": {"coefficient": 0.1}},
        guard={**divergence, **guard},
    )


# ---- the best checkpoint


def test_the_best_checkpoint_survives_pruning_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(), monkeypatch)
    run.process()
    assert checkpoint.steps(run.directory) == [2, 6]
    best = checkpoint.best(run.directory)
    assert best is not None and (best["step"], best["reward"], best["rows"]) == (2, "gold", 3)
    assert Path(best["folder"], "version").read_text() == "2"
    held_out = [GOLD[2] + 0.001 * (1000 * ticket % 3) for ticket in range(3)]
    assert best["mean"] == pytest.approx(np.mean(held_out))
    assert best["standard_error"] == pytest.approx(np.std(held_out, ddof=1) / 3**0.5, rel=1e-4)
    assert [event["step"] for event in run.events if event["event"] == "best"] == [1, 2]
    assert any("best so far by gold" in note and "step 2" in note for note in run.display.notes)


def test_a_new_best_between_checkpoints_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gold = [0.1, 0.2, 0.25, 0.5, 0.3, 0.3, 0.3]
    run = GuardedRun(tmp_path / "run", settings_of(), monkeypatch, gold)
    run.process()
    assert checkpoint.steps(run.directory) == [3, 6]
    assert [event["step"] for event in run.events if event["event"] == "checkpoint"] == [1, 2, 3, 4, 6]


def test_without_a_monitor_or_with_keep_best_off_only_the_newest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = GuardedRun(tmp_path / "off", settings_of(keep_best=False), monkeypatch)
    run.process()
    assert checkpoint.steps(run.directory) == [6] and checkpoint.best(run.directory) is None
    no_gold = fakes.settings_for(rewards=REWARDS[:1])
    assert Guard(no_gold).monitor is None and Guard(settings_of(monitor="length")).monitor == "length"


def test_a_start_that_stays_the_best_has_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(), monkeypatch, [0.9, *GOLD[1:]])
    run.process()
    best = checkpoint.best(run.directory)
    assert best is not None and (best["step"], best["folder"]) == (0, None)
    assert checkpoint.steps(run.directory) == [6]


def test_the_best_of_a_checkpoint_that_is_fallen_back_to_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gold = [0.1, 0.5, 0.2, 0.2, 0.2, 0.2, 0.9]
    settings = settings_of()
    settings = settings.model_copy(update={"checkpoint": settings.checkpoint.model_copy(update={"keep": 2})})
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, gold)
    run.process()
    assert checkpoint.steps(run.directory) == [1, 4, 6]  # the best of 6 is 6, that of 4 is 1
    (checkpoint.folder_of(run.directory, 6) / "policy" / "version").write_text("damaged")
    path, state, _ = checkpoint.newest_intact(run.directory)
    assert path is not None and path.name == "step-000004"
    assert state is not None and checkpoint.best_of(state) == checkpoint.best_of(run.state(1))


# ---- what fires, also after a kill


def test_the_divergence_fires_once_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(), monkeypatch)
    run.process()
    assert run.firings() == [("proxy_gold_divergence", 3)]  # then it pauses for ten steps
    assert run.state(6)["totals"]["guard_fired_total"] == {"proxy_gold_divergence": 1.0}
    (event,) = [event for event in run.events if event["event"] == "guard"]
    assert event["high"] < event["threshold"] == 0 and event["statistic"] == pytest.approx(-0.05, abs=1e-6)
    assert [note for note in run.display.notes if note.startswith("guard: proxy_gold_divergence at step 3")]


@pytest.mark.parametrize("killed_in", [1, 2, 4, 6])
def test_a_killed_run_decides_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int
) -> None:
    settings = settings_of(["raise_kl", "lower_lr"], pause_steps=2)
    whole, killed = (GuardedRun(tmp_path / name, settings, monkeypatch) for name in ("whole", "killed"))
    whole.process()
    with pytest.raises(Killed, match="here"):
        killed.process(killed_in)
    killed.process()
    assert killed.firings() == whole.firings() == [("proxy_gold_divergence", 3), ("proxy_gold_divergence", 5)]
    assert killed.state(6)["guard"] == whole.state(6)["guard"]
    assert killed.state(6)["totals"]["guard_fired_total"] == {"proxy_gold_divergence": 2.0}
    assert checkpoint.steps(killed.directory) == checkpoint.steps(whole.directory) == [2, 6]
    factors = {1: (1, 1), 2: (1, 1), 3: (1, 1), 4: (2, 0.5), 5: (2, 0.5), 6: (4, 0.25)}
    assert {step: (kl, rate) for step, kl, rate in killed.multipliers} == factors
    assert {step: (kl, rate) for step, kl, rate in whole.multipliers} == factors
    lines = files.read_json_lines(killed.directory / "metrics.jsonl")
    written = {line["step"]: (line["guard_kl_multiplier"], line["guard_learning_rate_multiplier"]) for line in lines}
    assert written == factors


def test_multipliers_end_at_cap_and_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"raise_kl": {"factor": 2.0, "cap": 3.0}, "lower_lr": {"factor": 0.5, "floor": 0.4}}
    run = GuardedRun(tmp_path / "run", settings_of(["raise_kl", "lower_lr"], pause_steps=1, **limits), monkeypatch)
    run.process()
    assert [(kl, rate) for _, kl, rate in run.multipliers] == [(1, 1), (1, 1), (1, 1), (2, 0.5), (3, 0.4), (3, 0.4)]


def test_a_stop_ends_the_run_with_an_evaluation_and_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(["stop"]), monkeypatch)
    saved = run.process()
    assert saved.version == 3 and saved.over(run.settings)
    assert checkpoint.steps(run.directory) == [2, 3] and run.state(3)["finished"]
    assert run.process().version == 3 and len(run.multipliers) == 3  # a resumed run takes no further step


def test_a_stop_by_a_step_between_evaluations_evaluates_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slope = {"kl_slope": {"actions": ["stop"]}, "window_steps": 4}
    run = GuardedRun(tmp_path / "run", settings_of(every=0, **slope), monkeypatch)
    run.metrics = lambda version: {"kl_nats": 4.0 * version, "length_tokens": 40.0}
    assert run.process().version == 4
    assert run.firings() == [("kl_slope", 4)]
    (event,) = [event for event in run.events if event["event"] == "guard"]
    assert event["statistic"] == pytest.approx(0.1)  # 4 nats a step over 40 tokens
    assert [path.stem for path in sorted((run.directory / "evaluations").iterdir())] == ["step-000000", "step-000004"]


def test_a_divergence_is_judged_again_after_an_evaluation_without_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(settings_of())
    batch = rollouts.generated(rollouts.prompts(range(20)))
    noise = [0.01 * (row % 3) for row in range(40)]

    def evaluate(step: int, proxy: float, gold: float) -> list[str]:
        scored = rollouts.scored(
            rollouts.referenced(batch), [proxy + n for n in noise], {"gold": [gold + n for n in noise]}
        )
        guard.evaluated(step, scored)
        return [firing.detector for firing in guard.check(step).firings]

    assert evaluate(0, 0.0, 0.1) == []
    assert evaluate(1, float("nan"), 0.3) == []
    assert evaluate(2, 1.0, 0.5) == []
    assert evaluate(3, 2.0, 0.3) == ["proxy_gold_divergence"]


# ---- roll back


@pytest.mark.parametrize("killed_in", [None, 2, 4, 5])
def test_a_roll_back_continues_from_the_best_with_what_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int | None
) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(["roll_back", "raise_kl"], max_roll_backs=2), monkeypatch)
    if killed_in:
        with pytest.raises(Killed, match="here"):
            run.process(killed_in)
    saved = run.process()
    # every time gold falls at step 3 the run returns to step 2; the third time it stops
    assert (saved.version, saved.over(run.settings)) == (3, True)
    taken = [entry for index, entry in enumerate(run.multipliers) if index == 0 or entry != run.multipliers[index - 1]]
    assert [entry for entry in taken if entry[0] == 3] == [(3, 1, 1), (3, 2, 1), (3, 4, 1)]
    assert run.state(3)["guard"]["roll_backs"] == 2 and run.state(3)["guard"]["multipliers"]["kl"] == 8
    assert run.state(3)["totals"]["guard_fired_total"] == {"proxy_gold_divergence": 3.0}
    assert [event["step"] for event in run.events if event["event"] == "roll_back"] == [2, 2]
    assert checkpoint.steps(run.directory) == [2, 3]


def test_a_roll_back_moves_newer_checkpoints_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2])
    run.process()
    assert [event["step"] for event in run.events if event["event"] == "roll_back"] == [3]
    names = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert names == ["rolled-back-step-000004", "step-000003", "step-000006"]
    assert [step for step, *_ in run.multipliers] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    checkpoint.check_known(run.directory)


def test_a_roll_back_leaves_no_evaluation_of_the_steps_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2])
    with pytest.raises(Killed, match="here"):
        run.process(7)  # steps 1 to 6, back to 3, and killed in step 4
    assert [row["step"] for row in evaluations.frontier(run.directory)] == [0, 3]
    names = [
        sorted(path.name for path in (folder / "evaluations").iterdir())
        for folder in (run.directory, run.directory / files.ASIDE)
    ]
    assert names == [["step-000000.arrow", "step-000003.arrow"], ["step-000006.arrow"]]
    run.process()
    assert [row["step"] for row in evaluations.frontier(run.directory)] == [0, 3, 6]


def test_steps_made_again_after_a_roll_back_end_a_row_of_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    checkpoints, failures = {"every_steps": 1}, {"max_rebuilds": 1}
    settings = settings.model_copy(
        update={
            "checkpoint": settings.checkpoint.model_copy(update=checkpoints),
            "failures": settings.failures.model_copy(update=failures),
        }
    )
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2])
    run.learner_lost_in = {8, 10}  # of the steps begun: 1 to 6, back to 3, 4, lost in 5, 5, lost in 6, 6
    assert run.process().version == 6
    assert [step for step, *_ in run.multipliers] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert [event["event"] for event in run.events if event["event"] in ("rebuild", "roll_back")] == [
        "roll_back",
        "rebuild",
        "rebuild",
    ]


def test_a_roll_back_to_the_start_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(["roll_back", "raise_kl"], max_roll_backs=1)
    run = GuardedRun(tmp_path / "run", settings, monkeypatch, [0.9, *GOLD[1:]])
    assert run.process().version == 1
    assert run.multipliers == [(1, 1, 1), (1, 2, 1)]


@pytest.mark.parametrize("done", ["nothing", "put aside", "all"])
def test_a_kill_within_a_roll_back_neither_loses_nor_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    settings = settings_of(["roll_back", "lower_lr"], every=3, max_roll_backs=1)
    gold = [0.1, 0.1, 0.1, 0.5, 0.4, 0.3, 0.2]
    whole, killed = (GuardedRun(tmp_path / name, settings, monkeypatch, gold) for name in ("whole", "killed"))
    whole.process()
    from keel.online import roll_back

    with monkeypatch.context() as patch:
        if done == "all":
            patch.setattr("keel.online.train.manifest.undo", lambda *_: (_ for _ in ()).throw(Killed("here")))
        elif done == "put aside":
            patch.setattr(roll_back.segments, "paths", lambda _: (_ for _ in ()).throw(Killed("here")))
        else:
            patch.setattr(roll_back.checkpoint, "put_aside", lambda *_: (_ for _ in ()).throw(Killed("here")))
        with pytest.raises(Killed, match="here"):
            killed.process()
    saved: Saved = killed.process()
    assert saved.version == 6 and checkpoint.steps(killed.directory) == checkpoint.steps(whole.directory)
    assert killed.state(6)["guard"] == whole.state(6)["guard"]
    assert killed.state(6)["totals"]["guard_fired_total"] == whole.state(6)["totals"]["guard_fired_total"]
    assert killed.multipliers == whole.multipliers


# ---- replay


def test_a_refused_step_is_replayed_with_the_factors_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(["raise_kl", "lower_lr"]), monkeypatch)
    files.write(run.directory / "config.yaml", loader.dump(run.settings).encode())

    def refuse(version: int) -> dict[str, float]:
        if version == 4:
            raise NotFinite("step 4: the loss is nan")
        return {}

    async def fetch(batch: Any) -> Any:
        return batch

    run.metrics = refuse
    monkeypatch.setattr(actors, "fetch", fetch)
    with pytest.raises(NotFinite, match="step 4"):
        run.process()
    taken: list[tuple[float, float]] = []

    class Replaying:
        def __init__(self, *_: Any) -> None: ...

        async def ready(self) -> None: ...

        async def restore_checkpoint(self, folder: str) -> None:
            assert folder.endswith("step-000002")

        async def set_multipliers(self, kl: float, learning_rate: float) -> None:
            taken.append((kl, learning_rate))

        async def step(self, batch: Any) -> StepReport:
            return StepReport(len(taken), {"loss": 0.0})

    models = SimpleNamespace(policy="", frozen={})
    prepared = SimpleNamespace(settings=run.settings, directory=run.directory, models=models, notes=())
    monkeypatch.setattr(replay.learner_group, "LearnerGroup", Replaying)
    monkeypatch.setattr(replay.preflight, "prepare", lambda _: prepared)
    monkeypatch.setattr(actors, "joined", lambda *_: contextlib.nullcontext())
    assert replay.run(run.directory, 4, run.display).start == 2  # type: ignore[arg-type]
    assert taken == [(1, 1), (2, 0.5)]  # of steps 3 and 4


# ---- settings


@pytest.mark.parametrize(
    ("guard", "kl", "message"),
    [
        ({"monitor": "golden"}, 0.1, "guard.monitor=golden: no such reward; expected one of length, gold"),
        ({"length": {"actions": ["raise_kl"]}}, 0.0, "guard.length.actions: raise_kl multiplies"),
        ({"length": {"actions": ["roll_back"]}}, 0.1, "length.actions: roll_back alone takes the same steps again"),
        (
            {"keep_best": False, "length": {"actions": ["roll_back", "lower_lr"]}},
            0.1,
            "guard.length.actions: roll_back returns to the best checkpoint, and none is kept",
        ),
        ({"length": {"actions": ["warm"]}}, 0.1, "guard.length.actions.0"),
        ({"length": {"actions": []}}, 0.1, "guard.length.actions"),
    ],
)
def test_settings_that_do_nothing_are_refused(guard: dict[str, Any], kl: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fakes.settings_for(rewards=REWARDS, regularizer={"kl": {"coefficient": kl}}, guard=guard)


@pytest.mark.parametrize(
    "controller", [{"kind": "dual", "target_nats": 5.0}, {"kind": "proportional", "target_nats": 5.0}, {"kind": "safe"}]
)
def test_a_coefficient_that_adapts_is_not_raised(controller: dict[str, Any]) -> None:
    kl = {"coefficient": 0.1, "controller": controller}
    line = (
        rf"\Aregularizer\.kl\.controller\.kind={controller['kind']}: adapts the coefficient until what"
        r" guard\.entropy\.actions=raise_kl multiplied it by is undone; expected fixed, or another action\Z"
    )
    with pytest.raises(ConfigError, match=line):
        fakes.settings_for(regularizer={"kl": kl}, guard={"entropy": {"actions": ["raise_kl"]}})
    fakes.settings_for(regularizer={"kl": kl}, guard={"entropy": {"actions": ["lower_lr"]}})


def test_a_detector_is_switched_off_by_null() -> None:
    config = settings_of(kl_slope=None).guard
    assert "kl_slope" not in config.watches() and "entropy" in config.watches()
    assert loader.parse(settings_of().model_dump(mode="json")).guard == settings_of().guard


# ---- what is read of rows


def test_the_spread_is_that_of_members_less_their_zero_at_the_start() -> None:
    members = [{"name": name, "source": f"tests:{name}", "weight": weight} for name, weight in (("a", 1.0), ("b", 2.0))]
    settings = fakes.settings_for(rewards=members, ensemble={"form": "mean"}, sampling={"samples_per_prompt": 3})
    batch = rollouts.referenced(rollouts.generated(rollouts.prompts(range(2))))
    guard = Guard(settings)
    first = rollouts.scored(batch, extra={"a": [1.0, 2.0, 3.0, 2.0], "b": [5.0, 5.5, 6.0, 5.5]})
    guard.evaluated(0, first)
    later = rollouts.scored(batch, extra={"a": [3.0, 4.0, 5.0, 4.0], "b": [5.0, 5.5, 6.0, 5.5]})
    guard.evaluated(5, later)
    # members less their start's means, weights included: equal at first, 2 apart later, so a spread of 1
    means = [entry[1] for entry in guard.state()["evaluations"]["spread"]]
    assert means == pytest.approx([0.0, 1.0], abs=1e-6)


def test_completions_outside_the_band_of_the_start_are_counted() -> None:
    settings = fakes.settings_for(rewards=REWARDS)
    guard = Guard(settings)
    batch = rollouts.generated(rollouts.prompts(range(20)), logprobs=[[-1.0, -1.0]] * 40)
    near = [[-1.0 - 0.01 * row, -1.0] for row in range(40)]
    guard.evaluated(0, rollouts.scored(rollouts.referenced(batch, near), extra={"gold": [0.0] * 40}))
    far = [[-4.0, -4.0]] * 10 + near[5:35]
    guard.evaluated(5, rollouts.scored(rollouts.referenced(batch, far), extra={"gold": [0.0] * 40}))
    assert guard.state()["outside"] == [10, 40]
    fired = {firing.detector: firing.verdict for firing in guard.check(5).firings}
    assert fired["reference_nll"].statistic == 0.25 and "length" not in fired


# ---- where the best is named


def test_status_names_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GuardedRun(tmp_path / "run", settings_of(), monkeypatch)
    files.write(run.directory / "config.yaml", loader.dump(run.settings).encode())
    assert status.of(run.directory)["best"] is None
    run.process()
    best = status.of(run.directory)["best"]
    assert best == checkpoint.best(run.directory)
    line = checkpoint.best_line(best)
    assert (
        line
        == f"step 2, gold +0.501 +- 0.001 (standard error, 3 prompts): {run.directory}/checkpoints/step-000002/policy"
    )
    start = {**best, "step": 0, "folder": None}
    assert checkpoint.best_line(start).endswith(": the policy it started from")
