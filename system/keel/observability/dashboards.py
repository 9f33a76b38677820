"""The Grafana dashboards: one run, runs beside each other, the whole cluster. All files and checks come from here."""

import json

from keel.observability.grafana import Json, as_json
from keel.observability.panels import Dashboard, Panel, Query, Row
from keel.observability.promql import BYTES, COUNT, RANGE, RATE, RATIO, Expression, Unit, gauge, increase, rate, total
from keel.observability.run_dashboard import (
    EVENTS,
    LEARNING,
    OVER_OPTIMIZATION,
    ROOT_KL,
    RUN,
    STEP,
    against,
    fall_from_peak,
    stat,
)

NOT_SHOWN = {
    "steps_total": "version is the step; a resumed run counts from 0 again",
    "weight_syncs_total": "one a step",
    "micro_batches": "fixed by the configuration; in metrics.jsonl",
    "generate_seconds_total": "busy_seconds_total has it while it passes, not a batch later",
    "score_seconds_total": "busy_seconds_total has it while it passes, not a batch later",
    "learner_seconds_total": "busy_seconds_total has it while it passes, not a step later",
}
"""Metrics of the table that no dashboard shows, and why."""

_STEPS = Query(STEP, "Step")


def _over(what: str, x: Query, title: str, name: str) -> Panel:
    return against(f"{title} over {what}", x, Query(gauge(name), title))


def _states() -> Panel:
    columns = (
        Query(STEP, "Step"),
        Query(gauge("reward"), "Reward"),
        Query(gauge("kl_nats"), "KL (nats)"),
        Query(gauge("entropy_nats"), "Entropy (nats)"),
        Query(gauge("length_tokens"), "Length (tokens)"),
        Query(gauge("finished_ratio"), "With an end"),
        Query(gauge("staleness_mean_versions"), "Staleness (versions)"),
    )
    return Panel("Runs now", columns, kind="table", width=12)


def _falls() -> Panel:
    columns = (Query(gauge("reward_component"), "Reward now"), Query(fall_from_peak(), "Below its peak by"))
    note = "By reward. A monitor far below its peak while the training reward is at its own: over-optimized."
    return Panel("Rewards now, and how far below their peak", columns, note, kind="table", width=12)


_OVER_KL = (("Training reward", "reward"), ("Reward by name", "reward_component"), ("Length", "length_tokens"))
_CURVES = (*_OVER_KL, ("KL", "kl_nats"), ("Entropy per token", "entropy_nats"), ("End tokens", "finished_ratio"))
COMPARE = Dashboard(
    "keel-compare",
    "Keel: runs compared",
    "The same curves of several runs, over KL, steps and time.",
    (
        Row("Over-optimization by run", (_states(), _falls())),
        Row("Over KL", tuple(_over("sqrt(KL)", ROOT_KL, title, name) for title, name in _OVER_KL)),
        Row("Over steps", tuple(_over("steps", _STEPS, title, name) for title, name in _CURVES)),
        Row("Over-optimization over time", OVER_OPTIMIZATION),
        Row("Learning over time", LEARNING, collapsed=True),
    ),
    EVENTS,
)


def _utilization(*by: str, **equal: str) -> Expression:
    """Busy seconds over busy and idle ones."""
    busy, idle = (rate(name, None, **equal).together(*by) for name in ("busy_seconds_total", "idle_seconds_total"))
    return busy / (busy + idle.or_zero_like(busy))


def _failures(title: str, name: str) -> Panel:
    return Panel(title, (Query(total(name)),), "Since the run's process started.")


def _ray(title: str, expression: str, unit: Unit) -> Panel:
    note = "From Ray's own metrics, where Prometheus scrapes them too. All runs and everything else on the cluster."
    return Panel(title, (Query(Expression(expression, (), ("instance",), unit)),), note)


_GENERATORS = gauge("workers", by=(), role="generator")
_TOKENS = rate("completion_tokens_total")
_NOW = (
    stat("Runs", Query(Expression(f"count({STEP.text})", STEP.metrics, ())), note="Runs that are scraped."),
    stat("Generators", Query(_GENERATORS.together())),
    stat("Tokens a second, all runs", Query(_TOKENS.together())),
    stat("Tokens a second per generator", Query(_TOKENS.together() / _GENERATORS.together())),
    stat("Workers lost, all runs", Query(total("workers_lost_total").together())),
    stat("Batches tried again, all runs", Query(total("retries_total").together())),
)
_EFFICIENCY = (
    Panel(
        "Workers by role",
        (
            Query(gauge("workers").together("role"), "present"),
            Query(gauge("workers_desired").together("role"), "wanted"),
        ),
        bounds=("wanted",),
    ),
    Panel("Utilization by role", (Query(_utilization("role")),), "Busy over busy and idle, all runs together."),
    Panel("Utilization by run and role", (Query(_utilization("run", "role")),), "Busy over busy and idle."),
    Panel(
        "Who waits for whom",
        (Query(increase("idle_seconds_total").together("role", "on"), legend="{{role}} for {{on}}"),),
        "Worker seconds in the time that is shown, all runs together. The longest bar says whom to give more workers.",
        kind="bargauge",
    ),
    Panel(
        "Who waits for whom, by run",
        (Query(increase("idle_seconds_total"), "Worker seconds"),),
        "In the time that is shown.",
        kind="table",
    ),
    Panel(
        "Batches in line by role",
        (Query(rate("queue_seconds_total").together("role").in_unit(COUNT)),),
        "Mean number, all runs together.",
    ),
    Panel("Tokens a second by run", (Query(_TOKENS),), "Counted once a step.", stacked=True),
    Panel(
        "Tokens a second per generator, by run",
        (
            Query(_TOKENS / _GENERATORS, "over all generators"),
            Query(gauge("generate_tokens_per_second"), "over the busy ones"),
        ),
    ),
    Panel("Share of time the learner works", (Query(_utilization("run", role="learner")),), "The rest it waits."),
    Panel(
        "Learn loops by phase",
        (Query(rate("phase_seconds_total").together("phase").in_unit(COUNT)),),
        "Runs in each phase, mean number.",
        stacked=True,
    ),
)
_WENT_WRONG = (
    _failures("Workers lost by run and role", "workers_lost_total"),
    _failures("Weight loads that failed", "load_failures_total"),
    _failures("Samples that failed", "samples_failed_total"),
    _failures("Groups that were given up", "groups_dropped_total"),
    _failures("Rebuilds of learner and buffer", "rebuilds_total"),
    _failures("Batches tried again", "retries_total"),
)
RAY_METRICS = (
    "ray_node_cpu_utilization",
    "ray_node_mem_used_host",
    "ray_node_mem_total_host",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_network_receive_speed",
    "ray_object_store_memory",
)
"""What the cluster's dashboard reads beside the table: names of Ray 2.60."""
_RAY = (
    _ray("Processors", "avg by (instance) (ray_node_cpu_utilization)", Unit("percent")),
    _ray(
        "Memory in use",
        "sum by (instance) (ray_node_mem_used_host) / sum by (instance) (ray_node_mem_total_host)",
        RATIO,
    ),
    _ray("GPUs", "avg by (instance) (ray_node_gpus_utilization)", Unit("percent")),
    _ray("GPU memory", "sum by (instance) (ray_node_gram_used) * 1024 * 1024", BYTES),
    _ray("Network, received", "sum by (instance) (ray_node_network_receive_speed)", Unit("Bps")),
    _ray("Object store", "sum by (instance) (ray_object_store_memory)", BYTES),
)
CLUSTER = Dashboard(
    "keel-cluster",
    "Keel: cluster efficiency",
    "All runs together: who works, who waits for whom, tokens a second, what fails.",
    (
        Row("Cluster now", _NOW),
        Row("Efficiency", _EFFICIENCY),
        Row("Failures", _WENT_WRONG),
        Row("Ray nodes", _RAY, collapsed=True),
    ),
    EVENTS,
)
DASHBOARDS = (RUN, COMPARE, CLUSTER)


def files() -> dict[str, str]:
    """The dashboards as files: name -> text."""
    return {f"{own.uid}.json": json.dumps(build(own), indent=2) + "\n" for own in DASHBOARDS}


def build(dashboard: Dashboard) -> Json:
    """What Grafana imports."""
    return as_json(dashboard, tuple(other for other in DASHBOARDS if other is not dashboard))


def expressions(dashboard: Dashboard, run: str) -> list[str]:
    """Every PromQL expression of the JSON, panels and annotations, with Grafana's variables filled in.

    A test may put each to a Prometheus. Those of Ray's own metrics are among them.
    """
    found = build(dashboard)
    panels = [panel for each in found["panels"] for panel in (each, *each.get("panels", []))]
    texts = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    texts += [annotation["expr"] for annotation in found["annotations"]["list"]]
    filled = {RATE: "1m", RANGE: "1h", "$run": run, "${datasource}": "prometheus"}
    for variable, value in filled.items():
        texts = [text.replace(variable, value) for text in texts]
    return texts
