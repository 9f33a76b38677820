"""How a run is observed: metrics, the HTTP endpoint, trackers, dashboards, progress on the terminal.

In: numbers of a step. Out: metrics.jsonl, Prometheus text, TensorBoard or W&B lines, Grafana JSON.
To add a metric, add its row to `metric_table.py` and a panel to `dashboards.py`: the endpoint and the page
docs/operate/metrics.md follow. Alerts are YAML, beside system/: deploy/prometheus/rules.
Start reading at `metric_table.py`, then `metrics.py`.
"""
