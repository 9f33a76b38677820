"""The PromQL of the shipped dashboards, as a Prometheus would be asked."""

import json
from typing import Any

from keel.observability import dashboards


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels that have queries, those of collapsed rows included."""
    rows = dashboard["panels"]
    return [panel for row in rows for panel in (row, *row.get("panels", [])) if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Every PromQL expression of the JSON, of panels and annotations."""
    texts = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    return texts + [annotation["expr"] for annotation in dashboard["annotations"]["list"]]


def filled(expression: str, run: str) -> str:
    """An expression with Grafana's variables filled in."""
    for variable, value in {"$__rate_interval": "1m", "$__range": "1h", "$run": run}.items():
        expression = expression.replace(variable, value)
    return expression


def all_filled(run: str) -> list[str]:
    """Every expression of all dashboards; those of Ray's own metrics are among them."""
    built = [json.loads(text) for text in dashboards.files().values()]
    return [filled(expression, run) for dashboard in built for expression in expressions(dashboard)]
