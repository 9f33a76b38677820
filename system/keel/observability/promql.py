"""PromQL expressions for dashboards. A metric, a label or a kind that the metric table does not have raises.

Every function aggregates by run first: a run that goes on at another address is still one curve.
"""

from dataclasses import dataclass, replace
from typing import Literal

from keel.observability.metric_table import PREFIX, TABLE, Metric

RATE, RANGE = "$__rate_interval", "$__range"
"""Windows that Grafana fills in: four scrapes or one pixel, whichever is longer; all the time that is shown."""


@dataclass(frozen=True)
class Unit:
    """What Grafana calls a unit, and what stands at the axis where it has none."""

    grafana: str
    axis: str = ""


SECONDS, BYTES, RATIO, COUNT = Unit("s"), Unit("bytes"), Unit("percentunit"), Unit("short")
NATS, VERSIONS = Unit("none", "nats"), Unit("none", "versions")
TOKENS_PER_SECOND = Unit("suffix:tokens/s")
_UNITS = {  # the first suffix that fits
    "_timestamp_seconds": Unit("dateTimeAsIso"),
    "_tokens_per_second": TOKENS_PER_SECOND,
    "_seconds": SECONDS,
    "_bytes": BYTES,
    "_ratio": RATIO,
    "_nats": NATS,
    "_tokens": Unit("none", "tokens"),
    "_versions": VERSIONS,
}
_RATES = {"_seconds": RATIO, "_bytes": Unit("Bps"), "_tokens": TOKENS_PER_SECOND}


@dataclass(frozen=True)
class Expression:
    """A PromQL expression, the metrics it reads, the labels and the unit of what it gives."""

    text: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    unit: Unit = COUNT

    def __add__(self, other: "Expression") -> "Expression":
        return self._with(other, "+", self.unit)

    def __sub__(self, other: "Expression") -> "Expression":
        return self._with(other, "-", self.unit)

    def __truediv__(self, other: "Expression") -> "Expression":
        return self._with(other, "/", RATIO if self.unit == other.unit else self.unit)

    def above_zero(self) -> "Expression":
        """Nothing where it is not above 0."""
        return replace(self, text=f"({self.text} > 0)")

    def or_zero_like(self, other: "Expression") -> "Expression":
        """0 where this does not exist and the other does: a counter with a label begins with its first count."""
        return self._with(other, "or 0 *", self.unit)

    def each(self, other: "Expression") -> "Expression":
        """This, a number a run, once for every series of the run that the other has."""
        if other.labels == self.labels:
            return self
        repeated = f"(0 * {other.text} + on (run) group_left () {self.text})"
        return Expression(repeated, (*self.metrics, *other.metrics), other.labels, self.unit)

    def root(self) -> "Expression":
        """Its square root; of what an estimate puts below 0, 0."""
        return replace(self, text=f"sqrt(clamp_min({self.text}, 0))", unit=Unit("none", f"sqrt({self.unit.axis})"))

    def together(self, *by: str) -> "Expression":
        """The sum over all runs, by other labels that it has."""
        _check(by, self.labels, self.text)
        return replace(self, text=f"{_aggregation('sum', by)} ({self.text})", labels=by)

    def in_unit(self, unit: Unit) -> "Expression":
        return replace(self, unit=unit)

    def _with(self, other: "Expression", operator: str, unit: Unit) -> "Expression":
        if set(self.labels) != set(other.labels):
            raise ValueError(f"{self.text} {operator} {other.text}: {self.labels} and {other.labels} do not match")
        metrics = tuple(dict.fromkeys((*self.metrics, *other.metrics)))
        return Expression(f"({self.text} {operator} {other.text})", metrics, self.labels, unit)


def gauge(name: str, by: tuple[str, ...] | None = None, **equal: str) -> Expression:
    """The value of a gauge by run and its labels, or by those named; `equal` selects series by label."""
    return _aggregated("max", _metric(name, "gauge"), "{}", by, equal)


def total(name: str, by: tuple[str, ...] | None = None, **equal: str) -> Expression:
    """What a counter counted since the run's process started."""
    return _aggregated("sum", _metric(name, "counter"), "{}", by, equal)


def rate(name: str, by: tuple[str, ...] | None = None, **equal: str) -> Expression:
    """What a counter counts a second."""
    metric = _metric(name, "counter")
    own = name.removesuffix("_total")
    unit = next((unit for suffix, unit in _RATES.items() if own.endswith(suffix)), Unit("cps"))
    return _aggregated("sum", metric, f"rate({{}}[{RATE}])", by, equal).in_unit(unit)


def increase(name: str, by: tuple[str, ...] | None = None, **equal: str) -> Expression:
    """What a counter counted in all the time that is shown."""
    return _aggregated("sum", _metric(name, "counter"), f"increase({{}}[{RANGE}])", by, equal)


def events(name: str, by: tuple[str, ...] | None = None) -> Expression:
    """What a counter counted in the last minute, where that is anything.

    `increase` would miss the first one: a counter with a label does not exist before it. One that was not there for
    less than ten minutes, as after a scrape that failed, has counted nothing anew.
    """
    before = "(last_over_time({0}[10m] offset 1m) or 0 * {0})"
    return _aggregated("sum", _metric(name, "counter"), f"({{0}} - {before})", by, {}).above_zero()


def peak(name: str, by: tuple[str, ...] | None = None) -> Expression:
    """The largest value of a gauge in all the time that is shown."""
    return _aggregated("max", _metric(name, "gauge"), f"max_over_time({{}}[{RANGE}])", by, {})


def slope(name: str) -> Expression:
    """Change of a gauge a second over the last hour, by linear regression: good also where little of it is known."""
    return _aggregated("max", _metric(name, "gauge"), "deriv({}[1h])", None, {})


def age(name: str, **equal: str) -> Expression:
    """Seconds since a time stamp."""
    own = gauge(name, None, **equal)
    return replace(own, text=f"(time() - {own.text})", unit=SECONDS)


def _aggregated(how: str, metric: Metric, form: str, by: tuple[str, ...] | None, equal: dict[str, str]) -> Expression:
    by = metric.labels if by is None else by
    _check((*by, *equal), metric.labels, metric.name)
    matchers = ", ".join(['run=~"$run"', *(f'{label}="{value}"' for label, value in equal.items())])
    series = f"{PREFIX}{metric.name}{{{matchers}}}"
    text = f"{_aggregation(how, ('run', *by))} ({form.format(series)})"
    own = metric.name.removesuffix("_total")
    unit = next((unit for suffix, unit in _UNITS.items() if own.endswith(suffix)), COUNT)
    return Expression(text, (metric.name,), ("run", *by), unit)


def _aggregation(how: str, by: tuple[str, ...]) -> str:
    return f"{how} by ({', '.join(by)})" if by else how


def _metric(name: str, kind: Literal["gauge", "counter"]) -> Metric:
    found = next((metric for metric in TABLE if metric.name == name), None)
    if found is None:
        raise KeyError(f"{name!r} is no metric of the table")
    if found.kind != kind:
        raise ValueError(f"{name} is a {found.kind}, not a {kind}")
    return found


def _check(asked: tuple[str, ...], there: tuple[str, ...], what: str) -> None:
    if unknown := set(asked) - set(there):
        raise ValueError(f"{what} has the labels {there}, not {sorted(unknown)}")
