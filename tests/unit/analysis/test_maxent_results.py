"""benchmarks/maxent: verdicts on planted runs, numbers by hand, and the page in the repository."""

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

from keel import files
from keel.observability import evaluations
from rollouts import generated, prompts, referenced, scored

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "benchmarks" / "maxent"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    import claims
    import collect
    import curves
    import guard_record
    import results
    from claims import NOT_SUPPORTED, SUPPORTED, UNDECIDED
    from curves import ArmCurves, Experiment, Firing

PROMPTS, STEPS = 64, (0, 10, 20, 30)
RISING = (0.0, 0.5, 1.0, 1.5)
PEAKED, KEPT = (0.0, 1.0, 0.6, 0.2), (0.0, 0.5, 0.8, 1.0)
RATE = 1e-4


def arm(
    name: str,
    gold: tuple[float, ...] = KEPT,
    proxy: tuple[float, ...] = RISING,
    kl: tuple[float, ...] = (0.0, 4.0, 5.0, 5.2),
    entropy: float = 2.0,
    seeds: int = 3,
    noise: float = 0.02,
    rise: float = 1.0,
    **settings: Any,
) -> ArmCurves:
    """An arm with these means by evaluation; a prompt has its own level, and every value some noise."""
    rng = np.random.default_rng(sum(map(ord, name)))
    level = np.random.default_rng(0).normal(0, 1, PROMPTS)
    shape = (seeds, len(STEPS), PROMPTS)

    def values(means: tuple[float, ...]) -> np.ndarray:
        between_seeds = rng.normal(0, noise / 4, (seeds, len(STEPS), 1))
        return np.array(means)[:, None] + level + between_seeds + rng.normal(0, noise, shape)

    arrays = {
        "gold": values(gold),
        "proxy": values(proxy),
        "kl_nats": values(kl) - level,
        "entropy": values((entropy,) * 4) - level,
        "length_tokens": np.full(shape, 32.0),
    }
    series = tuple(np.array([0.0, rise * (1 + 0.05 * seed), 0.5]) for seed in range(seeds))
    defaults = {"offline": False, "entropy_coefficient": 0.0, "entropy_form": "none", "max_tokens": 32}
    row = defaults | {"vocabulary": 4096} | settings
    rate = None if row["offline"] else RATE
    return ArmCurves(name, rate, tuple(range(seeds)), STEPS, arrays, series, (), row)


def entropy_arm(number: int = 1, **planted: Any) -> ArmCurves:
    coefficient = number / 100
    name = f"entropy_mean_exact-{coefficient:g}"
    return arm(name, entropy_coefficient=coefficient, entropy_form="sequence_mean_exact", **planted)


def verdict(claim: Callable[[Experiment, float], Any], *arms: ArmCurves) -> str:
    result: str = claim(Experiment(arms, ()), RATE).verdict
    return result


def test_entropy_over_optimizes() -> None:
    true, false = entropy_arm(gold=PEAKED), entropy_arm(gold=KEPT)
    assert verdict(claims.over_optimization, true) == SUPPORTED
    assert verdict(claims.over_optimization, false) == NOT_SUPPORTED
    assert verdict(claims.over_optimization, entropy_arm(gold=PEAKED, proxy=PEAKED)) == NOT_SUPPORTED
    assert verdict(claims.over_optimization, entropy_arm(gold=PEAKED, seeds=1)) == UNDECIDED
    assert verdict(claims.over_optimization, entropy_arm(gold=(0.0, 1.0, 0.9, 0.8), noise=3.0)) == UNDECIDED
    assert verdict(claims.over_optimization) == UNDECIDED


def test_the_kl_of_entropy_is_unstable() -> None:
    control, far = arm("kl-0.1"), (0.0, 10.0, 20.0, 40.0)
    assert verdict(claims.unstable_kl, entropy_arm(kl=far, rise=9.0), control) == SUPPORTED
    assert verdict(claims.unstable_kl, entropy_arm(kl=far, rise=0.1), control) == NOT_SUPPORTED
    assert verdict(claims.unstable_kl, entropy_arm(kl=far, rise=1.0), control) == UNDECIDED
    assert verdict(claims.unstable_kl, entropy_arm(kl=far, rise=9.0)) == UNDECIDED


def test_kl_control_is_stable() -> None:
    assert verdict(claims.stable_kl_control, arm("kl-0.1")) == SUPPORTED
    assert verdict(claims.stable_kl_control, arm("kl-0.1", gold=PEAKED)) == NOT_SUPPORTED
    assert verdict(claims.stable_kl_control, arm("kl-0.1", kl=(0.0, 1.0, 4.0, 9.0))) == NOT_SUPPORTED
    assert verdict(claims.stable_kl_control, arm("kl-0.1", seeds=1)) == UNDECIDED
    assert verdict(claims.stable_kl_control, arm("kl-0.1", noise=3.0)) == UNDECIDED


def test_entropy_does_not_prevent_hacking() -> None:
    none = arm("none", gold=PEAKED)
    assert verdict(claims.no_prevention, entropy_arm(gold=PEAKED), none) == SUPPORTED
    assert verdict(claims.no_prevention, entropy_arm(gold=KEPT), none) == NOT_SUPPORTED
    assert verdict(claims.no_prevention, entropy_arm(gold=PEAKED, noise=3.0), none) == UNDECIDED
    assert verdict(claims.no_prevention, entropy_arm(gold=PEAKED)) == UNDECIDED


def test_entropy_goes_with_hacking() -> None:
    def family(sign: int, size: int = 5) -> list[ArmCurves]:
        ends = [0.5 + sign * 0.2 * number for number in range(size)]
        return [entropy_arm(n + 1, gold=(0.0, 2.0, 2.0, end), entropy=1.0 + n) for n, end in enumerate(ends)]

    assert verdict(claims.entropy_correlates, *family(-1)) == SUPPORTED
    assert verdict(claims.entropy_correlates, *family(1)) == NOT_SUPPORTED
    assert verdict(claims.entropy_correlates, *family(-1, size=3)) == UNDECIDED
    mixed = [entropy_arm(n + 1, noise=3.0, entropy=2.0) for n in range(5)]
    assert verdict(claims.entropy_correlates, *mixed) == UNDECIDED


def test_offline_simpo_works() -> None:
    failed, won = entropy_arm(gold=PEAKED), entropy_arm(gold=KEPT)

    def simpo(gold: float, seeds: int = 3) -> ArmCurves:
        return arm("simpo", gold=(gold,) * 4, offline=True, seeds=seeds)

    assert verdict(claims.offline_works, failed, simpo(0.8)) == SUPPORTED
    assert verdict(claims.offline_works, failed, simpo(-0.5)) == NOT_SUPPORTED
    assert verdict(claims.offline_works, failed, won, simpo(0.8)) == NOT_SUPPORTED  # the best entropy arm has 1.0
    assert verdict(claims.offline_works, failed, simpo(0.8, seeds=1)) == UNDECIDED
    assert verdict(claims.offline_works, failed) == UNDECIDED


def test_the_peak_of_one_half_is_chosen_by_the_other() -> None:
    """Even prompts peak at evaluation 1, odd ones at 2: each half is read where the other one peaks."""
    gold = np.array([[[0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 7.0, 3.0], [2.0, 6.0, 4.0, 8.0], [1.0, 1.0, 1.0, 1.0]]])
    assert curves.peak_places(gold).tolist() == [[2, 1, 2, 1]]
    planted = dataclasses.replace(arm("none", seeds=1), values={"gold": gold})
    assert planted.at_peak("gold").tolist() == [[2.0, 1.0, 4.0, 3.0]]
    assert planted.since_peak("gold").tolist() == [[-1.0, 0.0, -3.0, -2.0]]


def test_gold_that_does_not_move_has_no_peak() -> None:
    """The largest of four equal means lies above the last one by chance; the change since the peak is 0 on average."""
    rng = np.random.default_rng(1)
    changes, chosen_by_all = [], []
    for _ in range(400):
        gold = rng.normal(0, 1, (1, 4, 64))
        planted = dataclasses.replace(arm("none", seeds=1), values={"gold": gold})
        changes.append(planted.since_peak("gold").mean())
        chosen_by_all.append(gold[0, -1].mean() - gold[0].mean(axis=1).max())
    assert abs(np.mean(changes)) < 3 * stats.sem(changes)
    assert np.mean(chosen_by_all) < -10 * stats.sem(chosen_by_all)


def test_late_growth_by_hand() -> None:
    """Steps 0, 10, 20, 30: two thirds are step 20. 9 - 7 - 9 / 6 = 0.5. Steps 0, 10, 40: KL 3 + 5 * 5 / 9 at 26.7."""
    planted = dataclasses.replace(arm("kl-0.1"), values={"kl_nats": np.array([[[0.0], [4.0], [7.0], [9.0]]])})
    assert claims.late_growth(planted) == pytest.approx(np.array([[0.5]]))
    uneven = dataclasses.replace(planted, steps=(0, 10, 40), values={"kl_nats": np.array([[[0.0], [3.0], [8.0]]])})
    assert claims.late_growth(uneven) == pytest.approx(np.array([[8 - (3 + 5 * (80 / 3 - 10) / 30) - 8 / 6]]))


def test_rank_correlation_by_hand() -> None:
    """Four arms, order 1 3 2 4 beside 1 2 3 4: five pairs agree, one does not: tau = 4 / 6. Seed 1 is in order."""
    arms = [entropy_arm(number + 1, seeds=2) for number in range(4)]
    effects = dict(zip([member.name for member in arms], [[1, 1], [3, 2], [2, 3], [4, 4]], strict=True))
    taus = claims.correlations(
        arms,
        lambda member: np.full(2, member.settings["entropy_coefficient"]),
        lambda member: np.array(effects[member.name]),
    )
    assert taus == pytest.approx([4 / 6, 1.0])


def test_ratio_by_hand() -> None:
    """Logarithms of (2, 8) and (1, 1): geometric means 4 and 1; Welch's interval with one degree of freedom."""
    result = claims.ratio([(1, np.log([[2.0], [8.0]])), (-1, np.log([[1.0], [1.0]]))])
    half = stats.t.ppf(0.975, 1) * math.log(4) / math.sqrt(2) / math.sqrt(2)
    assert result.mean == pytest.approx(4.0)
    assert math.log(result.high) == pytest.approx(math.log(4) + half, rel=0.1)  # drawn, not computed
    assert math.log(result.low) == pytest.approx(math.log(4) - half, rel=0.1)


def test_what_entropy_can_pay() -> None:
    settings = {"entropy_coefficient": 0.1, "entropy_form": "sequence_sum", "max_tokens": 32, "vocabulary": 4096}
    assert curves.payment(settings) == pytest.approx(0.1 * 32 * 12 * math.log(2))
    assert curves.payment(settings | {"entropy_form": "token_bonus"}) == pytest.approx(0.1 * 12 * math.log(2))
    assert curves.payment(settings | {"entropy_form": "sequence_mean_naive"}) == pytest.approx(1.2 * math.log(2))
    assert curves.payment(settings | {"entropy_coefficient": 0.0}) == 0.0
    assert math.isnan(curves.payment(settings | {"vocabulary": None}))


def test_the_record_of_a_detector() -> None:
    """Gold falls at step 20 in the hacked runs; kl_slope fires at 12 and again, entropy at 30 in one of two."""
    fired = (Firing(0, 25, "kl_slope"), Firing(0, 12, "kl_slope"), Firing(1, 24, "kl_slope"), Firing(1, 30, "entropy"))
    hacked = dataclasses.replace(arm("none", gold=PEAKED, seeds=2), firings=fired)
    healthy = dataclasses.replace(arm("kl-0.1", seeds=2), firings=(Firing(0, 5, "entropy"),))
    records = {record.detector: record for record in guard_record.records(Experiment((hacked, healthy), ()))}
    assert records["kl_slope"].delays == (-8, 4) and records["entropy"].delays == (10,)
    assert (records["entropy"].fired_healthy, records["entropy"].healthy, records["entropy"].hacked) == (1, 2, 2)
    assert records["length"].delays == () and records["length"].fired_healthy == 0


def test_a_fall_is_of_more_than_one_standard_error() -> None:
    """Differences -1, -1, -1, 0 (mean -3/4, error 1/4) and -2, 1, 0, 0 (mean -1/4, error 0.63)."""
    assert guard_record.is_below(np.array([-1.0, -1, -1, 0]), np.zeros(4))
    assert not guard_record.is_below(np.array([-2.0, 1, 0, 0]), np.zeros(4))
    gold = np.array([[0.0] * 4, [1.0] * 4, [-1.0, 2, 1, 1], [0.0, 0, 0, 1]])
    assert guard_record.fall_step(STEPS, gold) == 30
    assert guard_record.fall_step(STEPS[:3], gold[:3]) is None


def test_a_guarded_arm_is_set_against_the_peak() -> None:
    plain = arm("none", gold=PEAKED)
    (kept,) = guard_record.guarded_arms(Experiment((plain, arm("none-guard", gold=(0.0, 1.0, 1.0, 1.0))), ()))
    (lost,) = guard_record.guarded_arms(Experiment((plain, arm("none-guard", gold=PEAKED)), ()))
    assert (kept.verdict, lost.verdict) == (SUPPORTED, NOT_SUPPORTED)


def rows(seeds: tuple[int, ...] = (0, 1)) -> dict[str, list[dict[str, Any]]]:
    """Tables of two arms of two prompts; gold of seed s at step t on prompt p is s + t / 10 + p."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in collect.SCHEMAS}
    for name in ("none", "kl-0.1"):
        for seed in seeds:
            key = {"sweep": "planted", "arm": name, "learning_rate": RATE, "seed": seed}
            run = {"offline": False, "finished": True, "planned_steps": 20, "entropy_coefficient": 0.0}
            tables["runs"].append(key | run | {"entropy_form": "none", "max_tokens": 32, "vocabulary": 4096})
            for step in (0, 10, 20):
                numbers = {"proxy": step / 5, "kl_nats": step / 4, "entropy": 2.0, "length_tokens": 8.0}
                tables["steps"].append(key | {"step": step, "kl_nats": step / 4})
                for prompt in (7, 3):
                    gold = {"prompt_id": prompt, "gold": seed + step / 10 + prompt}
                    tables["evaluations"].append(key | {"step": step} | numbers | gold)
    return tables


def test_the_tables_are_read_by_seed_step_and_prompt(tmp_path: Path) -> None:
    collect.write(rows(), tmp_path)
    experiment = curves.load(tmp_path)
    assert [member.label for member in experiment.arms] == ["none, 0.0001", "kl-0.1, 0.0001"]
    assert experiment.arms[0].steps == (0, 10, 20)
    assert experiment.arms[0].values["gold"].tolist() == [[[3, 7], [4, 8], [5, 9]], [[4, 8], [5, 9], [6, 10]]]


def test_a_run_directory_becomes_rows(tmp_path: Path) -> None:
    """Two prompts; log-probs of -0.5 at two tokens, the reference lower by 3 and 1: KL 3 and 1, entropy 0.5 a token."""
    directory = tmp_path / "sweep" / "kl-0.1-learning_rate-0.0001" / "seed-4"
    config = {
        "run": {"seed": 4, "steps": 1},
        "learners": {"learning_rate": RATE},
        "regularizer": {"kl": {"coefficient": 0.1}, "entropy": {"form": "none", "coefficient": 0.0}},
        "sampling": {"max_tokens": 32},
    }
    files.write(directory / "config.yaml", yaml.safe_dump(config).encode())
    answers = generated(prompts([0, 1], 1), logprobs=[[-0.5, -0.5]] * 2)
    answers = referenced(answers, [[-3.5, -0.5], [-1.5, -0.5]])
    evaluations.store(directory, 1, scored(answers, [2.0, 4.0], {"gold": [0.5, 0.25]}))
    files.append_json(directory / "metrics.jsonl", {"step": 1, "reward": 3.0, "grad_norm": 7.0})
    fired = {"event": "guard", "step": 1, "detector": "kl_slope", "actions": ["warn"]}
    files.append_json(directory / "events.jsonl", fired)
    tables = collect.collect([tmp_path / "sweep"])
    (run,), (first, second) = tables["runs"], tables["evaluations"]
    assert (run["arm"], run["seed"], run["kl_coefficient"], run["finished"]) == ("kl-0.1", 4, 0.1, True)
    assert [first[name] for name in ("proxy", "gold", "kl_nats", "entropy", "length_tokens")] == [2.0, 0.5, 3.0, 0.5, 2]
    assert [second[name] for name in ("proxy", "gold", "kl_nats")] == [4.0, 0.25, 1.0]
    assert [(step["reward"], step["grad_norm"], step["guard_firings"]) for step in tables["steps"]] == [(3.0, 7.0, 1)]
    assert [(event["detector"], event["actions"]) for event in tables["guard_events"]] == [("kl_slope", '["warn"]')]


def check(folder: Path) -> int:
    command = [sys.executable, str(FOLDER / "results.py"), "--check", "--folder", str(folder)]
    return subprocess.run(command, capture_output=True).returncode


def test_check_sees_a_changed_digit(tmp_path: Path) -> None:
    collect.write(rows(), tmp_path)
    page = results.page(curves.load(tmp_path))
    (tmp_path / "RESULTS.md").write_text(page, encoding="utf8")
    assert check(tmp_path) == 0
    place = page.index("7.500")  # gold of arm none at its end, over two seeds: (5 + 9 + 6 + 10) / 4
    (tmp_path / "RESULTS.md").write_text(page[:place] + "7.501" + page[place + 5 :], encoding="utf8")
    assert check(tmp_path) == 1


def test_missing_arms_and_runs_are_named(tmp_path: Path) -> None:
    tables = rows()
    tables["runs"][-1]["finished"] = False
    collect.write(tables, tmp_path)
    page = results.page(curves.load(tmp_path))
    assert "| kl-0.1, 0.0001 | 1 of 2 |" in page
    assert "Not finished, and in no number: kl-0.1, 0.0001, seed 1." in page
    assert "| entropy_sum-*, 0.0001 | none: no finished run |" in page and "| simpo | none: no evaluation |" in page


def test_the_page_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    tables = rows()
    collect.write(tables, tmp_path / "a")
    collect.write({name: table[::-1] for name, table in tables.items()}, tmp_path / "b")
    assert results.page(curves.load(tmp_path / "a")) == results.page(curves.load(tmp_path / "b"))


def test_a_learning_rate_of_the_grid_is_no_part_of_the_name() -> None:
    assert collect.arm_of("kl-0.1-learning_rate-1e-05") == "kl-0.1"
    assert collect.arm_of("entropy_sum-0.05-learning_rate-0.0001") == "entropy_sum-0.05"
    assert collect.arm_of("none-guard-learning_rate-3e-05") == "none-guard"


def test_a_seed_counts_once() -> None:
    run = {"arm": "none", "learning_rate": RATE, "seed": 0}
    with pytest.raises(collect.ConfigError, match="none: seed 0 at learning rate 0"):
        collect.check_unique([run, dict(run)])


def test_recorded_runs_stay_beside_those_that_are_collected_anew(tmp_path: Path) -> None:
    recorded, again = rows(), rows()
    collect.write(recorded, tmp_path)
    again = {name: [row for row in table if (row["arm"], row["seed"]) == ("none", 1)] for name, table in again.items()}
    new = [dict(row, arm="kl-0.5") for row in again["evaluations"]]
    again["runs"].append(dict(again["runs"][0], arm="kl-0.5"))
    again["evaluations"] = [dict(row, gold=row["gold"] + 1) for row in again["evaluations"]] + new
    tables = collect.with_recorded(again, tmp_path)
    runs = Counter((run["arm"], run["seed"]) for run in tables["runs"])
    assert runs == Counter((run["arm"], run["seed"]) for run in recorded["runs"]) + Counter({("kl-0.5", 1): 1})
    collect.write(tables, tmp_path)
    experiment = curves.load(tmp_path)
    before = [[3, 7], [4, 8], [5, 9]], [[4, 8], [5, 9], [6, 10]]
    none = experiment.named("none", RATE)
    assert none is not None and none.values["gold"].tolist() == [before[0], (np.array(before[1]) + 1).tolist()]


def test_an_unfinished_run_replaces_no_recorded_one(tmp_path: Path) -> None:
    collect.write(rows(), tmp_path)
    unfinished = [dict(run, finished=False) for run in rows()["runs"][:1]]
    unfinished.append(dict(unfinished[0], arm="kl-0.5"))
    tables = collect.with_recorded({name: [] for name in collect.SCHEMAS} | {"runs": unfinished}, tmp_path)
    assert len(tables["runs"]) == len(rows()["runs"]) + 1 and len(tables["evaluations"]) == len(rows()["evaluations"])
    assert [run["arm"] for run in tables["runs"] if not run["finished"]] == ["kl-0.5"]


def test_runs_of_other_held_out_prompts_are_not_added(tmp_path: Path) -> None:
    collect.write(rows(), tmp_path)
    other = rows()
    other["evaluations"] = [dict(row, prompt_id=row["prompt_id"] + 100) for row in other["evaluations"]]
    with pytest.raises(collect.ConfigError, match="evaluated on other held-out prompts"):
        collect.with_recorded(other, tmp_path)


def test_the_tests_of_claim_6_exist() -> None:
    for file, names in results.IDENTITY_TESTS.items():
        text = (ROOT / file).read_text(encoding="utf8")
        assert all(f"def {name}(" in text for name in names)


@pytest.mark.skipif(not (FOLDER / "runs.parquet").exists(), reason="no results of runs are in the repository yet")
def test_the_page_is_what_the_numbers_give() -> None:
    page = (FOLDER / "RESULTS.md").read_text(encoding="utf8")
    assert page == results.page(curves.load(FOLDER))
    assert all(pq.read_schema(FOLDER / f"{name}.parquet") == schema for name, schema in collect.SCHEMAS.items())
    assert isinstance(collect.RUNS, pa.Schema)
