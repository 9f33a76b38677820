"""Recording and alert rules: promtool accepts them, and they, their tests and their runbooks speak of what there is."""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from keel.config.run import Settings
from keel.observability.metric_table import PREFIX, TABLE
from keel.observability.utilization import LEARNER, STAGES

ROOT = Path(__file__).parents[3]
RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
TESTS = sorted((ROOT / "deploy/prometheus/tests").glob("*.yml"))
RUNBOOKS = ROOT / "docs/runbooks"
METRICS = {PREFIX + metric.name: metric for metric in TABLE}
TARGET = {"run", "job", "instance"}
"""Labels every series has: the run's own, and those of the scrape."""
SEVERITIES = {"page", "ticket", "info"}
WITHOUT_RUN = {"KeelTargetDown"}
"""Alerts about a target of which no run is known."""
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on the PATH")


@functools.cache
def rules() -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text(encoding="utf8"))["groups"]]
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    return [rule for group in groups for rule in group["rules"]]


@functools.cache
def alerts() -> dict[str, dict[str, Any]]:
    result = [rule for rule in rules() if "alert" in rule]
    by_name = {rule["alert"]: rule for rule in result}
    assert len(by_name) == len(result) > 0
    return by_name


@functools.cache
def recorded() -> dict[str, str]:
    """Expression of every recorded series, by name."""
    result = [rule for rule in rules() if "record" in rule]
    by_name = {rule["record"]: rule["expr"] for rule in result}
    assert len(by_name) == len(result) > 0
    return by_name


@functools.cache
def blocks() -> list[dict[str, Any]]:
    return [block for path in TESTS for block in yaml.safe_load(path.read_text(encoding="utf8"))["tests"]]


def page_of(alert: str) -> Path:
    """KeelKlHigh -> docs/runbooks/keel-kl-high.md"""
    return RUNBOOKS / (re.sub(r"(?<!^)(?=[A-Z])", "-", alert).lower() + ".md")


def plain(expression: str) -> set[str]:
    """Names of the metrics an expression, or a text, speaks of; not those in the middle of a recorded name."""
    return set(re.findall(r"(?<![\w:])keel_[a-z0-9_]+(?![\w:*])", expression))


def of_records(expression: str) -> set[str]:
    return set(re.findall(r"(?<![\w:])[a-z_]+:keel_[a-z0-9_]+:[a-z0-9_]+", expression))


def matchers(expression: str) -> list[tuple[str, set[str]]]:
    """(name, labels) of every selector with matchers."""
    result = re.findall(r"([a-z_:][a-z0-9_:]*)\{([^{}]*)\}", expression)
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))) for name, inside in result]


def labels_of(name: str) -> set[str]:
    """Labels a series may have."""
    if name in METRICS:
        return TARGET | set(METRICS[name].labels)
    if name in recorded():
        return set(name.split(":")[0].split("_"))
    assert name == "up", f"{name} is no metric of the table and is not recorded"
    return TARGET - {"run"}


def expressions() -> list[str]:
    queries = [text for alert in alerts().values() for text in alert["annotations"].values() if "query" in text]
    return [rule["expr"] for rule in rules()] + queries


@promtool
def test_promtool_accepts_the_rules() -> None:
    ran = subprocess.run(
        ["promtool", "check", "rules", "--lint=all", "--lint-fatal", *RULES], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@promtool
@pytest.mark.parametrize("path", TESTS, ids=[path.stem for path in TESTS])
def test_promtool_passes(path: Path) -> None:
    ran = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_what_is_there(expression: str) -> None:
    assert plain(expression) <= set(METRICS)
    assert of_records(expression) <= set(recorded())
    assert plain(expression) | of_records(expression)
    for name, labels in matchers(expression):
        assert labels <= labels_of(name), name
    grouped = {
        label.strip() for inside in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in inside.split(",")
    }
    known = TARGET.union(*(labels_of(name) for name in plain(expression) | of_records(expression)))
    assert grouped <= known


def test_matched_values_are_those_of_the_code() -> None:
    """A role, phase or stage that no code writes would leave an alert silent for ever."""
    packages = ("online", "rollout")
    code = "".join(path.read_text("utf8") for name in packages for path in (ROOT / "system/keel" / name).glob("*.py"))
    phases = {name.replace(" ", "_") for name in re.findall(r'\.doing\("([a-z ]+)"\)', code)}
    roles = {*STAGES, LEARNER}
    known = {
        "role": roles,
        "on": roles | phases | {"driver"},
        "phase": phases,
        "stage": set(re.findall(r'_progress\("(\w+)"\)', code)),
        "reason": {*re.findall(r'"(uniform_rewards)"', code), *re.findall(r"}(_monitor)\"", code)},
        "reward": {"gold"},
        "job": {"keel"},
    }
    texts = [expression.replace("'", '"') for expression in expressions()]
    result = [pair for text in texts for pair in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', text) if pair[0] != "run"]
    assert {label for label, _ in result} == set(known)
    for label, values in result:
        assert {value.strip(".*") for value in values.split("|")} <= known[label], (label, values)


@pytest.mark.parametrize("expression", expressions())
def test_counters_are_counted_and_gauges_are_read(expression: str) -> None:
    """rate() of counters alone, before any sum; a mean or median over time of gauges alone."""
    assert not re.search(r"rate\s*\(\s*(sum|max|avg)", expression)
    assert not re.search(r"\bi?delta|increase", expression)
    of_counters = {name for inside in re.findall(r"rate\(([^\[]*)\[", expression) for name in plain(inside)}
    of_gauges = {
        name
        for inside in re.findall(r"(?:avg|stddev|quantile)_over_time\(([^\[]*)\[", expression)
        for name in plain(inside)
    }
    assert {METRICS[name].kind for name in of_counters} <= {"counter"}
    assert {METRICS[name].kind for name in of_gauges} <= {"gauge"}


def test_copies_differ_only_in_what_they_are_about() -> None:
    """PromQL has no functions: what is asked of two roles, or of four numbers, is written two and four times."""
    scorer, reference = (alerts()[f"Keel{role}Backlog"] for role in ("Scorer", "Reference"))
    assert reference["expr"].replace('"reference"', '"scorer"') == scorer["expr"]
    assert (reference["for"], reference["labels"]) == (scorer["for"], scorer["labels"])
    for operation in ("start", "ratio_start"):
        copies = {name.split(":")[1]: text for name, text in recorded().items() if name.endswith(f":{operation}")}
        assert set(copies) == {"keel_entropy_nats", "keel_length_tokens", "keel_finished_ratio", "keel_gap_nats"}
        assert len({text.replace(metric, "X") for metric, text in copies.items()}) == 1
    counts = [text for text in recorded().values() if "offset 1h" in text]
    assert len(counts) == 7
    for text in counts:
        assert re.search(r"\((\w+_total) - last_over_time\(\1\[1h\] offset 1h\) >= 0\)\s+or \1\n", text), text


def test_recorded_series_keep_the_run() -> None:
    for name in recorded():
        level, _, operation = name.split(":")
        assert level.split("_")[0] == "run" and operation, name


def test_every_recorded_series_is_used() -> None:
    texts = [alert["expr"] for alert in alerts().values()]
    texts += [path.read_text(encoding="utf8") for path in (ROOT / "deploy").rglob("*.json")]
    texts += [(RUNBOOKS / "README.md").read_text(encoding="utf8")]
    assert set(recorded()) <= set().union(*(of_records(text) for text in texts))


@pytest.mark.parametrize("name", list(alerts()))
def test_an_alert_says_what_it_must(name: str) -> None:
    alert = alerts()[name]
    assert re.fullmatch(r"(Keel)([A-Z][a-z]+)+", name)
    assert alert["labels"]["severity"] in SEVERITIES
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert ROOT / alert["annotations"]["runbook_url"] == page_of(name)
    assert ("$labels.run" in alert["annotations"]["summary"]) == (name not in WITHOUT_RUN)


@pytest.mark.parametrize("name", list(alerts()))
def test_an_alert_has_a_runbook(name: str) -> None:
    text = page_of(name).read_text(encoding="utf8")
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == [
        f"# {name}",
        "## What it means",
        "## What to look at",
        "## What to do",
    ]
    parts = re.split(r"^#+ .*\n", text, flags=re.MULTILINE)
    assert all(part.strip() for part in parts[2:])


def test_every_runbook_belongs_to_an_alert_and_is_in_the_table() -> None:
    pages = {path for path in RUNBOOKS.glob("*.md") if path.name != "README.md"}
    assert pages == {page_of(name) for name in alerts()}
    rows = re.findall(
        r"^\| \[(\w+)\]\(([\w.-]+)\) \| (\w+) \| .+ \|$", (RUNBOOKS / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) == len(alerts())
    assert {(name, RUNBOOKS / page, severity) for name, page, severity in rows} == {
        (name, page_of(name), alert["labels"]["severity"]) for name, alert in alerts().items()
    }


def setting(path: str) -> bool:
    """Whether a dotted name is a setting of an online run, in any of the kinds a block may have."""
    level: list[Any] = [Settings]
    for part in [part for part in path.split(".") if part != "NAME"]:  # of one in a list
        blocks = [item for item in level if isinstance(item, type) and issubclass(item, BaseModel)]
        fields = [block.model_fields[part] for block in blocks if part in block.model_fields]
        level = [item for field in fields for item in _models(field.annotation)]
    return bool(level)


def _models(annotation: Any) -> list[Any]:
    """The blocks an annotation may be, and the annotation itself where it is none."""
    return [annotation, *(_model for argument in get_args(annotation) for _model in _models(argument))]


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda page: page.stem)
def test_a_runbook_names_metrics_and_settings_that_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf8")
    assert plain(text) <= set(METRICS)
    assert of_records(text) <= set(recorded())
    for name, labels in matchers(text):
        assert labels <= labels_of(name), name
    code = re.findall(r"`([^`]+)`", text)
    dotted = {
        name for item in code for name in re.findall(r"(?<![\w./*-])([a-z_]+(?:\.[a-zA-Z_]+)+)(?![\w./-]*/)", item)
    }
    named = {name for name in dotted if name.split(".")[0] in Settings.model_fields}
    assert {name for name in named if not setting(name)} == set()
    for link in re.findall(r"\]\(([^)#]+\.md)[^)]*\)", text):
        assert (page.parent / link).is_file(), link


def test_a_setting_that_is_not_there_is_seen() -> None:
    assert setting("regularizer.kl.controller") and setting("objective.clip_high") and setting("rewards.NAME.retries")
    assert setting("objective.pairs.length_penalty") and setting("reference.dtype")
    assert not setting("regularizer.kl.strength") and not setting("rewards.NAME.patience") and not setting("buffer.max")


@pytest.mark.parametrize("name", list(alerts()))
def test_an_alert_is_tested_firing_and_silent(name: str) -> None:
    mine = [
        (block, test) for block in blocks() for test in block.get("alert_rule_test", []) if test["alertname"] == name
    ]
    assert any(test["exp_alerts"] for _, test in mine)
    silent = [block for block, test in mine if block["name"].startswith(f"{name} is silent")]
    assert silent and not any(test["exp_alerts"] for block, test in mine if block in silent)
    for expected in [alert for _, test in mine for alert in test["exp_alerts"]]:
        assert ("run" in expected["exp_labels"]) == (name not in WITHOUT_RUN)
        assert set(expected["exp_annotations"]) == {"summary", "description", "runbook_url"}


def test_no_alert_fires_on_what_is_healthy() -> None:
    for block in yaml.safe_load((ROOT / "deploy/prometheus/tests/healthy.yml").read_text(encoding="utf8"))["tests"]:
        assert {test["alertname"] for test in block["alert_rule_test"]} == set(alerts())
        assert not any(test["exp_alerts"] for test in block["alert_rule_test"])


def test_every_recorded_series_has_a_value_computed_by_hand() -> None:
    tested = {
        name
        for block in blocks()
        for test in block.get("promql_expr_test", [])
        if test["exp_samples"]
        for name in of_records(test["expr"])
    }
    assert tested == set(recorded())


def test_series_of_the_tests_are_those_of_a_run() -> None:
    """A test on a series that no run has would prove nothing."""
    for series in [item["series"] for block in blocks() for item in block["input_series"]]:
        ((name, labels),) = matchers(series)
        assert labels - TARGET == labels_of(name) - TARGET, series
        assert "run" in labels or name == "up", series
