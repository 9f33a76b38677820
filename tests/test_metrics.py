"""The Prometheus page, metrics.jsonl and the reference table say the same."""

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from keel import metrics
from keel.metrics import TABLE, RunMetrics
from keel.settings import MetricsSettings


def filled(tmp_path: Path) -> RunMetrics:
    """Every metric of the table with a number of its own."""
    own = RunMetrics("test", tmp_path / "metrics.jsonl")
    for number, metric in enumerate(TABLE, start=1):
        value = {"one": number + 0.5, "two": number + 0.25} if metric.label else number + 0.5
        (own.set if metric.kind == "gauge" else own.add)({metric.name: value})
    return own


def samples(page: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(page)
    return {
        (sample.name, next((v for k, v in sample.labels.items() if k != "run"), "")): sample.value
        for family in families
        for sample in family.samples
    }


def test_page_and_file_have_the_same_numbers(tmp_path: Path) -> None:
    own = filled(tmp_path)
    own.record(3, 12.5)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line.pop("step"), line.pop("time")) == (3, 12.5)
    page = samples(generate_latest(own.registry).decode())
    flat = {
        (metrics.PREFIX + name, label): number
        for name, value in line.items()
        for label, number in (value.items() if isinstance(value, dict) else {"": value}.items())
    }
    assert flat == page
    assert {metric.name for metric in TABLE} == set(line)


def test_series_exist_before_anything_happened(tmp_path: Path) -> None:
    page = samples(generate_latest(RunMetrics("test", tmp_path / "m").registry).decode())
    assert {name for name, _ in page} == {metrics.PREFIX + metric.name for metric in TABLE if not metric.label}


def test_totals_are_restored(tmp_path: Path) -> None:
    own = filled(tmp_path)
    again = RunMetrics("test", tmp_path / "again.jsonl")
    again.restore(own.totals)
    again.add({"steps_total": 1.0})
    assert again.totals == {**own.totals, "steps_total": own.totals["steps_total"] + 1}


def test_the_endpoint_answers(tmp_path: Path) -> None:
    own = filled(tmp_path)
    port = own.serve(MetricsSettings(port=0))
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    assert samples(page) == samples(generate_latest(own.registry).decode())


def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    page = generate_latest(filled(tmp_path).registry)
    answer = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, b"", b"")


def test_the_reference_in_the_documentation_is_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert metrics.reference_table() in page


def test_names_carry_their_unit() -> None:
    for metric in TABLE:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert metric.meaning.endswith("."), metric.name
