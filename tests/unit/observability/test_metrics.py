"""The Prometheus page, metrics.jsonl and the reference table say the same."""

import ast
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fakes import Run, settings_for
from keel import schema, user_code
from keel.algorithms import registry
from keel.algorithms.types import Measured, Outputs, Rows, labeled
from keel.learner import policy_learner
from keel.observability import diagnostics, metric_table
from keel.observability.metric_table import PREFIX, TABLE
from keel.observability.metrics import RunMetrics
from rollouts import generated, prompts, referenced, scored


def filled(tmp_path: Path) -> RunMetrics:
    """Every metric of the table with a number of its own."""
    metrics = RunMetrics("test", tmp_path / "metrics.jsonl")
    for number, metric in enumerate(TABLE, start=1):
        one, two = ("/".join([name] * len(metric.labels)) for name in ("one", "two"))
        value = {one: number + 0.5, two: number + 0.25} if metric.labels else number + 0.5
        (metrics.set if metric.kind == "gauge" else metrics.add)({metric.name: value})
    return metrics


def samples(page: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(page)
    return {
        (sample.name, "/".join(v for k, v in sample.labels.items() if k != "run")): sample.value
        for family in families
        for sample in family.samples
    }


def test_page_and_file_have_the_same_numbers(tmp_path: Path) -> None:
    metrics = filled(tmp_path)
    metrics.record(3, 12.5)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line.pop("step"), line.pop("time")) == (3, 12.5)
    page = samples(generate_latest(metrics.registry).decode())
    flat = {
        (PREFIX + name, label): number
        for name, value in line.items()
        for label, number in (value.items() if isinstance(value, dict) else {"": value}.items())
    }
    assert flat == page
    assert {metric.name for metric in TABLE} == set(line)


def test_counters_exist_before_anything_happened_and_gauges_do_not(tmp_path: Path) -> None:
    """A rate needs its 0; a KL or an entropy that was not measured is absent, not 0."""
    page = samples(generate_latest(RunMetrics("test", tmp_path / "m").registry).decode())
    counters = {PREFIX + metric.name for metric in TABLE if not metric.labels and metric.kind == "counter"}
    assert page == {(name, ""): 0.0 for name in counters}


def test_a_slash_in_the_last_label_is_part_of_it(tmp_path: Path) -> None:
    metrics = RunMetrics("test", tmp_path / "m")
    metrics.set({"objective_term": {"a/b": 1.0}})
    metrics.add({"idle_seconds_total": {"learner/generator": 2.0}})
    page = generate_latest(metrics.registry).decode()
    assert 'keel_objective_term{run="test",term="a/b"} 1.0' in page
    assert 'keel_idle_seconds_total{on="generator",role="learner",run="test"} 2.0' in page


def test_totals_are_restored(tmp_path: Path) -> None:
    metrics = filled(tmp_path)
    again = RunMetrics("test", tmp_path / "again.jsonl")
    again.restore(metrics.totals)
    again.add({"steps_total": 1.0})
    assert again.totals == {**metrics.totals, "steps_total": metrics.totals["steps_total"] + 1}


def test_labels_keep_their_own_totals(tmp_path: Path) -> None:
    metrics = RunMetrics("test", tmp_path / "metrics.jsonl")
    metrics.add({"samples_failed_total": {"none": 2.0}})
    metrics.add({"samples_failed_total": {"none": 1.0, "http_5xx": 4.0}})
    metrics.set({"reward_component": {"gold": 0.5}, "reward": 1.0})
    metrics.set({"reward_component": {"gold": 0.25}})
    line = metrics.record(1, 0.0)
    assert line["samples_failed_total"] == {"none": 3.0, "http_5xx": 4.0}
    assert (line["reward_component"], line["reward"]) == ({"gold": 0.25}, 1.0)
    page = samples(generate_latest(metrics.registry).decode())
    assert page["keel_samples_failed_total", "none"] == 3 and page["keel_reward_component", "gold"] == 0.25


def test_a_name_that_is_not_in_the_table_is_refused(tmp_path: Path) -> None:
    metrics = RunMetrics("test", tmp_path / "metrics.jsonl")
    for record in (metrics.set, metrics.add):
        with pytest.raises(KeyError, match="rewrad"):
            record({"rewrad": 1.0})
    with pytest.raises(AssertionError, match="steps_total"):
        metrics.set({"steps_total": 1.0})


# ---- every number of a step has a row, and every row gets a number


CRITIC = {"advantage": "gae", "critic": {"popart": True}, "normalize_reward": True}
MEMBERS = [{"name": name, "source": "a:b"} for name in ("a", "b")]
KL = {"placement": "loss", "estimator": "k2", "coefficient": 0.1, "controller": {"kind": "safe"}}
EVERYTHING: list[dict[str, Any]] = [
    {
        "objective": CRITIC,
        "regularizer": {
            "kl": KL,
            "entropy": {"form": "token_bonus", "coefficient": 1},
            "terms": [{"name": "length", "source": "builtins:len", "placement": "reward", "coefficient": 0}],
        },
    },
    {"objective": {"kind": "preference", "pairs": {"selection": "most_disagreeing"}}, "rewards": MEMBERS},
    {"objective": {"kind": "weighted_likelihood"}},
    {
        "objective": {"kind": "preference"},
        "sampling": {"stored_ratio": 0.5, "samples_per_prompt": 2},
        "regularizer": {
            "kl": {"placement": "loss", "estimator": "k2", "coefficient": 0.1},
            "entropy": {"form": "token_bonus", "coefficient": 1},
        },
    },
]


def of_the_batch(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names the learner takes from the rollouts and from objectives with every term switched on."""
    monkeypatch.setattr(user_code, "import_symbol", lambda source, setting: lambda batch: np.zeros(batch.num_rows))
    batch = scored(referenced(generated(prompts([0, 1]))), extra={"a": [0.1, 0.2, 0.3, 0.5], "b": [0.3, 0.2, 0.1, 0.0]})
    place = batch.schema.get_field_index("generator")
    batch = batch.set_column(place, batch.schema.field(place), pa.array(["generator-0"] * 2 + [schema.STORED] * 2))
    sampler, lengths = schema.ragged(batch, "completion_logprobs")
    names = set(diagnostics.summarize(batch))
    for blocks in EVERYTHING:
        objective = registry.build(settings_for(**blocks))
        values = np.zeros((len(sampler), len(objective.heads)))
        credit = objective.credited(batch, Measured(sampler, values))
        rows = Rows(
            advantages=torch.from_numpy(credit.advantages),
            lengths=torch.from_numpy(lengths),
            row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths)),
            sampler=torch.from_numpy(sampler.copy()),
            reference=torch.from_numpy(sampler.copy()),
            targets=None if credit.targets is None else torch.from_numpy(credit.targets),
            old_values=None if credit.old_values is None else torch.from_numpy(credit.old_values),
            stored=torch.from_numpy(~schema.sampled(batch)),
        )
        outputs = Outputs(rows.sampler, rows.sampler, torch.from_numpy(values))
        sums = objective.loss(rows, outputs, credit).sums
        names |= set(labeled(dict(credit.metrics) | dict(sums) | objective.coefficients()))
    return names


def of_the_learner() -> set[str]:
    """Names that DeepSpeedLearner writes itself: keys of its literals in `_step`, `_update` and `_exact_kl`."""
    tree = ast.parse(Path(policy_learner.__file__).read_text(encoding="utf8"))
    bodies = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("_step", "_update", "_exact_kl")
    ]
    nodes = [node for body in bodies for node in ast.walk(body)]
    keys = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
    keys += [node.slice for node in nodes if isinstance(node, ast.Subscript)]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)} - {"lr"}


async def test_every_number_of_a_step_has_a_row_and_every_gauge_gets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = of_the_batch(monkeypatch) | of_the_learner()
    assert {"reward", "kl_nats", "loss", "gap_nats", "grad_norm", "learning_rate", "trained_tokens"} <= names
    run = Run(tmp_path, settings_for(steps=1, guard={"length": {"actions": ["lower_lr"]}}))
    await run.finish()
    written = (names - {"trained_tokens"}) | set(run.observer.gauges) | {"free_memory_bytes"}
    of_stages = {metric.name for metric in TABLE if metric.kind == "gauge" and metric.meaning.startswith("Stages: ")}
    assert of_stages == {"held_out_loss", "held_out_accuracy_ratio", "epochs"}  # test_course.py sees them written
    assert not written & of_stages
    written |= {"workers", "workers_desired"}  # by the pools and scaling.py: tests/integration/test_recovery.py
    written |= {"reward_tail_index"}  # of 16 rows or more: test_sample_diagnostics.py
    # of entropy.top_share alone: test_clamped_entropy.py
    written |= {"clamped_policy_entropy_nats", "clamped_teacher_forced_entropy_nats"}
    written |= {"covariance_selected_ratio"}  # of objective.covariance alone: test_token_covariance.py
    written |= {"batches_waiting", "max_staleness_versions", "steps_wanted"}  # by the recorder: test_recorder.py
    assert written | of_stages == {metric.name for metric in TABLE if metric.kind == "gauge"}


def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    page = generate_latest(filled(tmp_path).registry)
    answer = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, b"", b"")


def test_the_reference_in_the_documentation_is_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "operate" / "metrics.md").read_text()
    assert metric_table.reference_table() in page


def test_sections_list_metrics_of_the_table_once() -> None:
    listed = [name for names in metric_table._SECTIONS.values() for name in names.split()]
    assert len(listed) == len(set(listed)) and set(listed) <= {metric.name for metric in TABLE}
    assert {metric.section for metric in TABLE if metric.operational} == {"perf"}
    assert {metric.section for metric in TABLE} == {"train", "rollout", "reward", "perf"}


def test_names_carry_their_unit() -> None:
    for metric in TABLE:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert metric.meaning.endswith("."), metric.name
