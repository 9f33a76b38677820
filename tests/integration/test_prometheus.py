"""A real Prometheus, by the shipped configuration, watches a real run: what it knows is what the run did.

One run for all tests of this file; they only read, so that they pass in any order.
"""

import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import dashboard_expressions
from keel import schema
from keel.observability.metric_table import PREFIX, TABLE
from live import PATIENCE_SECONDS
from observed import GENERATORS, RUN, UP, Observed, observed
from prometheus import CONFIG, Samples, program

pytestmark = pytest.mark.slow
STEPS = 400
"""Ten minutes at least: the run outlives the tests."""
ROLES = {"generator", "reference", "scorer", "learner"}
STAGES = {"generate", "score", "accept", "take", "step", "publish", "load", "checkpoint"}


@pytest.fixture
def observed_run(started: Observed) -> Observed:
    """The run of this file, of which the newest scrape has all series."""
    started.prometheus.wait_until(UP)
    return started


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Observed]:
    with observed(tmp_path_factory.mktemp("observed"), tiny_model, STEPS) as run:
        yield run


def test_promtool_accepts_the_shipped_configuration() -> None:
    answer = subprocess.run([program("promtool"), "check", "config", str(CONFIG)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_both_discoveries_list_the_run_and_it_is_scraped_once(observed_run: Observed) -> None:
    prometheus = observed_run.prometheus
    subject = prometheus.page("/metrics")
    assert 'prometheus_sd_discovered_targets{config="keel",name="scrape"} 2' in subject
    (up,) = prometheus.wait_until(UP)
    (file,) = observed_run.discovery.iterdir()
    assert (up.value, up.labels["run"], f"keel-{up.labels['instance']}.json") == (1, RUN, file.name)
    (steps,) = prometheus.query("keel_steps_total")
    assert steps.labels == up.labels | {"__name__": "keel_steps_total"}
    command = [program("promtool"), "check", "service-discovery", "--timeout=10s", str(observed_run.config), "keel"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ways = [key for item in result for key in item["discoveredLabels"] if key in ("__meta_url", "__meta_filepath")]
    assert sorted(ways) == ["__meta_filepath", "__meta_url"], result
    assert {item["labels"]["instance"] for item in result} == {up.labels["instance"]}


def test_prometheus_knows_every_metric_of_the_table(observed_run: Observed) -> None:
    """Names (OpenMetrics names a counter without _total), types and meanings."""
    known = observed_run.prometheus.api("metadata")
    for metric in TABLE:
        (answer,) = known[(PREFIX + metric.name).removesuffix("_total")]
        assert (answer["type"], answer["help"]) == (metric.kind, metric.meaning), metric.name


ABSENT = {
    "no such term in the configuration": {
        *("kl_loss", "kl_loss_nats", "entropy_loss", "policy_entropy_nats", "log_ratio_loss", "log_ratio_loss_nats"),
        *("safe_threshold_nats", "safe_gate", "safe_penalty", "normalizer_mean", "normalizer_std", "objective_term"),
        *("clamped_policy_entropy_nats", "clamped_teacher_forced_entropy_nats", "kl_exact_nats"),
    },
    "no pairs, no rankings, no weights": {
        *("preference_loss", "pairs", "chosen_implicit_reward", "rejected_implicit_reward", "implicit_margin"),
        *("preference_accuracy_ratio", "chosen_logprob_nats", "rejected_logprob_nats", "chosen_log_ratio_nats"),
        *("rejected_log_ratio_nats", "plausible_completions", "settled_ratio", "pair_disagreement"),
        *("effective_samples", "accepted_ratio", "best_reward", "best_of_n_kl_nats", "pairs_dropped_total"),
    },
    "no stored completions": {
        *("stored_logprob_nats", "stored_token_logprob_nats", "stored_log_ratio_nats"),
        *("teacher_forced_entropy_nats", "sampled_length_tokens"),
    },
    "no covariance": {"covariance_selected_ratio"},
    "no action of the guard": {"guard_kl_multiplier", "guard_learning_rate_multiplier"},
    "no critic": {"critic_loss", "explained_variance", "value_mean", "popart_mean", "popart_std"},
    "no stage": {"held_out_loss", "held_out_accuracy_ratio", "epochs", "rows_dropped_total"},
    "nothing failed so far": {
        *(
            "samples_failed_total",
            "groups_dropped_total",
            "workers_lost_total",
            "load_failures_total",
            "tracker_failures_total",
        ),
    },
}
CHANCE = {"reward_length_correlation", "reward_correlation", "reward_tail_index", "guard_fired_total"}
"""In a step whose rewards or lengths are all equal, or which has few rows, there is none; a detector may fire or not."""
LABELS = {
    "reward_component": {"low", "gold"},
    "busy_seconds_total": ROLES,
    "workers": ROLES,
    "workers_desired": ROLES,
    "batches_waiting": ROLES - {"learner"},
    "progress_timestamp_seconds": STAGES,
}
"""Values of the one label of a metric; of some metrics they depend on which role waited for which."""


def test_every_series_of_such_a_run_is_there(observed_run: Observed) -> None:
    result: dict[str, list[dict[str, str]]] = {}
    for series in observed_run.prometheus.query(f'{{__name__=~"{PREFIX}.+"}}'):
        result.setdefault(series.name.removeprefix(PREFIX), []).append(series.labels)
    absent = set().union(*ABSENT.values())
    assert set(result) - CHANCE == {metric.name for metric in TABLE} - absent - CHANCE
    for metric in (metric for metric in TABLE if metric.name in result):
        assert all(set(metric.labels) <= set(labels) for labels in result[metric.name]), metric.name
        assert all(labels["run"] == RUN for labels in result[metric.name]), metric.name
        values = {labels[metric.labels[0]] for labels in result[metric.name]} if metric.labels else set()
        assert values >= LABELS.get(metric.name, set()), metric.name


def tokens_of(directory: Path, steps: range) -> int:
    batches = [schema.from_bytes((directory / "rollouts" / f"step-{step:06d}.arrow").read_bytes()) for step in steps]
    return sum(len(tokens) for batch in batches for tokens in batch.column("completion_tokens").to_pylist())


def test_tokens_are_those_of_the_rollout_files_at_every_scrape(observed_run: Observed) -> None:
    prometheus = observed_run.prometheus
    prometheus.wait_until("keel_steps_total >= 8")
    (steps,) = prometheus.query("keel_steps_total[120s]")
    (tokens,) = prometheus.query("keel_completion_tokens_total[120s]")
    then = {moment: int(value) for moment, value in steps.samples}
    assert len({*then.values()}) >= 3, then
    for moment, value in tokens.samples:
        assert value == tokens_of(observed_run.directory, range(1, then[moment] + 1)), (moment, then[moment])

    first, last = moments_of(steps.samples)
    window = f"{round((last - first) * 1000) + 1}ms"  # both samples are inside, whichever end of a range is open
    expected = tokens_of(observed_run.directory, range(then[first] + 1, then[last] + 1))
    assert expected > 0
    result = prometheus.value(f"increase(keel_completion_tokens_total[{window}])", time=last)
    assert result == pytest.approx(expected, rel=1e-3)
    trained = prometheus.value(f"increase(keel_trained_tokens_total[{window}])", time=last)
    assert trained == pytest.approx(expected, rel=1e-3)


def moments_of(steps: Samples) -> tuple[float, float]:
    """The first scrape that saw a step, and the last that saw a new one."""
    changed = [late[0] for early, late in itertools.pairwise(steps) if late[1] > early[1]]
    return changed[0], changed[-1]


def test_busy_and_idle_seconds_are_those_of_all_that_serve(observed_run: Observed) -> None:
    """Over the wall time by Prometheus' clock within some per cent, and exactly over the time the run itself counted."""
    prometheus = observed_run.prometheus
    prometheus.wait_until("keel_steps_total >= 28", PATIENCE_SECONDS)
    (wanted,) = prometheus.query('keel_workers{role="generator"}[40s]')
    (first, _), (last, _) = wanted.samples[0], wanted.samples[-1]
    counted = f"{{__name__=~'keel_(busy|idle|phase)_seconds_total'}}[{round((last - first) * 1000) + 1}ms]"
    seconds = {"run": 0.0} | dict.fromkeys(ROLES, 0.0)
    for series in prometheus.query(counted, time=last):
        by_time = dict(series.samples)
        seconds[series.labels.get("role", "run")] += by_time[last] - by_time.get(first, 0.0)
    assert seconds["run"] == pytest.approx(last - first, abs=5.0)  # written down once a second, if not late
    workers = {series.labels["role"]: series.value for series in prometheus.query("keel_workers", time=last)}
    assert workers == dict.fromkeys(ROLES, 1.0) | {"generator": GENERATORS}
    for role, serving in workers.items():
        assert seconds[role] / seconds["run"] == pytest.approx(serving, rel=0.02), (role, seconds)
        assert seconds[role] / (last - first) == pytest.approx(serving, rel=0.15), (role, seconds)


def test_every_expression_of_the_dashboards_is_answered(observed_run: Observed) -> None:
    """And with something, unless it compares, or asks for a series that such a run has not."""
    prometheus = observed_run.prometheus
    present = {series.name for series in prometheus.query(f'{{__name__=~"{PREFIX}.+"}}')}
    empty = []
    for expression in dashboard_expressions.all_filled(RUN):
        metrics = set(re.findall(rf"\b{PREFIX}[a-z0-9_]+", expression))
        answer = prometheus.query(expression)
        if metrics and metrics <= present and not answer and not re.search(r"[<>]|==|!=|unless", expression):
            empty.append(expression)
    assert not empty, empty


def test_every_rule_is_evaluated_and_none_pages_for_a_healthy_run(observed_run: Observed) -> None:
    rules = [rule for group in observed_run.prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert {rule["type"] for rule in rules} == {"recording", "alerting"}
    evaluated = [rule for rule in rules if rule["lastEvaluation"] > "1"]
    assert evaluated and all(rule["health"] == "ok" and "lastError" not in rule for rule in evaluated), rules
    firing = [
        alert["labels"] for alert in observed_run.prometheus.api("alerts")["alerts"] if alert["state"] == "firing"
    ]
    assert not [labels for labels in firing if labels["severity"] == "page"], firing
