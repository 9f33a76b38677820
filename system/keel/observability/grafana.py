"""Dashboards of panels of PromQL queries, and their JSON as Grafana 11.1 and later import it.

The number of a panel comes from its title: links to a panel stay good when others are put before it.
"""

import json
import re
import zlib
from dataclasses import dataclass
from typing import Any, Literal

from keel.observability.metric_table import PREFIX, TABLE

Json = dict[str, Any]
Unit = tuple[str, str]
"""Grafana's name of a unit, and the text at the axis where Grafana has no such unit."""

_COLUMNS = 24
_PLUGIN_VERSION = "11.1.0"
"""Without a version Grafana reads an XY chart as one of its former schema."""
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_METRICS = {metric.name: metric for metric in TABLE}
_UNITS = {  # by the first suffix that fits
    "_timestamp_seconds": ("dateTimeAsIso", ""),
    "_tokens_per_second": ("suffix:tokens/s", ""),
    "_seconds": ("s", ""),
    "_bytes": ("bytes", ""),
    "_ratio": ("percentunit", ""),
    "_nats": ("none", "nats"),
    "_tokens": ("none", "tokens"),
    "_versions": ("none", "versions"),
    "learning_rate": ("sci", ""),
    "": ("short", ""),
}
_RATE_UNITS = {
    "_seconds": ("percentunit", ""),
    "_bytes": ("Bps", ""),
    "_tokens": ("suffix:tokens/s", ""),
    "": ("cps", ""),
}
_FIXED: Json = json.loads("""{
    "dashboard": {"tags": ["keel"], "schemaVersion": 39, "version": 1, "editable": true, "graphTooltip": 1,
        "timezone": "browser", "time": {"from": "now-3h", "to": "now"}, "refresh": "10s"},
    "timeseries": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": true, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": false}, "colorMode": "none",
        "graphMode": "none", "justifyMode": "auto", "orientation": "auto", "textMode": "auto", "wideLayout": true},
    "bargauge": {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": false}, "displayMode": "basic",
        "orientation": "horizontal", "valueMode": "color", "showUnfilled": true, "namePlacement": "auto",
        "sizing": "auto", "minVizWidth": 8, "minVizHeight": 16},
    "table": {"showHeader": true, "cellHeight": "sm", "sortBy": []},
    "xychart": {"mapping": "auto", "series": [{"x": {"matcher": {"id": "byName", "options": "Value #A"}}}],
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": true, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"}},
    "bound": [{"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}},
        {"id": "custom.fillOpacity", "value": 0},
        {"id": "custom.stacking", "value": {"mode": "none", "group": "A"}}],
    "source variable": {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus",
        "current": {}, "multi": false, "includeAll": false, "refresh": 1, "regex": "", "hide": 0, "options": []},
    "run variable": {"name": "run", "label": "Run", "type": "query", "refresh": 2, "sort": 1, "regex": "", "hide": 0,
        "options": []},
    "annotation": {"enable": true, "hide": false, "iconColor": "red", "step": "15s", "useValueForTime": false},
    "link": {"type": "link", "icon": "dashboard", "tags": [], "keepTime": true, "includeVars": true,
        "asDropdown": false, "targetBlank": false}
}""")
"""The parts that do not depend on a dashboard: options of each kind of panel, variables, links."""


@dataclass(frozen=True)
class Query:
    """One PromQL expression; its name stands in the legend behind the values of its labels, or over its column."""

    expression: str
    name: str = ""
    legend: str = ""
    """Text of the legend, with labels as {{role}}, in place of label values and name."""
    unit: Unit | None = None
    """The unit, unless it follows from the name of the first metric."""

    @property
    def measured_in(self) -> Unit:
        if self.unit is not None:
            return self.unit
        metric = metrics_of(self.expression)[0].removesuffix("_total")
        units = _RATE_UNITS if "rate(" in self.expression else _UNITS
        return next(unit for suffix, unit in units.items() if metric.endswith(suffix))


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[Query, ...]
    note: str = ""
    """First paragraph of the description, before the meanings of the metrics."""
    kind: Literal["timeseries", "stat", "bargauge", "table", "xychart"] = "timeseries"
    """xychart: the first query is x, the second y; a curve for every set of labels, which both must have."""
    width: int = 8
    height: int = 8
    stacked: bool = False
    bounds: tuple[str, ...] = ()
    """Names of queries that are bounds, not measurements: their curves are dashed."""


@dataclass(frozen=True)
class PanelRow:
    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = False


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: tuple[PanelRow, ...]
    annotations: tuple[Query, ...]
    """An event wherever one has a value."""
    many_runs: bool = True
    """Whether `$run` may be several; curves then bear the run's name."""

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


def value(name: str, form: str = "{}") -> str:
    """PromQL of a metric by run and its own labels: the largest of a gauge, the sum of a counter."""
    metric = _METRICS[name]
    aggregation = "max" if metric.kind == "gauge" else "sum"
    series = form.format(f'{PREFIX}{name}{{run=~"$run"}}')
    return f"{aggregation} by ({', '.join(('run', *metric.labels))}) ({series})"


def rate(name: str) -> str:
    """PromQL of the increase of a counter a second, over Grafana's own window: four scrapes or one pixel."""
    return value(name, "rate({}[$__rate_interval])")


def metrics_of(expression: str) -> list[str]:
    """List Keel's metrics in an expression, without the prefix, in order."""
    return list(dict.fromkeys(re.findall(rf"\b{PREFIX}(\w+)", expression)))


def labels_of(expression: str) -> list[str]:
    """List the labels of an expression's values: those of its first aggregation, which is the outermost one."""
    aggregation = re.search(r"\b(?:sum|max|avg|count)\b(?: by \(([^)]*)\))?", expression)
    return aggregation[1].split(", ") if aggregation and aggregation[1] else []


def as_json(dashboard: Dashboard, dashboards: tuple[Dashboard, ...]) -> Json:
    """Render a dashboard, with links to the others."""
    return _FIXED["dashboard"] | {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "links": [
            _FIXED["link"] | {"title": other.title, "tooltip": other.description, "url": f"/d/{other.uid}"}
            for other in dashboards
            if other.uid != dashboard.uid
        ],
        "templating": {"list": [_FIXED["source variable"], _run_variable(dashboard.many_runs)]},
        "annotations": {"list": [_annotation(query) for query in dashboard.annotations]},
        "panels": _laid_out(dashboard),
    }


def _laid_out(dashboard: Dashboard) -> list[Json]:
    """Place rows one under the other. Panels of a collapsed row are inside it, the others behind its head."""
    placed: list[Json] = []
    top = 0
    for row in dashboard.rows:
        panels, bottom = _row(row, top + 1, dashboard.many_runs)
        head = {
            "id": _number(row.title),
            "type": "row",
            "title": row.title,
            "collapsed": row.collapsed,
            "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
            "panels": panels if row.collapsed else [],
        }
        placed += [head, *([] if row.collapsed else panels)]
        top = top + 1 if row.collapsed else bottom
    return placed


def _row(row: PanelRow, top: int, many_runs: bool) -> tuple[list[Json], int]:
    """Place a row's panels from left to right, with a new line where the next does not fit; also where the row ends."""
    placed: list[Json] = []
    left = height = 0
    for panel in row.panels:
        if left + panel.width > _COLUMNS:
            left, top, height = 0, top + height, 0
        place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
        placed.append(_panel(panel, many_runs) | {"gridPos": place})
        left, height = left + panel.width, max(height, panel.height)
    return placed, top + height


def _panel(panel: Panel, many_runs: bool) -> Json:
    joined = panel.kind in ("table", "xychart")
    unit, axis = panel.queries[-1 if panel.kind == "xychart" else 0].measured_in
    metrics = dict.fromkeys(name for query in panel.queries for name in metrics_of(query.expression))
    meanings = [f"{PREFIX}{name}: {_METRICS[name].meaning}" for name in metrics]
    return {
        "id": _number(panel.title),
        "type": panel.kind,
        "title": panel.title,
        "description": "\n\n".join([panel.note, *meanings] if panel.note else meanings),
        "datasource": _SOURCE,
        "pluginVersion": _PLUGIN_VERSION,
        "fieldConfig": {
            "defaults": {"unit": unit, "color": {"mode": "palette-classic"}, "custom": _curves(panel, axis)},
            "overrides": [*(_fields(panel) if joined else []), *_dashes(panel)],
        },
        "options": _FIXED[panel.kind],
        "targets": [_target(panel, number, many_runs) for number in range(len(panel.queries))],
        "transformations": _joined(panel) if joined else [],
    }


def _target(panel: Panel, number: int, many_runs: bool) -> Json:
    query = panel.queries[number]
    now = panel.kind in ("stat", "bargauge", "table")
    labels = [f"{{{{{label}}}}}" for label in labels_of(query.expression) if label != "run" or many_runs]
    return {
        "refId": "ABCDEFGHIJ"[number],
        "datasource": _SOURCE,
        "editorMode": "code",
        "expr": query.expression,
        "legendFormat": query.legend or " ".join([*labels, query.name]).strip() or panel.title,
        "instant": now,
        "range": not now,
        "format": "table" if panel.kind in ("table", "xychart") else "time_series",
    }


def _curves(panel: Panel, axis: str) -> Json:
    if panel.kind == "xychart":
        return {"show": "points+lines", "lineWidth": 1, "pointSize": {"fixed": 4}}
    if panel.kind != "timeseries":
        return {}
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 60 if panel.stacked else 0,
        "showPoints": "auto",
        "spanNulls": False,
        "axisLabel": axis,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }


def _dashes(panel: Panel) -> list[Json]:
    matchers = [{"id": "byRegexp", "options": f"/(^| ){name}$/"} for name in panel.bounds]
    return [{"matcher": matcher, "properties": _FIXED["bound"]} for matcher in matchers]


def _fields(panel: Panel) -> list[Json]:
    """Units of each column of a table, and of each axis of an XY chart."""
    fields: list[Json] = []
    for number, query in enumerate(panel.queries):
        unit, axis = query.measured_in
        label = {"id": "custom.axisLabel", "value": f"{query.name} ({axis})" if axis else query.name}
        properties = [{"id": "unit", "value": unit}, *([label] if panel.kind == "xychart" else [])]
        matcher = {"id": "byName", "options": _column(panel, number)}
        fields.append({"matcher": matcher, "properties": properties})
    return fields


def _column(panel: Panel, number: int) -> str:
    """Grafana's name for the values of a query in a table; matchers need it, as parting the table changes others."""
    return f"Value #{'ABCDEFGHIJ'[number]}" if len(panel.queries) > 1 else "Value"


def _joined(panel: Panel) -> list[Json]:
    """Join the queries' tables by time and labels, a column each; for an XY chart one table a curve."""
    names = {_column(panel, number): query.name for number, query in enumerate(panel.queries)}
    hidden = {"Time": True} if panel.kind == "table" else {}
    joined: list[Json] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"renameByName": names, "excludeByName": hidden, "indexByName": {}}},
    ]
    if panel.kind == "xychart":
        labels = labels_of(panel.queries[1].expression)
        parted = {"fields": labels, "keepFields": False, "naming": {"asLabels": True}}
        joined.append({"id": "partitionByValues", "options": parted})
    return joined


def _number(title: str) -> int:
    return zlib.crc32(title.encode()) & 0x7FFFFFFF  # 31 bits: a number in any language


def _run_variable(many: bool) -> Json:
    query = f"label_values({PREFIX}steps_total, run)"
    return _FIXED["run variable"] | {
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run"},
        "current": {"text": ["All"], "value": ["$__all"]} if many else {},
        "multi": many,
        "includeAll": many,
        "allValue": ".+" if many else None,
    }


def _annotation(query: Query) -> Json:
    return _FIXED["annotation"] | {
        "name": query.name,
        "datasource": _SOURCE,
        "expr": query.expression,
        "titleFormat": query.name,
        "textFormat": " ".join(f"{{{{{label}}}}}" for label in labels_of(query.expression)),
    }
