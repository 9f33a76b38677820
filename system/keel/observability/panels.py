"""What a dashboard is made of: rows of panels of queries."""

from dataclasses import dataclass
from typing import Literal

from keel.observability.metric_table import PREFIX, TABLE
from keel.observability.promql import Expression, Unit

_MEANINGS = {metric.name: metric.meaning for metric in TABLE}


@dataclass(frozen=True)
class Query:
    """One expression; its name stands in the legend behind the values of its labels, or over its column."""

    expression: Expression
    name: str = ""
    legend: str = ""
    """Instead of these: text with labels as {{role}}."""


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[Query, ...]
    note: str = ""
    """Stands before the meanings of the metrics."""
    kind: Literal["timeseries", "stat", "bargauge", "table", "xychart"] = "timeseries"
    """xychart: the first query is x, the second y; a curve for every set of labels, which both must have."""
    width: int = 8
    height: int = 8
    stacked: bool = False
    bounds: tuple[str, ...] = ()
    """Names of queries that are bounds, not measurements: their curves are dashed."""

    @property
    def unit(self) -> Unit:
        """Of the values; of an XY chart, of y."""
        return self.queries[-1 if self.kind == "xychart" else 0].expression.unit

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for query in self.queries for name in query.expression.metrics))

    @property
    def description(self) -> str:
        meanings = [f"{PREFIX}{name}: {_MEANINGS[name]}" for name in self.metrics]
        return "\n\n".join([self.note, *meanings] if self.note else meanings)


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = False


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    annotations: tuple[Query, ...]
    """An event wherever one has a value."""
    many_runs: bool = True
    """Whether `$run` may be several; curves then bear the run's name."""

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)
