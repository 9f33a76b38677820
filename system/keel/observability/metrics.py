"""The metrics of a run: its Prometheus page and metrics.jsonl.

Actors return numbers; the driver records them here, and serves the page of the run (endpoint.py).
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, make_wsgi_app

from keel import files
from keel.observability.metric_table import PREFIX, TABLE, Metric

Values = Mapping[str, float | Mapping[str, float]]
_BY_NAME = {metric.name: metric for metric in TABLE}


class _Registry(CollectorRegistry):
    """Collects the numbers of one moment: what is added together is seen together."""

    def __init__(self) -> None:
        super().__init__()
        self.changing = threading.Lock()

    def collect(self) -> Iterator[Any]:
        with self.changing:
            return iter(list(super().collect()))


class RunMetrics:
    """Current value of every metric of one run; `record` closes a step and appends it to metrics.jsonl."""

    def __init__(self, run: str, path: Path) -> None:
        disable_created_metrics()
        self.registry = _Registry()
        self.page = make_wsgi_app(self.registry)
        """Answers GET with the page: text or OpenMetrics, compressed or not, as it is asked for."""
        self.run = run
        self.path = path
        self._gauge_values: dict[str, Any] = {}
        self._operational: dict[str, Any] = {}
        self.totals: dict[str, Any] = {
            metric.name: {} if metric.labels else 0.0 for metric in TABLE if metric.kind == "counter"
        }
        self._collectors = {metric.name: self._collector(metric) for metric in TABLE}

    def _collector(self, metric: Metric) -> Any:
        kind = Gauge if metric.kind == "gauge" else Counter
        collector = kind(PREFIX + metric.name, metric.meaning, ("run", *metric.labels), registry=self.registry)
        if metric.kind == "counter" and not metric.labels:
            collector.labels(self.run)  # the series exists from the start; a gauge that is not set is absent, not 0
        return collector

    def set(self, values: Values) -> None:
        """Set gauges."""
        for name, value in values.items():
            assert _metric(name).kind == "gauge", name
            if _metric(name).operational and isinstance(value, Mapping):
                self._operational[name] = {**self._operational.get(name, {}), **value}
            else:
                (self._operational if _metric(name).operational else self._gauge_values)[name] = value
        with self.registry.changing:
            for series, number in self._series(values):
                series.set(number)

    def add(self, values: Values) -> None:
        """Increment counters; one page shows all of a call or none."""
        for name, value in values.items():
            assert _metric(name).kind == "counter", name
            if isinstance(value, Mapping):
                before = self.totals[name]
                self.totals[name] = before | {label: before.get(label, 0.0) + number for label, number in value.items()}
            else:
                self.totals[name] += value
        with self.registry.changing:
            for series, number in self._series(values):
                series.inc(number)

    def _series(self, values: Values) -> Iterable[tuple[Any, float]]:
        for name, value in values.items():
            last = len(_metric(name).labels) - 1
            for label, number in _by_label(value).items():
                labels = label.split("/", last) if last >= 0 else ()
                yield self._collectors[name].labels(self.run, *labels), number

    def restore(self, totals: Values) -> None:
        """Continue from the totals of a checkpoint, or from none: what was counted since is done again.

        Operational totals keep the larger value: what happened has happened. The endpoint counts what this process
        did, as Prometheus expects it of a process.
        """
        self._gauge_values = {}
        for metric in [metric for metric in TABLE if metric.kind == "counter"]:
            counted, stored = (dict(_by_label(source.get(metric.name, {}))) for source in (self.totals, totals))
            if metric.operational:
                stored = {
                    label: max(counted.get(label, 0.0), stored.get(label, 0.0)) for label in {**counted, **stored}
                }
            self.totals[metric.name] = stored if metric.labels else stored.get("", 0.0)

    def record(self, step: int, time_seconds: float) -> dict[str, Any]:
        """Append the step: every metric under its name without the prefix, labeled ones as objects."""
        line = {"step": step, "time": time_seconds, **self._gauge_values, **self._operational, **self.totals}
        self._gauge_values = {}  # what the next step does not say is absent from its line, not repeated
        files.append_json(self.path, line)
        return line


def _metric(name: str) -> Metric:
    if name not in _BY_NAME:
        raise KeyError(f"{name!r} is no metric of the table; one of your own belongs under objective_term")
    return _BY_NAME[name]


def _by_label(value: float | Mapping[str, float]) -> Mapping[str, float]:
    """A value without label under the empty one."""
    return value if isinstance(value, Mapping) else {"": value}


def gauges_of_step(report: Any, buffered: Any) -> dict[str, Any]:
    """Gauges of the learner and the buffer: their numbers without those that counters take."""
    counted = ("trained_tokens", "rollout_bytes", "counts")
    return {name: value for name, value in {**report, **buffered}.items() if name not in counted}


def unlabeled(values: Mapping[str, float]) -> float | Mapping[str, float]:
    """A counter without label travels under the empty one."""
    return values.get("", values)
