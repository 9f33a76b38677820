"""The JSON of a dashboard, as Grafana 11.1 and later import it.

Numbers of panels come from their titles: links to a panel stay good when others are put before it.
"""

import zlib
from typing import Any

from keel.observability.metric_table import PREFIX
from keel.observability.panels import Dashboard, Panel, Query, Row

COLUMNS = 24
SCHEMA_VERSION = 39
PLUGIN_VERSION = "11.1.0"
"""Without it Grafana takes an XY chart for one of the form before."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "keel"
Json = dict[str, Any]
_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, Json] = {
    "timeseries": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {
        "reduceOptions": _LAST,
        "colorMode": "none",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
        "wideLayout": True,
    },
    "bargauge": {
        "reduceOptions": _LAST,
        "displayMode": "basic",
        "orientation": "horizontal",
        "valueMode": "color",
        "showUnfilled": True,
        "namePlacement": "auto",
        "sizing": "auto",
        "minVizWidth": 8,
        "minVizHeight": 16,
    },
    "table": {"showHeader": True, "cellHeight": "sm", "sortBy": []},
}


def as_json(dashboard: Dashboard, others: tuple[Dashboard, ...]) -> Json:
    """The dashboard, with links to the others."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair in all panels
        "timezone": "browser",
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "10s",
        "links": [_link(other) for other in others],
        "templating": {"list": [_source_variable(), _run_variable(dashboard.many_runs)]},
        "annotations": {"list": [_annotation(query) for query in dashboard.annotations]},
        "panels": _laid_out(dashboard),
    }


def _laid_out(dashboard: Dashboard) -> list[Json]:
    """Rows one under the other. Panels of a collapsed one are inside it, the others behind its head."""
    placed: list[Json] = []
    top = 0
    for row in dashboard.rows:
        inside, bottom = _row(row, top + 1, dashboard.many_runs)
        head = {
            "id": _number(row.title),
            "type": "row",
            "title": row.title,
            "collapsed": row.collapsed,
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
            "panels": inside if row.collapsed else [],
        }
        placed += [head, *([] if row.collapsed else inside)]
        top = top + 1 if row.collapsed else bottom
    return placed


def _row(row: Row, top: int, many_runs: bool) -> tuple[list[Json], int]:
    """The row's panels from left to right, a new line where the next has no room; where the row ends."""
    placed: list[Json] = []
    left = height = 0
    for panel in row.panels:
        if left + panel.width > COLUMNS:
            left, top, height = 0, top + height, 0
        place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
        placed.append(_panel(panel, many_runs) | {"gridPos": place})
        left, height = left + panel.width, max(height, panel.height)
    return placed, top + height


def _panel(panel: Panel, many_runs: bool) -> Json:
    return {
        "id": _number(panel.title),
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "pluginVersion": PLUGIN_VERSION,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit.grafana,
                "color": {"mode": "palette-classic"},
                "custom": _curves(panel),
            },
            "overrides": [*_fields(panel), *_dashes(panel)],
        },
        "options": _chart(panel) if panel.kind == "xychart" else _OPTIONS[panel.kind],
        "targets": [_target(panel, number, many_runs) for number in range(len(panel.queries))],
        "transformations": _joined(panel) if panel.kind in ("table", "xychart") else [],
    }


def _target(panel: Panel, number: int, many_runs: bool) -> Json:
    query = panel.queries[number]
    now = panel.kind in ("stat", "bargauge", "table")
    labels = [f"{{{{{label}}}}}" for label in query.expression.labels if label != "run" or many_runs]
    return {
        "refId": _reference(number),
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": query.expression.text,
        "legendFormat": query.legend or " ".join([*labels, query.name]).strip() or panel.title,
        "instant": now,
        "range": not now,
        "format": "table" if panel.kind in ("table", "xychart") else "time_series",
    }


def _reference(number: int) -> str:
    return chr(ord("A") + number)


def _curves(panel: Panel) -> Json:
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
        "axisLabel": panel.unit.axis,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }


def _dashes(panel: Panel) -> list[Json]:
    style = [
        {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}},
        {"id": "custom.fillOpacity", "value": 0},
        {"id": "custom.stacking", "value": {"mode": "none", "group": "A"}},
    ]
    matchers = [{"id": "byRegexp", "options": f"/(^| ){name}$/"} for name in panel.bounds]
    return [{"matcher": matcher, "properties": style} for matcher in matchers]


def _fields(panel: Panel) -> list[Json]:
    """Columns of a table and axes of an XY chart have units of their own."""
    if panel.kind not in ("table", "xychart"):
        return []
    return [
        {
            "matcher": {"id": "byName", "options": _column(panel, number)},
            "properties": [{"id": "unit", "value": query.expression.unit.grafana}]
            + ([{"id": "custom.axisLabel", "value": _axis(query)}] if panel.kind == "xychart" else []),
        }
        for number, query in enumerate(panel.queries)
    ]


def _column(panel: Panel, number: int) -> str:
    """What Grafana calls the values of a query in a table. Matchers go by it: parting the table changes other names."""
    return f"Value #{_reference(number)}" if len(panel.queries) > 1 else "Value"


def _axis(query: Query) -> str:
    axis = query.expression.unit.axis
    return f"{query.name} ({axis})" if axis else query.name


def _chart(panel: Panel) -> Json:
    return {
        "mapping": "auto",
        "series": [{"x": {"matcher": {"id": "byName", "options": _column(panel, 0)}}}],
        "legend": _LEGEND,
        "tooltip": {"mode": "single", "sort": "none"},
    }


def _joined(panel: Panel) -> list[Json]:
    """The queries' tables side by side, by time and labels, a column each; for an XY chart one table a curve."""
    names = {_column(panel, number): query.name for number, query in enumerate(panel.queries)}
    hidden = {"Time": True} if panel.kind == "table" else {}
    joined: list[Json] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"renameByName": names, "excludeByName": hidden, "indexByName": {}}},
    ]
    if panel.kind == "xychart":
        labels = list(panel.queries[1].expression.labels)
        parted = {"fields": labels, "keepFields": False, "naming": {"asLabels": True}}
        joined.append({"id": "partitionByValues", "options": parted})
    return joined


def _number(title: str) -> int:
    return zlib.crc32(title.encode()) & 0x7FFFFFFF  # 31 bits: a number in any language


def _source_variable() -> Json:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "multi": False,
        "includeAll": False,
        "refresh": 1,
        "regex": "",
        "hide": 0,
        "options": [],
    }


def _run_variable(many: bool) -> Json:
    query = f"label_values({PREFIX}steps_total, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run"},
        "current": {"text": ["All"], "value": ["$__all"]} if many else {},
        "multi": many,
        "includeAll": many,
        "allValue": ".+" if many else None,
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "regex": "",
        "hide": 0,
        "options": [],
    }


def _annotation(query: Query) -> Json:
    return {
        "name": query.name,
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "expr": query.expression.text,
        "step": "15s",
        "titleFormat": query.name,
        "textFormat": " ".join(f"{{{{{label}}}}}" for label in query.expression.labels),
        "useValueForTime": False,
    }


def _link(other: Dashboard) -> Json:
    return {
        "title": other.title,
        "tooltip": other.description,
        "type": "link",
        "url": f"/d/{other.uid}",
        "icon": "dashboard",
        "tags": [],
        "keepTime": True,
        "includeVars": True,
        "asDropdown": False,
        "targetBlank": False,
    }
