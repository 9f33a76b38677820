"""The guard in a run on fakes: what is kept, what fires, what the actions do, and all of it again after a kill."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fakes
import rollouts
from guarded_runs import GOLD, REWARDS, GuardedRun, Killed, settings_of
from keel import checkpoint, files
from keel.analysis import replay
from keel.cluster import actors
from keel.config import loader
from keel.errors import ConfigError, NotFinite
from keel.online import status
from keel.online.guard import Guard
from keel.protocols import StepReport

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
        (
            {"length": {"actions": ["raise_kl"]}},
            0.0,
            r"\Aguard\.length\.actions: raise_kl multiplies regularizer\.kl\.coefficient, which is 0; expected one above"
            r" 0, guard\.raise_kl\.min_coefficient \(what the first firing raises it to\), or another action\Z",
        ),
        (
            {"min_rows": 65, "repetition": {"actions": ["warn", "stop"]}},
            0.1,
            r"\Aguard\.repetition\.actions: it never acts on prompts\.held_out=64 completions, fewer than"
            r" guard\.min_rows=65; expected at least that, or warn\Z",
        ),
        ({"raise_kl": {"min_coefficient": 0.0}}, 0.0, "guard.raise_kl.min_coefficient"),
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


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"reference": None}, r"\Aguard\.raise_kl\.min_coefficient=0\.3 needs column reference_logprobs"),
        ({"objective": {"kind": "weighted_likelihood"}}, r"regularizer\.kl\.placement=reward: objective\.kind="),
        (
            {"objective": {"advantage": "reinforce_pp"}, "regularizer": {"kl": {"order": "after_baseline"}}},
            r"regularizer\.kl\.order=after_baseline",
        ),
    ],
)
def test_a_kl_that_the_guard_may_begin_fits_the_run(blocks: dict[str, Any], message: str) -> None:
    guard = {"raise_kl": {"min_coefficient": 0.3}}
    fakes.settings_for(guard=guard, **blocks)  # no detector raises it
    with pytest.raises(ConfigError, match=message):
        fakes.settings_for(guard={**guard, "entropy": {"actions": ["raise_kl"]}}, **blocks)


def test_a_killed_run_that_began_without_a_kl_pays_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(["raise_kl"], coefficient=0.0, pause_steps=2, raise_kl={"min_coefficient": 0.3})
    run = GuardedRun(tmp_path / "run", settings, monkeypatch)
    with pytest.raises(Killed, match="here"):
        run.process(5)
    run.process()
    lines = files.read_json_lines(run.directory / "metrics.jsonl")
    assert [(line["step"], line["kl_coefficient"]) for line in lines] == [
        (1, 0.0),
        (2, 0.0),
        (3, 0.0),
        (4, 0.3),
        (5, 0.3),
        (6, 0.6),
    ]


def test_a_detector_is_switched_off_by_null() -> None:
    config = settings_of(kl_slope=None).guard
    assert "kl_slope" not in config.watches() and "entropy" in config.watches()
    assert loader.parse(settings_of().model_dump(mode="json")).guard == settings_of().guard


# ---- what is read of rows


def test_rows_are_compared_with_those_of_the_peak_by_prompt() -> None:
    """Gold of a prompt is its own number plus little; also after a kill, and where a row fails or a prompt changes."""
    random = np.random.default_rng(0)
    own = random.normal(0, 1, 20)
    golds = [own + shift + random.normal(0, 0.1, 20) for shift in (0.0, 0.9, 0.6)]
    golds[2][3] = np.nan

    def scored(step: int, first_ticket: int = 0) -> Any:
        batch = rollouts.generated(rollouts.prompts(range(first_ticket, first_ticket + 20), samples=1))
        return rollouts.scored(rollouts.referenced(batch), list(step + own), {"gold": golds[step].tolist()})

    def verdict_of(guard: Guard, step: int, first_ticket: int = 0) -> Any:
        guard.evaluated(step, scored(step, first_ticket))
        return {firing.detector: firing.verdict for firing in guard.check(step).firings}.get("proxy_gold_divergence")

    whole = Guard(fakes.settings_for(rewards=REWARDS))
    assert verdict_of(whole, 0) is None and verdict_of(whole, 1) is None
    resumed, other = (Guard(whole.settings, whole.state()) for _ in range(2))
    verdict = verdict_of(whole, 2)
    interval = stats.ttest_rel(golds[2], golds[1], nan_policy="omit").confidence_interval(1 - 0.05 / 3)
    assert (verdict.low, verdict.high) == pytest.approx((interval.low, interval.high), rel=1e-5)
    assert verdict_of(resumed, 2) == verdict
    assert verdict_of(other, 2, first_ticket=1) is None  # by Welch, which does not see a fall of 0.3


@pytest.mark.parametrize(("prompts", "fired"), [(4, True), (3, False)])
def test_detectors_say_nothing_by_too_few_rows(prompts: int, fired: bool) -> None:
    """Rows without any spread, so that every interval has no width; two a prompt."""
    guard = Guard(fakes.settings_for(rewards=REWARDS))
    for step, (tokens, nll, gold) in enumerate([([7, 8], -1.0, 0.5), ([7] * 6, -9.0, 0.2)]):
        rows = 2 * prompts
        batch = rollouts.generated(rollouts.prompts(range(prompts)), tokens=[tokens] * rows)
        batch = rollouts.referenced(batch, [[nll] * len(tokens)] * rows)
        guard.evaluated(step, rollouts.scored(batch, [float(step)] * rows, {"gold": [gold] * rows}))
        firings = {firing.detector for firing in guard.check(step).firings}
    assert firings == ({"proxy_gold_divergence", "length", "repetition", "reference_nll"} if fired else set())
    assert guard.best is not None and (guard.best["step"], guard.best["rows"]) == (0, 2 * prompts)


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


def test_answers_that_become_one_template_fire() -> None:
    """At first no two prompts share a 3-gram; then three of five answers to each of 20 prompts are the same."""
    guard = Guard(fakes.settings_for(rewards=REWARDS, sampling={"samples_per_prompt": 5}))
    rows = [[row, row + 1, row + 2] for row in range(100)]
    same = [[1, 2, 3] if row % 5 < 3 else [row + 200, 1, 2] for row in range(100)]
    for step, tokens in enumerate((rows, same)):
        batch = rollouts.generated(rollouts.prompts(range(20), samples=5), tokens=tokens)
        scored = rollouts.scored(rollouts.referenced(batch), [float(step)] * 100, {"gold": [0.0] * 100})
        guard.evaluated(step, scored)
        verdicts = {firing.detector: firing.verdict for firing in guard.check(step).firings}
    assert set(verdicts) == {"template_collapse"}
    assert verdicts["template_collapse"].statistic == pytest.approx(0.6**2)
    assert [entry[3] for entry in guard.state()["evaluations"]["template_overlap"]] == [20, 20]  # prompts, not rows


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
