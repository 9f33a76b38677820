"""What a real Prometheus sees when a run loses a generator, and when the run ends."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import finish, wait_for
from keel import files
from keel.observability.metric_table import PREFIX
from live import PATIENCE_SECONDS
from observed import UP, Observed, observed
from prometheus import Series
from test_runs import is_generator

pytestmark = pytest.mark.slow
STEPS = 60


def test_a_lost_generator_is_seen_and_the_discovery_file_goes_with_the_run(tmp_path: Path, tiny_model: Path) -> None:
    with observed(tmp_path, tiny_model, STEPS) as run:
        run.prometheus.wait_until(UP)
        check_a_lost_generator(run)
        check_the_end(run)


def check_a_lost_generator(run: Observed) -> None:
    """The loss is counted, the generator is replaced, and every series continues."""
    prometheus = run.prometheus
    before = prometheus.query(f'{{__name__=~"{PREFIX}.+"}}')
    began = before[0].samples[-1][0]
    run.pace.write_text("8.0")  # or the run could end before a slow machine has another generator
    next(filter(is_generator, psutil.Process(run.process.pid).children(recursive=True))).kill()
    prometheus.wait_until('keel_workers_lost_total{role="generator"} == 1')
    prometheus.wait_until('keel_workers{role="generator"} == 1')
    prometheus.wait_until('keel_workers{role="generator"} == 2', PATIENCE_SECONDS)
    run.pace.write_text("1.5")
    (steps,) = prometheus.wait_until("keel_steps_total")
    prometheus.wait_until(f"keel_steps_total >= {steps.value + 2}", PATIENCE_SECONDS)

    ended = prometheus.query("keel_steps_total[60s]")[0].samples[-1][0]
    window = f"{round(ended - began)}s"
    after = {key_of(item): item for item in prometheus.query(f'{{__name__=~"{PREFIX}.+"}}[{window}]', time=ended)}
    scrapes = [moment for moment, _ in after[key_of(steps)].samples]
    assert len(scrapes) > 4, scrapes
    for series in before:
        check_goes_on(after[key_of(series)], scrapes)
    prometheus.wait_until(UP)
    lost = prometheus.query("keel_workers_lost_total")
    assert [(item.labels["role"], item.value) for item in lost] == [("generator", 1)]


def key_of(series: Series) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(series.labels.items()))


def check_goes_on(series: Series, scrapes: list[float]) -> None:
    """It is in every scrape; a counter never falls."""
    assert [moment for moment, _ in series.samples] == scrapes, series.labels
    if series.name.endswith("_total"):
        values = [value for _, value in series.samples]
        assert values == sorted(values), series.labels


def check_the_end(run: Observed) -> None:
    """The discovery file goes with the run."""
    assert len(list(run.discovery.iterdir())) == 1
    run.pace.unlink()
    code, _, err = finish(run.process)
    assert code == 0, err
    assert len(files.read_json_lines(run.directory / "metrics.jsonl")) == STEPS
    assert list(run.discovery.iterdir()) == []
    result: Any = None

    def gone() -> bool:
        nonlocal result
        result = run.prometheus.page("/metrics")
        return 'prometheus_sd_discovered_targets{config="keel",name="scrape"} 1' in result  # /sd was the last one's

    wait_for(gone, PATIENCE_SECONDS, "Prometheus to forget the file")
