"""Runs side by side: levels, crossings and differences by hand; what must not depend on order; every refusal."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from keel import files
from keel.analysis import compare
from keel.analysis.compare import ArmAtLevel, Comparison, Matching
from keel.analysis.compared_runs import Evaluation, Run
from keel.errors import ConfigError
from keel.observability import evaluations as stored_evaluations
from keel.observability.diagnostics import Estimate
from rollouts import generated, prompts, referenced, scored

SETTINGS: dict[str, Any] = {
    "run": {"name": "any"},
    "policy": {"model": "tiny"},
    "reference": {"model": None, "ref_policy": "initial"},
    "sampling": {"temperature": 1.0, "max_tokens": 5},
    "rewards": [{"name": "length", "kind": "rule", "source": "a:b", "role": "train", "weight": 1.0}],
}


def held_out(
    rewards: Sequence[float | None],
    kl: Sequence[float] | None,
    lengths: Sequence[int] | None = None,
    tickets: Sequence[int] | None = None,
    samples: int = 1,
    **monitors: Sequence[float | None],
) -> pa.RecordBatch:
    """An evaluation: a completion a prompt (or `samples`), each of its reward, its KL in nats and its length."""
    count = len(rewards)
    tickets = range(count // samples) if tickets is None else tickets
    rows = generated(prompts(tickets, samples), logprobs=[[-0.5] * n for n in lengths or [2] * count])
    if kl is not None:
        sampler = rows.column("completion_logprobs").to_pylist()
        rows = referenced(rows, [[row[0] - item, *row[1:]] for row, item in zip(sampler, kl, strict=True)])
    return scored(rows, rewards, monitors)


def store(
    directory: Path,
    evaluations: Mapping[int, pa.RecordBatch],
    tokens: Mapping[int, float] | None = None,
    **blocks: Any,
) -> Path:
    """A run directory; without `tokens`, a step trains on 100."""
    files.write(directory / "config.yaml", yaml.safe_dump(SETTINGS | blocks).encode())
    for step, batch in evaluations.items():
        stored_evaluations.store(directory, step, batch)
    every = tokens if tokens is not None else {step: 100.0 * step for step in range(1, max(evaluations) + 1)}
    for step, total in every.items():
        files.append_json(directory / "metrics.jsonl", {"step": step, "time": 1.0, "trained_tokens_total": total})
    return directory


def matched(comparison: Comparison, name: str) -> Matching:
    return next(matching for matching in comparison.matchings if matching.name == name)


def of(directories: Sequence[Path], name: str) -> tuple[Matching, list[ArmAtLevel]]:
    result = matched(compare.compare([compare.load(directory) for directory in directories]), name)
    return result, list(result.arms_at_level)


SLOW = {0: ([0.0, 1.0, 2.0, 5.0], [0.0] * 4), 4: ([1.0, 3.0, 2.0, 6.0], [1.0, 3.0, 2.0, 2.0])}
SLOW_END = {8: ([5.0, 5.0, 4.0, 6.0], [5.0, 7.0, 6.0, 6.0])}
FAST = {0: ([0.0, 1.0, 2.0, 5.0], [0.0] * 4), 4: ([2.0, 2.0, 3.0, 9.0], [4.0, 2.0, 6.0, 4.0])}


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    return store(tmp_path / "slow", {step: held_out(*item) for step, item in (SLOW | SLOW_END).items()})


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    tokens = {step: 150.0 * step for step in range(1, 5)}
    return store(tmp_path / "fast", {step: held_out(*item) for step, item in FAST.items()}, tokens)


# ---- the three matchings, by hand


def test_equal_steps_is_the_last_evaluation_all_have(slow: Path, fast: Path) -> None:
    matching, (first, other) = of([slow, fast], "steps")
    assert (matching.level, first.places[0].before, first.places[0].after, other.places[0].after) == (4, 4, 4, 4)
    assert (first.values["reward"].mean, other.values["reward"].mean) == pytest.approx((3, 4))
    assert other.differences["reward"].mean == pytest.approx((1 - 1 + 1 + 3) / 4)
    assert other.differences["kl_nats"].mean == pytest.approx(2, abs=1e-6)
    assert first.differences["reward"] == Estimate(0, 0, 0)


def test_equal_tokens_is_the_budget_of_the_run_that_trained_least(slow: Path, fast: Path) -> None:
    """fast ends at 600 tokens, which slow reached half way from step 4 (400) to step 8 (800)."""
    matching, (first, other) = of([slow, fast], "tokens")
    assert matching.level == 600
    assert (first.places[0].before, first.places[0].after, first.places[0].weight) == (4, 8, pytest.approx(0.5))
    assert (other.places[0].before, other.places[0].after, other.places[0].weight) == (4, 4, 1)
    between = [3.0, 4.0, 3.0, 6.0]
    assert first.values["reward"].mean == pytest.approx(np.mean(between))
    assert other.differences["reward"].mean == pytest.approx(np.mean(np.subtract([2, 2, 3, 9], between)))


def test_equal_kl_is_where_the_run_that_went_least_far_ends(slow: Path, fast: Path) -> None:
    """fast reached 4 nats, slow half way from 2 (step 4) to 6 (step 8)."""
    matching, (first, other) = of([slow, fast], "kl")
    assert matching.level == pytest.approx(4, abs=1e-6)
    assert (first.places[0].before, first.places[0].after, first.places[0].weight) == (
        4,
        8,
        pytest.approx(0.5, abs=1e-6),
    )
    assert (other.places[0].before, other.places[0].after) == (4, 4)
    assert first.values["kl_nats"].mean == pytest.approx(other.values["kl_nats"].mean, abs=1e-9)
    assert other.differences["kl_nats"].mean == pytest.approx(0, abs=1e-9)
    assert first.values["reward"].mean == pytest.approx(4, abs=1e-5)


def test_the_first_crossing_counts(tmp_path: Path) -> None:
    kl = {0: 0.0, 1: 4.0, 2: 1.0, 3: 9.0}
    back = store(tmp_path / "back", {step: held_out([float(step)] * 3, [item] * 3) for step, item in kl.items()})
    steady = store(tmp_path / "steady", {step: held_out([7.0] * 3, [step * 1.0] * 3) for step in (0, 1, 3)})
    _, (first, other) = of([back, steady], "kl")
    assert (first.places[0].before, first.places[0].after, first.places[0].weight) == (
        0,
        1,
        pytest.approx(0.75, abs=1e-6),
    )
    assert other.places[0].after == 3


def test_differences_are_paired(tmp_path: Path) -> None:
    """Prompts spread over 0 to 30, one arm 2 better on each: means are uncertain, the difference is exact."""
    rewards = [0.0, 10.0, 20.0, 30.0]
    one = store(tmp_path / "one", {0: held_out(rewards, [0.0] * 4)})
    two = store(tmp_path / "two", {0: held_out([reward + 2 for reward in rewards], [0.0] * 4)})
    _, (first, other) = of([one, two], "steps")
    assert other.differences["reward"] == Estimate(2, 2, 2)
    assert first.values["reward"].half_width > 5


def test_the_interval_is_that_of_paired_values_between_evaluations(tmp_path: Path) -> None:
    """Against the t interval of interpolated differences made here, on 300 prompts."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 300)
    early, late, other = base + rng.normal(0, 1, 300), base + 1 + rng.normal(0, 1, 300), base + rng.normal(0, 1, 300)
    kl = [0.0] * 300
    one = store(tmp_path / "one", {0: held_out(list(base), kl), 3: held_out(list(other), kl)}, {3: 25.0})
    two = store(tmp_path / "two", {0: held_out(list(early), kl), 9: held_out(list(late), kl)}, {9: 100.0})
    matching, (_, result) = of([one, two], "tokens")
    differences = 0.75 * early + 0.25 * late - other
    half = 1.96 * differences.std(ddof=1) / math.sqrt(300)
    assert (matching.level, result.places[0].weight) == (25, 0.25)
    change = result.differences["reward"]
    assert change.mean == pytest.approx(differences.mean(), abs=1e-6)
    assert (change.low, change.high) == pytest.approx((change.mean - half, change.mean + half), abs=0.1 * half)


def test_the_interval_at_equal_kl_knows_that_the_kl_is_estimated() -> None:
    """Against a bootstrap that starts over with the prompts it drew: mean KLs, level, place and difference.

    Reward rises steeply with KL and is measured well, KL is not: nearly all of the error is that of the KL.
    """
    rng, count = np.random.default_rng(8), 200
    rows = tuple((number, "") for number in range(count))

    def arm(nats: Sequence[float]) -> Run:
        values = [
            {"kl_nats": item + rng.normal(0, item / 2, count), "reward": item / 10 + rng.normal(0, 0.3, count)}
            for item in nats
        ]
        return Run("arm", Path("arm"), {}, rows, tuple(Evaluation(k, math.nan, item) for k, item in enumerate(values)))

    near, far = arm([0, 6, 12]), arm([0, 8, 16])
    result = matched(compare.compare([near, far]), "kl").arms_at_level[1].differences["reward"]

    def difference(drawn: np.ndarray) -> float:
        (near_kl, far_kl), (near_reward, far_reward) = (
            [[item.values[name][drawn].mean() for item in run.evaluations] for run in (near, far)]
            for name in ("kl_nats", "reward")
        )
        return float(np.interp(near_kl[2], far_kl, far_reward) - near_reward[2])

    again = np.std([difference(rng.integers(0, count, count)) for _ in range(2000)])
    assert result.mean == pytest.approx(difference(np.arange(count)), abs=1e-12)
    assert result.half_width == pytest.approx(1.96 * again, rel=0.08)
    fixed = 0.5 * (far.evaluations[1].values["reward"] + far.evaluations[2].values["reward"])
    naive = np.std(fixed - near.evaluations[2].values["reward"], ddof=1) / math.sqrt(count)
    assert again > 1.5 * naive  # what an interval with level and place held fixed would say


def test_samples_of_a_prompt_are_one_value(tmp_path: Path) -> None:
    one = store(tmp_path / "one", {0: held_out([1.0, 3.0, None, 5.0, None, None], [0.0] * 6, samples=2)})
    arm = compare.load(one)
    assert arm.evaluations[0].values["reward"] == pytest.approx([2, 5, math.nan], nan_ok=True)
    assert arm.prompts == ((0, "prompt 0"), (1, "prompt 1"), (2, "prompt 2"))


def test_a_failed_monitor_leaves_the_pair_out_and_the_table_says_so(tmp_path: Path) -> None:
    one = store(tmp_path / "one", {0: held_out([1.0] * 4, [0.0] * 4, gold=[1.0, None, 3.0, 4.0])})
    two = store(tmp_path / "two", {0: held_out([1.0] * 4, [0.0] * 4, gold=[2.0, 100.0, None, 6.0])})
    _, (_, other) = of([one, two], "steps")
    assert (other.differences["reward_gold"].mean, other.paired["reward_gold"]) == (1.5, 2)
    assert "(2 prompts)" in printed([one, two])


def test_a_reward_only_one_run_has_is_not_compared(tmp_path: Path) -> None:
    one = store(tmp_path / "one", {0: held_out([1.0] * 4, [0.0] * 4)})
    two = store(tmp_path / "two", {0: held_out([1.0] * 4, [0.0] * 4, gold=[2.0] * 4)})
    _, (first, other) = of([one, two], "steps")
    assert math.isnan(first.values["reward_gold"].mean) and other.values["reward_gold"].mean == 2
    assert math.isnan(other.differences["reward_gold"].mean)


# ---- where a matching does not exist


def test_no_common_step(tmp_path: Path) -> None:
    one = store(tmp_path / "one", {2: held_out([1.0] * 3, [1.0] * 3)})
    two = store(tmp_path / "two", {3: held_out([1.0] * 3, [1.0] * 3)})
    matching, arms_at_level = of([one, two], "steps")
    assert arms_at_level == [] and "no step at which all" in matching.why_not
    matching, arms_at_level = of([one, two], "tokens")
    assert arms_at_level == [] and "two is beyond that from its first evaluation on: 300" in matching.why_not


def test_without_a_reference_there_is_no_equal_kl(tmp_path: Path, fast: Path) -> None:
    bare = store(tmp_path / "bare", {0: held_out([1.0] * 4, None), 4: held_out([2.0] * 4, None)})
    matching, arms_at_level = of([fast, bare], "kl")
    assert arms_at_level == [] and matching.why_not == "bare has no reference log-probs"
    assert len(of([fast, bare], "steps")[1]) == len(of([fast, bare], "tokens")[1]) == 2


def test_an_evaluation_before_its_line_of_metrics_has_no_tokens_yet(slow: Path, tmp_path: Path) -> None:
    """What a live run looks like: the evaluation of step 8 is there, the line of step 8 is not."""
    running = store(
        tmp_path / "running", {step: held_out(*item) for step, item in (SLOW | SLOW_END).items()}, {4: 400.0}
    )
    matching, arms_at_level = of([slow, running], "tokens")
    assert (matching.level, arms_at_level[1].places[0].after) == (400, 4)
    assert of([slow, running], "steps")[0].level == 8


# ---- what must not matter


def arm_of(seed: int, name: str, num_prompts: int, steps: Sequence[int]) -> Run:
    """An arm drawn from a seed, KL growing with the step; a tenth of the gold values missing."""
    rng = np.random.default_rng(seed)
    evaluations = []
    for place, step in enumerate(steps):
        gold = np.where(rng.random(num_prompts) < 0.1, np.nan, rng.normal(size=num_prompts))
        values = {
            "reward": rng.normal(place, 1, num_prompts),
            "reward_gold": gold,
            "kl_nats": rng.normal(0.5 * step, 0.3, num_prompts) * (step > 0),
        }
        evaluations.append(Evaluation(step, step * rng.uniform(50, 100), values))
    rows = tuple((number, f"prompt {number}") for number in range(num_prompts))
    return Run(name, Path(name), {}, rows, tuple(evaluations))


ARMS = st.tuples(st.integers(0, 9999), st.integers(0, 9999), st.integers(8, 30), st.integers(1, 4))


@settings(max_examples=12, deadline=None)
@given(ARMS)
def test_swapping_runs_flips_every_difference(drawn: tuple[int, int, int, int]) -> None:
    seed, other_seed, num_prompts, count = drawn
    one = arm_of(seed, "one", num_prompts, [0, 2, 4, 6, 8][: count + 1])
    two = arm_of(other_seed, "two", num_prompts, [0, 4, 8])
    present, back = compare.compare([one, two]), compare.compare([two, one])
    for left, right in zip(present.matchings, back.matchings, strict=True):
        assert left.level == right.level and len(left.arms_at_level) == len(right.arms_at_level) == 2
        for name in present.metrics:
            a, b = left.arms_at_level[1].differences[name], right.arms_at_level[1].differences[name]
            assert (a.mean, a.low, a.high) == pytest.approx((-b.mean, -b.high, -b.low), abs=0.02, nan_ok=True)
            assert a.mean == pytest.approx(-b.mean, abs=1e-12)
            assert left.arms_at_level[1].values[name] == right.arms_at_level[0].values[name]


@settings(max_examples=6, deadline=None)
@given(ARMS)
def test_a_run_beside_itself_differs_in_nothing(drawn: tuple[int, int, int, int]) -> None:
    seed, _, num_prompts, count = drawn
    arm = arm_of(seed, "same", num_prompts, [0, 2, 4, 6][: count + 1])
    longer = arm_of(seed + 1, "longer", num_prompts, [0, 3, 9])
    for beside in ([arm, arm], [arm, arm, longer]):
        for matching in compare.compare(beside).matchings:
            assert all(item == Estimate(0, 0, 0) for item in matching.arms_at_level[1].differences.values())
            assert matching.arms_at_level[0].values == matching.arms_at_level[1].values


@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(6)))
def test_the_order_of_prompts_in_a_file_changes_nothing(
    order: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    rewards, kl = [0.5, 1.0, 4.0, 2.0, 8.0, 0.0], [1.0, 2.0, 0.5, 0.0, 3.0, 1.5]
    batches = {0: held_out(rewards, [0.0] * 6), 5: held_out(rewards[::-1], kl, lengths=[1, 2, 3, 4, 5, 1])}
    one = store(folder / "one", {0: held_out(kl, [0.0] * 6), 3: held_out(kl, rewards)})
    two = store(folder / "two", batches)
    mixed = store(folder / "else/two", {0: batches[0], 5: batches[5].take(pa.array(order))})
    pair, other = (compare.compare([compare.load(one), compare.load(item)]) for item in (two, mixed))
    assert pair.matchings == other.matchings


# ---- arms of several seeds


def seeded(folder: Path, name: str, seed: int, shift: float, step: int = 4, **run: Any) -> Path:
    """A run of a seed: reward shift + seed on four prompts that differ by 10, KL 2 nats at its last step."""
    end = held_out([shift + seed + 10 * prompt for prompt in range(4)], [2.0] * 4)
    identity = {"name": name, "seed": seed, "directory": str(folder / name), **run}
    return store(folder / name, {0: held_out([0.0] * 4, [0.0] * 4), step: end}, run=identity)


def test_runs_that_differ_in_their_seed_alone_are_one_arm(tmp_path: Path) -> None:
    """Means over seeds 1 and 2.5, difference 1.5; seeds spread alike in both, so the interval is Welch's of them."""
    kl = [seeded(tmp_path, f"kl-seed-{seed}", seed, 0.0, steps=4) for seed in (0, 1, 2)]
    other = [seeded(tmp_path, f"entropy_s{seed}", seed, 1.5, steps=5) for seed in (0, 1, 2)]
    comparison = compare.compare([compare.load(item) for item in [kl[0], other[1], kl[2], other[0], kl[1], other[2]]])
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in comparison.arms] == [
        ("kl", [0, 2, 1]),
        ("entropy", [1, 0, 2]),
    ]
    assert comparison.names == ["kl (3 seeds)", "entropy (3 seeds)"] and comparison.notes == ()
    for name in ("steps", "tokens", "kl"):
        first, second = matched(comparison, name).arms_at_level
        assert (first.values["reward"].mean, second.values["reward"].mean) == pytest.approx((16, 17.5))
        change = second.differences["reward"]
        expected = stats.ttest_ind([1.5, 2.5, 3.5], [0, 1, 2], equal_var=False).confidence_interval()
        assert (change.mean, change.low, change.high) == pytest.approx((1.5, *expected), abs=0.1)
        assert first.differences["reward"] == Estimate(0, 0, 0)


def test_a_repetition_is_another_arm_and_a_lone_arm_has_no_difference(tmp_path: Path) -> None:
    runs = [seeded(tmp_path, name, seed, 0.0) for name, seed in (("a0", 0), ("a1", 1), ("again", 0))]
    comparison = compare.compare([compare.load(item) for item in runs])
    assert [[run.name for run in arm.runs] for arm in comparison.arms] == [["a0", "a1"], ["again"]]
    text = printed(runs)
    assert "1 seed: interval over prompts only" in text and "several seeds: interval over seeds and prompts" in text
    alone = compare.compare([compare.load(item) for item in runs[:2]])
    assert alone.names == ["a (2 seeds)"] and matched(alone, "steps").arms_at_level[0].values["reward"].mean == 15.5


def test_arms_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [seeded(tmp_path, name, 0, shift, steps=shift + 1) for name, shift in (("x", 0), ("y", 1), ("z=1", 2))]
    console = Console(file=io.StringIO(), width=120)
    monkeypatch.chdir(tmp_path)
    compare.run(["both=x", f"both={runs[1]}", "z=1"], console, as_json=True, picture=None)
    arms = json.loads(console.file.getvalue())["arms"]  # type: ignore[attr-defined]
    assert [(arm["name"], arm["intervals"], len(arm["runs"])) for arm in arms] == [
        ("both", "seeds and prompts", 2),
        ("z=1", "prompts", 1),
    ]
    with pytest.raises(ConfigError, match=r"absent: no config\.yaml in it"):
        compare.run(["both=x", "both=absent"], console, as_json=True, picture=None)
    with pytest.raises(ConfigError, match=r"^arm both: has .*/x twice; expected different runs$"):
        compare.run(["both=x", f"both={runs[0]}"], console, as_json=True, picture=None)
    mixed = compare.compare([compare.load(run) for run in runs[:2]], ["y", None])
    assert [arm.name for arm in mixed.arms] == ["y", f"{runs[1]} (run 2)"]


def test_every_seed_stands_at_its_own_place(tmp_path: Path) -> None:
    """At 300 tokens seed 0 is three quarters of the way to step 4 (400), seed 1 stands at its step 3."""
    runs = [seeded(tmp_path, f"a{seed}", seed, 0.0, step=4 - seed) for seed in (0, 1)]
    matching = matched(compare.compare([compare.load(run) for run in runs]), "tokens")
    assert [(place.before, place.after, place.weight) for place in matching.arms_at_level[0].places] == [
        (0, 4, 0.75),
        (3, 3, 1.0),
    ]
    assert matching.arms_at_level[0].values["reward"].mean == pytest.approx((0.75 * 15 + 16) / 2)
    assert "0-4 by seed" in printed(runs) and "a place of its own" in printed(runs)


def test_the_prompts_of_an_arm_are_those_with_a_value_in_every_seed(tmp_path: Path) -> None:
    gold = [[1.0, 2.0, None, 4.0], [3.0, None, 5.0, 6.0]]
    for seed, values in enumerate(gold):
        batch = held_out([1.0] * 4, [0.0] * 4, gold=values)
        store(tmp_path / f"a{seed}", {0: batch}, run={"name": f"a{seed}", "seed": seed})
    lone = store(tmp_path / "b", {0: held_out([1.0] * 4, [0.0] * 4, gold=[0.0] * 4)}, run={"name": "b", "steps": 9})
    comparison = compare.compare([compare.load(item) for item in (tmp_path / "a0", tmp_path / "a1", lone)])
    first, second = matched(comparison, "steps").arms_at_level
    assert first.values["reward_gold"].mean == pytest.approx((2 + 5) / 2)
    assert (second.differences["reward_gold"].mean, second.paired["reward_gold"]) == (pytest.approx(-3.5), 2)


# ---- refusals, each one line


def refusal(*directories: Path) -> str:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        compare.run(list(map(str, directories)), Console(file=io.StringIO()), as_json=False, picture=None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fewer_than_two_runs(slow: Path) -> None:
    assert refusal(slow) == "compare: 1 run; expected at least 2 run directories"
    assert refusal() == "compare: 0 run; expected at least 2 run directories"


def test_other_prompts(slow: Path, tmp_path: Path) -> None:
    moved = store(tmp_path / "moved", {0: held_out([1.0] * 4, [0.0] * 4, tickets=[0, 1, 2, 4])})
    assert "moved: evaluated on other held-out prompts than" in refusal(slow, moved)
    assert "(3 of 4 shared)" in refusal(slow, moved)
    fewer = store(tmp_path / "fewer", {0: held_out([1.0] * 3, [0.0] * 3)})
    assert "(3 of 4 shared); expected the same prompts.source, prompts.held_out and prompts.held_out_seed" in refusal(
        slow, fewer
    )


def test_the_same_text_from_another_row_is_another_prompt(tmp_path: Path) -> None:
    """prompt_id is ticket modulo 7 here: tickets 0 and 7 share it, their texts differ."""
    one = store(tmp_path / "one", {0: held_out([1.0] * 2, [0.0] * 2, tickets=[0, 1])})
    two = store(tmp_path / "two", {0: held_out([1.0] * 2, [0.0] * 2, tickets=[7, 1])})
    assert "(1 of 2 shared)" in refusal(one, two)


def test_a_run_that_changed_its_prompts(tmp_path: Path, slow: Path) -> None:
    batches = {0: held_out([1.0] * 2, [0.0] * 2), 1: held_out([1.0] * 2, [0.0] * 2, tickets=[0, 2])}
    assert "step 1 was evaluated on other prompts than step 0" in refusal(slow, store(tmp_path / "odd", batches))


def test_no_run_no_evaluation_no_file(slow: Path, tmp_path: Path) -> None:
    assert "nowhere: no config.yaml in it" in refusal(slow, tmp_path / "nowhere")
    files.write(tmp_path / "new/config.yaml", yaml.safe_dump(SETTINGS).encode())
    assert "new: no evaluation in it" in refusal(slow, tmp_path / "new")
    stored_evaluations.path_of(slow, 4).unlink()
    assert "step-000004.arrow" in refusal(slow, slow)


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"text"])
def test_a_configuration_that_is_none(slow: Path, content: bytes) -> None:
    (slow / "config.yaml").write_bytes(content)
    assert str(slow) in refusal(slow, slow)


def test_a_damaged_file(slow: Path) -> None:
    (slow / "frontier.arrow").write_bytes(b"no Arrow")
    assert str(slow) in refusal(slow, slow)


# ---- what is shown


def printed(directories: list[Path], as_json: bool = False, picture: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    compare.run(list(map(str, directories)), console, as_json=as_json, picture=picture)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_say_where_they_stand_and_what_intervals_are(slow: Path, fast: Path) -> None:
    text = printed([slow, fast])
    for title in ("equal steps (4): 4 held-out prompts", "equal tokens (600 trained on)", "equal KL (4.000 nats)"):
        assert title in text
    assert text.count("95 % intervals per metric, not") == 3
    assert text.count("4-8 (0.50)") > 2 and "interpolated, w of the way" in text
    assert "minus slow (paired)" in text and "+1.000 [" in text
    assert "Note" not in text


def test_json_has_the_numbers_of_the_tables_and_null_for_none(slow: Path, fast: Path, tmp_path: Path) -> None:
    bare = store(tmp_path / "bare", {0: held_out([1.0] * 4, None), 4: held_out([2.0] * 4, None)})
    result = json.loads(printed([slow, fast, bare], as_json=True), parse_constant=pytest.fail)
    assert result == compare.tree_of(compare.compare([compare.load(item) for item in (slow, fast, bare)]))
    assert result["prompts"] == 4 and [item["name"] for item in result["arms"]] == ["slow", "fast", "bare"]
    steps = result["matchings"]["steps"]
    assert steps["arms"]["fast"]["differences"]["reward"]["mean"] == pytest.approx(1)
    assert steps["arms"]["fast"]["differences"]["reward"]["prompts"] == 4
    assert steps["arms"]["bare"]["values"]["kl_nats"] == {"mean": None, "low": None, "high": None}
    assert steps["why_not"] is None
    assert result["matchings"]["kl"] == {"level": None, "why_not": "bare has no reference log-probs", "arms": {}}
    assert result["matchings"]["tokens"]["arms"]["fast"]["places"] == [
        {"steps": [0, 4], "weight": pytest.approx(2 / 3)}
    ]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    batch = held_out([1.0] * 3, [0.0] * 3)
    both = [store(tmp_path / parent / "run", {0: batch}) for parent in ("a", "b")]
    names = compare.compare([compare.load(item) for item in [*both, both[0]]]).names
    assert len(set(names)) == 3 and str(both[1]) in names[1]


@pytest.mark.parametrize(
    ("blocks", "note"),
    [
        ({"rewards": [SETTINGS["rewards"][0] | {"weight": 2.0}]}, "has other rewards than slow"),
        ({"policy": {"model": "other"}}, "policy.model: KL is to another policy"),
        ({"sampling": {"temperature": 0.5, "max_tokens": 5}}, "sampling.temperature: the answers differ by more"),
    ],
)
def test_settings_that_change_what_a_number_means(slow: Path, tmp_path: Path, blocks: Any, note: str) -> None:
    other = store(tmp_path / "other", {0: held_out([1.0] * 4, [0.0] * 4)}, **blocks)
    assert note in printed([slow, other])
    monitor = {"name": "gold", "kind": "rule", "source": "c:d", "role": "monitor", "weight": 1.0}
    watched = store(tmp_path / "w", {0: held_out([1.0] * 4, [0.0] * 4)}, rewards=[*SETTINGS["rewards"], monitor])
    assert compare.compare([compare.load(slow), compare.load(watched)]).notes == ()


def test_the_picture_comes_with_the_tables(slow: Path, fast: Path, tmp_path: Path) -> None:
    assert "equal steps" in printed([slow, fast], picture=tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
