"""What a report says happened: every number of a sentence from hand-made evaluations, every claim at its border."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import report_runs
from keel.analysis import report_words
from keel.analysis.report_curves import Curve, EvaluationPoint, Interval, interval

Values = dict[str, np.ndarray]


def evaluations(*rows: dict[str, Sequence[float]]) -> tuple[list[EvaluationPoint], list[Values]]:
    """An evaluation every 5 steps, of these values [prompts]."""
    values = [{name: np.array(column, float) for name, column in row.items()} for row in rows]
    points = [
        EvaluationPoint(5 * place, {name: interval(column) for name, column in row.items()})
        for place, row in enumerate(values)
    ]
    return points, values


def text(
    *rows: dict[str, Sequence[float]],
    committed: Sequence[int] = (),
    monitor: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    points, values = evaluations(*rows)
    best_by = report_words.best_by(points, monitor)
    return " ".join(report_words.of_online([], points, values, committed, best_by, settings or {}))


START = {"reward": [0.0, 0.2, 0.1], "reward_gold": [0.0, 0.1, 0.2], "kl_nats": [0.0, 0.0, 0.0]}
PEAK = {"reward": [1.0, 1.1, 1.2], "reward_gold": [0.8, 1.0, 0.9], "kl_nats": [3.0, 4.0, 5.0]}
END = {"reward": [2.0, 2.2, 2.1], "reward_gold": [0.2, 0.5, 0.4], "kl_nats": [20.0, 24.0, 22.0]}


def test_proxy_and_gold_from_to_with_standard_errors() -> None:
    error = statistics.stdev([2.0, 2.2, 2.1]) / math.sqrt(3)
    assert f"{error:.3f}" == "0.058"
    words = text(START, PEAK, END)
    assert (
        "(steps 0 and 10, 3 held-out prompts) the proxy, the training reward, went from 0.100 (standard error 0.058)"
        in words
    )
    assert "to 2.100 (standard error 0.058)." in words
    assert (
        f"Gold went from 0.100 (standard error 0.058) to 0.367 (standard error {statistics.stdev([0.2, 0.5, 0.4]) / 3**0.5:.3f})."
        in words
    )
    assert f"The KL to the reference is 22.0 (standard error {2 / 3**0.5:.1f}) nats a completion at step 10." in words


def test_a_fall_of_gold_is_paired_and_over_optimization_needs_both_intervals() -> None:
    words = text(START, PEAK, END)
    falls = [0.6, 0.5, 0.5]
    assert "Gold was highest at step 5, at 0.900 (standard error 0.058)" in words
    assert f"lies {statistics.fmean(falls):.3g} below it (standard error of the paired difference 0.033)" in words
    assert "the proxy rose by 1 while gold fell by 0.533" in words and "over-optimized" in words
    assert "largest of 3 evaluations" in words
    unsure = text(START, PEAK, END | {"reward_gold": [0.2, 1.1, 0.4]})  # falls 0.6, -0.1, 0.5: an interval with 0 in it
    assert "below it" in unsure and "is not seen" in unsure and "over-optimized" not in unsure
    both_down = text(START, PEAK, END | {"reward": [0.5, 0.6, 0.7]})
    assert "is not seen" in both_down and "over-optimized" not in both_down


def test_the_border_of_a_claim_is_the_interval_of_three_prompts() -> None:
    """Student's t of 2 degrees of freedom is 4.3027: a fall of 4 standard errors is not beyond the interval."""
    noise = np.array([-0.1, 0.0, 0.1])
    error = float(noise.std(ddof=1)) / math.sqrt(3)
    peak = {"reward": [0.0, 0.0, 0.0], "reward_gold": [1.0, 1.0, 1.0]}
    for factor, claimed in ((4.2, False), (4.4, True)):
        end = {"reward": 1.0 + noise, "reward_gold": 1.0 - factor * error + noise}
        assert ("over-optimized" in text(peak, end)) is claimed


def test_gold_that_still_rises_and_runs_without_gold() -> None:
    assert "which is the last evaluation: it shows no turn of gold" in text(START, END, PEAK)
    without = [{"reward": row["reward"]} for row in (START, PEAK)]
    words = text(*without)
    assert (
        "no reward called gold" in words
        and "KL" not in words
        and "The best evaluation by proxy is that of step 5" in words
    )
    lost = text(START | {"reward_gold": [math.nan] * 3}, PEAK | {"reward_gold": [math.nan] * 3})
    assert "Gold has no value in any evaluation." in lost


@pytest.mark.parametrize(
    "committed, sentence",
    [
        ([5, 10], "step 5; its checkpoint is checkpoints/step-000005."),
        ([10], "step 5; its checkpoint is not there, the nearest is checkpoints/step-000010."),
        ([2, 8], "step 5; its checkpoint is not there, the nearest is checkpoints/step-000002."),
        ([], "step 5; the run directory holds no checkpoint."),
    ],
)
def test_the_best_checkpoint_is_that_of_golds_peak(committed: list[int], sentence: str) -> None:
    assert text(START, PEAK, END, committed=committed).endswith(f"The best evaluation by gold is that of {sentence}")


def test_a_start_that_was_never_surpassed_is_said_to_be_the_best() -> None:
    assert "step 0, the start model: training did not improve it." in text(PEAK, START, committed=[5])


def test_the_guards_monitor_decides_what_is_best() -> None:
    rows = [
        row | {"reward_fluent": [float(place)] * 3} for place, row in zip((1, 0, 2), (START, PEAK, END), strict=True)
    ]
    assert "The best evaluation by fluent is that of step 10;" in text(*rows, committed=[5], monitor="fluent")
    assert "The best evaluation by gold is that of step 5;" in text(*rows, committed=[5], monitor="unknown")


def test_one_evaluation_has_no_change() -> None:
    words = text(PEAK)
    assert "At its only evaluation, step 0, on 3 held-out prompts, the proxy, the training reward, was 1.100" in words
    assert "Gold was 0.900 (standard error 0.058)." in words and "went from" not in words


@pytest.mark.parametrize(
    "value, written",
    [
        (Interval(0.000367, 0.0561, 0, 0, 9), "0.000 (standard error 0.056)"),
        (Interval(123.456, 31.2, 0, 0, 9), "123 (standard error 31)"),
        (Interval(-7.0, 0.1, 0, 0, 9), "-7.00 (standard error 0.10)"),
        (Interval(1.5, 0.0, 1.5, 1.5, 9), "1.5 (standard error 0)"),
        (Interval(0.25, math.nan, math.nan, math.nan, 1), "0.25"),
        (Interval(math.nan, math.nan, math.nan, math.nan, 0), "unknown"),
    ],
)
def test_a_number_has_as_many_digits_as_its_error(value: Interval, written: str) -> None:
    assert report_words.number(value) == written


def test_failures_recoveries_and_the_guard_are_counted() -> None:
    names = ["worker_started", "worker_lost", "retry", "retry", "resume", "checkpoint"]
    firings = [
        report_runs.firing("length", 3, ["warn"]),
        report_runs.firing("entropy", 5, ["warn", "lower_lr", "roll_back"]),
        report_runs.firing("length", 9, ["warn"]),
        report_runs.firing("kl_slope", 9, ["stop"]),
    ]
    acts = [{"event": "roll_back", "step": 4}, {"event": "guard_multipliers", "step": 4}]
    acts += [{"event": "roll_back", "step": 4}, {"event": "guard_stop", "step": 9}]
    counters = {"samples_failed_total": {"timeout": 3.0, "empty": 0.0}, "groups_dropped_total": {"worker_lost": 1.0}}
    words = " ".join(report_words.of_events([*({"event": name} for name in names), *firings, *acts], counters))
    assert "1 x worker lost and replaced; 2 x batch made again; 1 x resume from a checkpoint." in words
    assert "Samples without a reward: 3 timeout." in words and "Groups dropped: 1 worker_lost." in words
    assert words.endswith(
        " The guard warned: 2 x length."
        " The guard acted: 1 x entropy (lower_lr, roll_back), 1 x kl_slope (stop), 2 x roll back to step 4,"
        " 1 x stop after step 9."
    )
    assert "acted" not in " ".join(report_words.of_events(firings[:1], {}))
    assert report_words.of_events([{"event": "checkpoint"}], {}) == ["No failure was recorded."]


def test_a_stage_says_where_its_held_out_numbers_were_best() -> None:
    loss = Curve([0, 4, 8], [2.0, 0.5, 0.75])
    accuracy = Curve([0, 4, 8], [0.5, 0.75, 0.625])
    words = " ".join(report_words.of_stage({"held_out_loss": loss, "held_out_accuracy_ratio": accuracy}))
    assert "loss went from 2 at step 0 to 0.75 at step 8; the best was 0.5 at step 4." in words
    assert "accuracy went from 0.5 at step 0 to 0.625 at step 8; the best was 0.75 at step 4." in words
    assert report_words.of_stage({}) == ["It has no evaluation yet."]


def on_the_curve() -> list[dict[str, Sequence[float]]]:
    """Gold planted on d (1 - 0.35 log d), which peaks at d = 6.405, KL 41.03; errors of 0.005 around it."""
    rows: list[dict[str, Sequence[float]]] = []
    for distance in (0.0, 1.0, 2.0, 4.0, 8.0):
        gold = distance * (1 - 0.35 * math.log(distance or 1))
        kl = distance**2
        rows.append({"reward": [0.0, 1.0], "reward_gold": [gold - 0.005, gold + 0.005], "kl_nats": [kl, kl]})
    return rows


@pytest.mark.parametrize(
    "reference, setting",
    [
        ({"model": "aligned", "ref_policy": "initial"}, "reference.model=aligned"),
        ({"model": None, "ref_policy": "previous"}, "reference.ref_policy=previous"),
        ({"model": "start", "ref_policy": "previous"}, "reference.ref_policy=previous"),
        ({"model": "start", "ref_policy": "initial"}, None),
        ({"model": None, "ref_policy": "initial"}, None),
        (None, None),
    ],
)
def test_no_curve_is_fitted_to_a_kl_that_is_not_from_the_start(
    reference: dict[str, Any] | None, setting: str | None
) -> None:
    words = text(*on_the_curve(), settings={"policy": {"model": "start"}, "reference": reference})
    refusal = f"is fitted: with {setting} the KL is not the distance from the start model."
    assert (refusal in words) == (setting is not None) and ("peaks at a KL of" in words) == (setting is None)


def test_the_fitted_curve_names_its_peak_and_where_the_run_is() -> None:
    rows = on_the_curve()
    words = text(*rows)
    assert "fitted to 5 evaluations (alpha 1 [" in words and "beta 0.35 [" in words
    assert "peaks at a KL of 41 nats [" in words and "the last evaluation is at 64 nats" in words
    rising = [
        row | {"reward_gold": [d - 0.01, d + 0.01]} for row, d in zip(rows, (0.0, 1.0, 2.1, 4.4, 9.0), strict=True)
    ]
    assert "does not turn" in text(*rising)
    assert "fitted" not in text(START, PEAK)
