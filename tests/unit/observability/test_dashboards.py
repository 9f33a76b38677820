"""The Grafana dashboards: every expression reads metrics that exist, every panel says what it shows."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboard_expressions import all_filled, expressions, filled, panels
from keel.observability import dashboards
from keel.observability.grafana import Panel, PanelRow, Query, as_json, labels_of, rate, value
from keel.observability.metric_table import TABLE

BUILT = {name.removesuffix(".json"): json.loads(text) for name, text in dashboards.files().items()}
BY_UID = {dashboard.uid: dashboard for dashboard in dashboards.DASHBOARDS}
LABELS = {f"keel_{metric.name}": {"run", *metric.labels} for metric in TABLE}
KINDS = {f"keel_{metric.name}": metric.kind for metric in TABLE}
CHOSEN = {"type": "prometheus", "uid": "${datasource}"}
UIDS = pytest.mark.parametrize("uid", list(BUILT))


def drawn(uid: str) -> list[dict[str, Any]]:
    """All panels that have queries."""
    return panels(BUILT[uid])


def asked(uid: str) -> list[str]:
    """All expressions as they stand in the file."""
    return expressions(BUILT[uid])


def named(key: str, tree: Any) -> Iterator[Any]:
    """Every value under a key, at any depth."""
    for at, child in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from [child] if at == key else named(key, child)


# ---- the dashboards


@UIDS
def test_panels_have_title_description_unit_and_the_chosen_source(uid: str) -> None:
    for panel in drawn(uid):
        assert panel["title"] and len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"] and all(target["legendFormat"] for target in panel["targets"])
    sources = list(named("datasource", BUILT[uid]))
    assert len(sources) > len(asked(uid)) and all(source == CHOSEN for source in sources)
    names = [variable["name"] for variable in BUILT[uid]["templating"]["list"]]
    assert names == ["datasource", "run"] and BUILT[uid]["templating"]["list"][0]["query"] == "prometheus"
    assert BUILT[uid]["templating"]["list"][1]["query"]["query"] == "label_values(keel_steps_total, run)"


@UIDS
def test_dashboards_can_be_told_apart_and_link_to_each_other(uid: str) -> None:
    built = BUILT[uid]
    assert built["uid"] == uid and built["schemaVersion"] >= 39 and built["timezone"] == "browser"
    assert {link["url"] for link in built["links"]} == {f"/d/{other}" for other in BUILT if other != uid}
    assert built["templating"]["list"][1]["multi"] == (uid != "keel-run")


@UIDS
def test_numbers_of_panels_are_unique_and_stay_when_others_come(uid: str) -> None:
    panels_of = [item for head in BUILT[uid]["panels"] for item in (head, *head.get("panels", []))]
    numbers = {panel["title"]: panel["id"] for panel in panels_of}
    assert len(numbers) == len(panels_of) == len(set(numbers.values()))
    assert all(0 < number < 2**31 for number in numbers.values())
    dashboard = BY_UID[uid]
    first = PanelRow("New", (Panel("Also new", (Query(value("reward")),)),))
    longer = as_json(dataclasses.replace(dashboard, rows=(first, *dashboard.rows)), dashboards.DASHBOARDS)["panels"]
    again = {panel["title"]: panel["id"] for head in longer for panel in (head, *head.get("panels", []))}
    assert numbers.items() < again.items()


def test_the_number_of_a_panel_is_what_links_say() -> None:
    kl = next(panel for panel in drawn("keel-run") if panel["title"] == "KL from the reference")
    assert kl["id"] == 1155796766


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["w"] > 0 and place["h"] > 0
    across, down = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
    return {(x, y) for x in across for y in down}


@UIDS
def test_no_panel_lies_over_another(uid: str) -> None:
    """What is drawn with collapsed rows as they are, and inside each of them."""
    for group in (BUILT[uid]["panels"], *(head["panels"] for head in BUILT[uid]["panels"] if head.get("panels"))):
        taken: set[tuple[int, int]] = set()
        for panel in group:
            assert not taken & cells(panel), panel["title"]
            taken |= cells(panel)


@UIDS
def test_queries_of_an_xy_chart_and_of_a_table_have_the_labels_they_are_joined_by(uid: str) -> None:
    joined = [panel for panel in BY_UID[uid].panels if panel.kind in ("xychart", "table")]
    for panel in joined:
        assert len({tuple(labels_of(query.expression)) for query in panel.queries}) == 1, panel.title
        assert len({query.name for query in panel.queries} - {""}) == len(panel.queries), panel.title
    for panel in drawn(uid):
        names = [step for step in panel["transformations"] if step["id"] == "organize"]
        values = ["Value"] if len(panel["targets"]) == 1 else [f"Value #{item['refId']}" for item in panel["targets"]]
        assert bool(names) == (panel["type"] in ("xychart", "table"))
        assert all(list(step["options"]["renameByName"]) == values for step in names)
        if panel["type"] == "xychart":  # Grafana rewrites what does not say that it has the form of 11.1
            assert tuple(map(int, panel["pluginVersion"].split("."))) >= (11, 1, 0)
            assert panel["options"]["series"][0]["x"]["matcher"] == {"id": "byName", "options": "Value #A"}


# ---- the expressions


@UIDS
def test_expressions_read_metrics_and_labels_of_the_table(uid: str) -> None:
    """Every metric that an expression names exists and has the labels by which it is selected and summed."""
    for text in asked(uid):
        built = set(re.findall(r"\bkeel_\w+", text))
        others = set(re.findall(r"\bray_\w+", text))
        assert built <= set(LABELS) and others <= RAY_METRICS, text
        assert bool(built) != bool(others), text
        for name, matchers in re.findall(r"(keel_\w+)\{([^}]*)\}", text):
            parts = [part.strip() for part in matchers.split(", ")]
            assert parts[0] == 'run=~"$run"' and len(re.findall(rf"{name}(?!\{{|\w)", text)) == 0, text
            assert {part.split("=")[0].rstrip("~") for part in parts} <= LABELS[name], text
        present = set.union(*(LABELS[name] for name in built)) if built else {"instance"}
        for labels in re.findall(r"\bby \(([^)]*)\)", text):
            assert set(labels.split(", ")) <= present, text


@UIDS
def test_brackets_close_and_rates_are_of_counters(uid: str) -> None:
    pairs = {")": "(", "]": "[", "}": "{"}
    for text in asked(uid):
        bare = re.sub(r'"[^"]*"', "", text)
        open_ones: list[str] = []
        for character in bare:
            if character in pairs.values():
                open_ones.append(character)
            elif character in pairs:
                assert open_ones.pop() == pairs[character], text
        assert not open_ones, text
        assert {KINDS[name] for name in re.findall(r"\b(?:rate|increase)\((\w+)", text)} <= {"counter"}
        assert {KINDS[name] for name in re.findall(r"\b(?:deriv|max_over_time)\((\w+)", text)} <= {"gauge"}


def test_every_metric_is_shown_or_it_is_said_why_not() -> None:
    shown = {name.removeprefix("keel_") for uid in BUILT for text in asked(uid) for name in LABELS if name in text}
    shown = {name for name in shown if any(re.search(rf"keel_{name}\b", text) for uid in BUILT for text in asked(uid))}
    everything = {metric.name for metric in TABLE}
    assert shown & set(dashboards.NOT_SHOWN) == set()
    assert shown | set(dashboards.NOT_SHOWN) == everything
    assert all(len(reason) > 5 for reason in dashboards.NOT_SHOWN.values())


@UIDS
def test_a_panel_says_what_its_metrics_mean(uid: str) -> None:
    meanings = {f"keel_{metric.name}": metric.meaning for metric in TABLE}
    for panel in drawn(uid):
        for name in {name for target in panel["targets"] for name in re.findall(r"\bkeel_\w+", target["expr"])}:
            assert meanings[name] in panel["description"], (panel["title"], name)


UNITS = {
    "weight_sync_seconds": ("s", ""),
    "buffer_bytes": ("bytes", ""),
    "clip_ratio": ("percentunit", ""),
    "kl_nats": ("none", "nats"),
    "length_tokens": ("none", "tokens"),
    "generate_tokens_per_second": ("suffix:tokens/s", ""),
    "staleness_max_versions": ("none", "versions"),
    "reward": ("short", ""),
}


@pytest.mark.parametrize("name", list(UNITS))
def test_the_unit_comes_from_the_name(name: str) -> None:
    assert Query(value(name)).measured_in == UNITS[name]


def test_the_unit_of_a_rate() -> None:
    names = ("phase_seconds_total", "rollout_bytes_total", "steps_total", "completion_tokens_total")
    rates = [Query(rate(name)).measured_in[0] for name in names]
    assert rates == ["percentunit", "Bps", "cps", "suffix:tokens/s"]


LABELS_OF = {
    "sum by (run, role) (rate(keel_x[1m]))": ["run", "role"],
    "sum (max by (run) (keel_x))": [],
    "count(max by (run) (keel_x))": [],
    "(0 * max by (run, reward) (max_over_time(keel_x[1h])) + on (run) group_left () max by (run) (keel_y))": [
        "run",
        "reward",
    ],
    "sqrt(clamp_min(max by (run) (keel_x), 0))": ["run"],
}


@pytest.mark.parametrize("expression", list(LABELS_OF))
def test_the_labels_of_an_expression_are_those_of_its_outermost_aggregation(expression: str) -> None:
    assert labels_of(expression) == LABELS_OF[expression]


RENAME = """
import dataclasses
from keel.observability import metric_table
metric_table.TABLE = [dataclasses.replace(row, name="other") if row.name == NAME else row for row in metric_table.TABLE]
from keel.observability import dashboards
dashboards.files()
"""


@pytest.mark.parametrize("name", ["kl_nats", "busy_seconds_total", "unread"])
def test_a_renamed_metric_ends_the_generation(name: str) -> None:
    code = RENAME.replace("NAME", repr(name))
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    last = answer.stderr.splitlines()[-1:]
    assert last == ([] if name == "unread" else [f"KeyError: {name!r}"])


def test_no_variable_is_left_in_expressions() -> None:
    texts = all_filled("run-1")
    assert len(texts) == sum(len(asked(uid)) for uid in BUILT) and not [text for text in texts if "$" in text]
    assert all('run=~"run-1"' in text for text in texts if "keel_" in text)


def test_promtool_can_parse_every_expression(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH")
    texts = all_filled("run-1")
    records = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(texts)]
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    answer = subprocess.run([promtool, "check", "rules", str(rules)], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0 and f"{len(texts)} rules found" in answer.stdout, answer.stderr


SERIES = {
    'keel_version{run="a"}': "0+1x240",  # a step every 15 seconds
    'keel_steps_wanted{run="a"}': "300x240",
    'keel_workers_lost_total{run="a", role="scorer"}': "_x231 1x8",  # the first loss makes the series
    'keel_workers_lost_total{run="a", role="reference"}': "2x199 stale _x8 2x31",  # no scrape from 50m to 52m
    'keel_busy_seconds_total{run="a", role="learner"}': "0+15x240",  # never idle: it has no other series
    'keel_busy_seconds_total{run="a", role="generator"}': "0+15x240",
    'keel_idle_seconds_total{run="a", role="generator", on="learner"}': "0+30x240",
    'keel_idle_seconds_total{run="a", role="generator", on="scorer"}': "0+15x240",
    'keel_reward_component{run="a", reward="gold"}': "0+1x200 200-2x39",
    'keel_kl_nats{run="a"}': "16x240",
    'keel_completion_tokens_total{run="a"}': "0+1500x240",
    'keel_workers{run="a", role="generator"}': "4x240",
}
VALUES = {  # dashboard, panel, query -> labels and value at 58 minutes, by hand
    ("keel-run", "Time left", 0): [('{run="a"}', (300 - 232) * 15)],
    ("keel-cluster", "Utilization by role", 0): [('{role="generator"}', 0.25), ('{role="learner"}', 1)],
    ("keel-cluster", "Share of time the learner works", 0): [('{run="a"}', 1)],
    ("keel-cluster", "Tokens a second per generator", 0): [("{}", 25)],
    ("keel-cluster", "What roles wait for", 0): [
        ('{on="learner", role="generator"}', 58 * 60 * 2),
        ('{on="scorer", role="generator"}', 58 * 60),
    ],
    ("keel-run", "Fall from the peak", 0): [('{run="a", reward="gold"}', 62)],
    ("keel-run", "Rewards over sqrt(KL)", 0): [('{run="a", reward="gold"}', 4)],
}


def test_expressions_are_worth_what_their_panels_say(tmp_path: Path) -> None:
    """Prometheus' own arithmetic on series whose answer is known."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH")
    checks = [("58m", event(), [('{run="a", role="scorer"}', 1)]), ("57m", event(), []), ("59m30s", event(), [])]
    checks.append(("52m30s", event(), []))  # what was lost before the gap
    for (uid, title, number), samples in VALUES.items():
        panel = next(panel for panel in drawn(uid) if panel["title"] == title)
        checks.append(("58m", filled(panel["targets"][number]["expr"], ".+"), samples))
    tests = [
        {
            "expr": text,
            "eval_time": when,
            "exp_samples": [{"labels": built, "value": value} for built, value in samples],
        }
        for when, text, samples in checks
    ]
    series = [{"series": name, "values": values} for name, values in SERIES.items()]
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}]})
    )
    command = [promtool, "test", "rules", str(tmp_path / "tests.yml")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def event() -> str:
    return filled(dashboards.event("workers_lost_total"), ".+")


RAY_METRICS = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used_host",
    "ray_node_mem_total_host",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_network_receive_speed",
    "ray_object_store_memory",
}


def test_ray_has_the_metrics_that_are_asked_of_it() -> None:
    """Ray's own dashboards, read as text, ask for the same names."""
    result = importlib.util.find_spec("ray")
    assert result and result.origin
    folder = Path(result.origin).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = (folder / "default_dashboard_panels.py").read_text(encoding="utf8")
    assert {name for name in RAY_METRICS if not re.search(rf"\b{name}\b", text)} == set()
    assert {name for built in asked("keel-cluster") for name in re.findall(r"\bray_\w+", built)} == RAY_METRICS
