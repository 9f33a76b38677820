"""The Grafana dashboards as tables of PromQL: one run, runs beside each other, the whole cluster.

    tables of panels here --> JSON (grafana.py) --> `keel deploy grafana`, deploy/grafana

To show a metric, add a panel to a row. Alerts are in deploy/prometheus/rules. Every expression aggregates by run first:
a run that is resumed at another address is still one curve.
"""

import json

from keel.observability.grafana import Dashboard, Panel, PanelRow, Query, Unit, as_json, labels_of, rate, value

NOT_SHOWN = {
    "steps_total": "version is the step; a resumed run counts from 0 again",
    "weight_syncs_total": "one a step",
    "micro_batches": "fixed by the configuration; in metrics.jsonl",
    "generate_seconds_total": "busy_seconds_total has it while it passes, not a batch later",
    "score_seconds_total": "busy_seconds_total has it while it passes, not a batch later",
    "learner_seconds_total": "busy_seconds_total has it while it passes, not a step later",
}
"""Metrics of the table that no dashboard shows, and why."""
_COUNT, _SECONDS, _SHARE, _WORKERS = ("short", ""), ("s", ""), ("percentunit", ""), ("none", "workers")


def curves(title: str, *names: str, note: str = "") -> Panel:
    """The curves of some metrics, each under its own name; of one alone under its labels."""
    return Panel(title, tuple(Query(value(name), name if len(names) > 1 else "") for name in names), note)


def against(title: str, x: Query, name: str, label: str) -> Panel:
    """One metric over a number of the run, which is repeated for each of the metric's series."""
    y = value(name)
    repeated = x.expression if labels_of(y) == ["run"] else f"(0 * {y} + on (run) group_left () {x.expression})"
    return Panel(title, (Query(repeated, x.name, unit=x.unit), Query(y, label)), kind="xychart")


def event(name: str) -> str:
    """What a counter counted in the last minute, where that is anything.

    `increase` would miss the first event: a counter with a label does not exist before it. A series that was absent
    for less than ten minutes, as after a failed scrape, has counted nothing in between.
    """
    return f"({value(name, '({0} - (last_over_time({0}[10m] offset 1m) or 0 * {0}))')} > 0)"


def _panels(table: str) -> tuple[Panel, ...]:
    """Read a panel of curves from each line: its title | its metrics | its note, where it has one."""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(curves(title, *names.split(), note="".join(note)) for title, names, *note in rows)


def chart(
    title: str, expression: str, note: str = "", legend: str = "", unit: Unit | None = None, stacked: bool = False
) -> Panel:
    """The curves of one expression."""
    return Panel(title, (Query(expression, legend=legend, unit=unit),), note, stacked=stacked)


def stat(title: str, *queries: Query, note: str = "") -> Panel:
    return Panel(title, queries, note, kind="stat", width=4, height=4)


def utilization(matchers: str, *labels: str) -> str:
    """Busy seconds over busy and idle ones. A role that was never idle has no series of idle seconds."""
    seconds = "sum by ({}) (sum by (run, {}) (rate(keel_{}_seconds_total{{{}}}[$__rate_interval])))"
    busy = seconds.format(", ".join(labels), "role", "busy", matchers)
    idle = seconds.format(", ".join(labels), "role, on", "idle", matchers)
    return f"({busy} / ({busy} + ({idle} or 0 * {busy})))"


_EVENTS = (
    Query(event("rebuilds_total"), "Learner and buffer rebuilt"),
    Query(event("workers_lost_total"), "Worker lost"),
)
_STEP = Query(value("version"), "Step")
_ROOT_KL = Query(f"sqrt(clamp_min({value('kl_nats')}, 0))", "sqrt(KL)", unit=("none", "sqrt(nats)"))
_FALL = (
    '(max by (run, reward) (max_over_time(keel_reward_component{run=~"$run"}[$__range]))'
    ' - max by (run, reward) (keel_reward_component{run=~"$run"}))'
)
_TIME_LEFT = (
    '((max by (run) (keel_steps_wanted{run=~"$run"}) - max by (run) (keel_version{run=~"$run"}))'
    ' / (max by (run) (deriv(keel_version{run=~"$run"}[1h])) > 0))'
)
_CHECKPOINT_AGE = '(time() - max by (run, stage) (keel_progress_timestamp_seconds{run=~"$run", stage="checkpoint"}))'
_STAGE_AGE = f"(time() - {value('progress_timestamp_seconds')})"
_NATS = ("suffix:nats", "")

_RUN_NOW = (
    stat(
        "Step",
        Query(value("version"), "done"),
        Query(value("steps_wanted"), "of"),
        note="Steps, one weight version each.",
    ),
    stat(
        "Time left",
        Query(_TIME_LEFT, unit=_SECONDS),
        note="Steps left over the steps a second of the last hour; nothing while none is taken.",
    ),
    stat("Reward now", Query(value("reward"))),
    stat("KL now", Query(value("kl_nats"), unit=_NATS)),
    stat("Entropy now", Query(value("entropy_nats"), unit=_NATS)),
    stat("Tokens a second, all generators", Query(rate("completion_tokens_total"))),
)
_OVER_OPTIMIZATION = (
    *_panels("""
        Reward | reward regularized_reward
        Rewards by name | reward_component | Gold that falls while the training reward rises: over-optimized.
        KL from the reference | kl_nats kl_k3_nats | What the reward was bought with.
    """),
    against("Rewards over sqrt(KL)", _ROOT_KL, "reward_component", "Reward"),
    *_panels("""
        Entropy per token | entropy_nats policy_entropy_nats | Towards 0: the policy repeats itself.
        Entropy per completion | sequence_entropy_nats
        Completion length | length_tokens sampled_length_tokens | The cheapest way to a reward that likes long answers.
        Completions with an end token | finished_ratio
        Detectors of the guard | guard_fired_total | Times that each fired; events.jsonl has the numbers.
        Factors of the guard | guard_kl_multiplier guard_learning_rate_multiplier | Moved by raise_kl and lower_lr.
    """),
    chart("Fall from the peak", _FALL, "How far each reward is below its largest value in the time that is shown."),
)
_LEARNING = _panels("""
    Loss | loss policy_loss kl_loss log_ratio_loss entropy_loss
    Gradient norm | grad_norm
    Learning rate | learning_rate
    Clipped and truncated | clip_ratio truncated_weight_ratio
    Coefficients | kl_coefficient entropy_coefficient
    Gap between learner and sampler | gap_nats fresh_gap_nats | Large: the sampler does not hold what is trained.
    Importance weight | importance_weight
    Spread | reward_std advantage_std
    Terms inside the reward | reward_kl_term reward_entropy_term shaping_term
    KL term without its coefficient | kl_loss_nats log_ratio_loss_nats
    Lost signal | uniform_groups clamped_log_ratios
    Terms by name | objective_term
""")
_PIPELINE = (
    chart(
        "What the learn loop does",
        rate("phase_seconds_total"),
        "Share of time by phase. In `rollouts` the learner waits for them.",
        stacked=True,
    ),
    chart("Workers at work", rate("busy_seconds_total"), "Mean number by role.", unit=_WORKERS),
    chart(
        "Workers that wait, and for what",
        rate("idle_seconds_total"),
        "Mean number. The one who is waited for needs more workers.",
        legend="{{role}} for {{on}}",
        unit=_WORKERS,
        stacked=True,
    ),
    Panel(
        "Batches in line",
        (Query(rate("queue_seconds_total"), "mean", unit=_COUNT), Query(value("batches_waiting"), "now")),
        "By the role they wait for.",
    ),
    Panel(
        "Staleness",
        (
            Query(value("staleness_mean_versions"), "mean"),
            Query(value("staleness_max_versions"), "max"),
            Query(value("max_staleness_versions"), "bound"),
        ),
        bounds=("bound",),
    ),
    *_panels("""
        Weight versions | learner_version version | How far the generators are behind the learner.
        Groups in the buffer | buffer_groups
        Bytes in the buffer | buffer_bytes
        Seconds of a step | step_seconds wait_seconds weight_sync_seconds buffer_age_seconds
    """),
    Panel(
        "Tokens a second",
        (
            Query(rate("completion_tokens_total"), "sampled"),
            Query(rate("trained_tokens_total"), "trained"),
            Query(value("generate_tokens_per_second"), "per busy generator"),
        ),
        "Counted once a step: spikes where a step takes longer than the window of the rate.",
    ),
    Panel(
        "Bytes a second",
        (Query(rate("weight_sync_bytes_total"), "weights"), Query(rate("rollout_bytes_total"), "rollouts")),
    ),
    curves("Free memory", "free_memory_bytes"),
)
_RELIABILITY = (
    Panel(
        "Workers", (Query(value("workers"), "present"), Query(value("workers_desired"), "wanted")), bounds=("wanted",)
    ),
    *_panels("""
        Workers lost | workers_lost_total load_failures_total
        Built again, tried again | rebuilds_total retries_total
        Failures of trackers | tracker_failures_total | Lines that did not arrive; the run went on.
        Samples without a reward | samples_failed_total | By reason.
        Groups given up | groups_dropped_total | By reason.
        Samples accepted | samples_accepted_total
    """),
    chart(
        "Time since a stage finished something",
        _STAGE_AGE,
        "The stage that climbs alone is the one that hangs.",
        unit=_SECONDS,
    ),
    chart(
        "Age of the last checkpoint",
        _CHECKPOINT_AGE,
        "What a crash now would cost. Nothing before the first checkpoint of the run's process.",
        unit=_SECONDS,
    ),
    curves("Checkpoints and evaluations", "checkpoints_total", "evaluations_total"),
)
_PREFERENCES = _panels("""
    Preference loss | preference_loss
    Pairs | pairs
    Implicit rewards | chosen_implicit_reward rejected_implicit_reward implicit_margin
    Pairs in the right order | preference_accuracy_ratio held_out_accuracy_ratio
    Log-probability | chosen_logprob_nats rejected_logprob_nats | Both falling: mass goes elsewhere.
    Log-ratio to the reference | chosen_log_ratio_nats rejected_log_ratio_nats
    Stored completions | stored_logprob_nats stored_log_ratio_nats | The policy did not sample them.
    Stored completions, per token | stored_token_logprob_nats teacher_forced_entropy_nats
    Disagreement of the ensemble | pair_disagreement
    Prompts on which the ensemble agrees | settled_ratio
    Completions that may be best | plausible_completions
    Pairs left out | pairs_dropped_total | By reason.
""")
_OTHERS = _panels("""
    Value loss | critic_loss
    Explained variance | explained_variance
    Values | value_mean
    PopArt | popart_mean popart_std
    Normalized reward | normalizer_mean normalizer_std
    SAFE: threshold | safe_threshold_nats
    SAFE: gate and penalty | safe_gate safe_penalty
    Likelihood weights: effective samples | effective_samples
    Completions with a weight | accepted_ratio
    Reward of the best completion | best_reward
    KL of best-of-n | best_of_n_kl_nats
    Held-out loss | held_out_loss
    Passes over the training rows | epochs
    Rows left out | rows_dropped_total | By reason.
""")
RUN = Dashboard(
    "keel-run",
    "Keel: one run",
    "Is it over-optimizing, does it learn, what each role waits for, what went wrong.",
    (
        PanelRow("Now", _RUN_NOW),
        PanelRow("Over-optimization", _OVER_OPTIMIZATION),
        PanelRow("Learning", _LEARNING),
        PanelRow("Pipeline", _PIPELINE),
        PanelRow("Reliability", _RELIABILITY),
        PanelRow("Preferences", _PREFERENCES, collapsed=True),
        PanelRow("Critics, SAFE, weighted likelihood, offline stages", _OTHERS, collapsed=True),
    ),
    _EVENTS,
    many_runs=False,
)

_RUNS_NOW = (
    Panel(
        "Runs now",
        (
            _STEP,
            Query(value("reward"), "Reward"),
            Query(value("kl_nats"), "KL (nats)"),
            Query(value("entropy_nats"), "Entropy (nats)"),
            Query(value("length_tokens"), "Length (tokens)"),
            Query(value("finished_ratio"), "With an end"),
            Query(value("staleness_mean_versions"), "Staleness (versions)"),
        ),
        kind="table",
        width=12,
    ),
    Panel(
        "Rewards now, and how far below their peak",
        (Query(value("reward_component"), "Reward now"), Query(_FALL, "Below its peak by")),
        "By reward. A monitor far below its peak while the training reward is at its own: over-optimized.",
        kind="table",
        width=12,
    ),
)
_OVER_KL = (("Training reward", "reward"), ("Reward by name", "reward_component"), ("Length", "length_tokens"))
_OVER_STEPS = (*_OVER_KL, ("KL", "kl_nats"), ("Entropy per token", "entropy_nats"), ("End tokens", "finished_ratio"))
COMPARE = Dashboard(
    "keel-compare",
    "Keel: runs compared",
    "The same curves of several runs, over KL, steps and time.",
    (
        PanelRow("Over-optimization by run", _RUNS_NOW),
        PanelRow(
            "Over KL", tuple(against(f"{title} over sqrt(KL)", _ROOT_KL, name, title) for title, name in _OVER_KL)
        ),
        PanelRow(
            "Over steps", tuple(against(f"{title} over steps", _STEP, name, title) for title, name in _OVER_STEPS)
        ),
        PanelRow("Over-optimization over time", _OVER_OPTIMIZATION),
        PanelRow("Learning over time", _LEARNING, collapsed=True),
    ),
    _EVENTS,
)

_TOKENS = rate("completion_tokens_total")
_GENERATORS = 'max by (run) (keel_workers{run=~"$run", role="generator"})'
_CLUSTER_NOW = (
    stat("Runs", Query(f"count({value('version')})"), note="Runs that are scraped."),
    stat("Generators", Query(f"sum ({_GENERATORS})")),
    stat("Tokens a second, all runs", Query(f"sum ({_TOKENS})")),
    stat("Tokens a second per generator", Query(f"(sum ({_TOKENS}) / sum ({_GENERATORS}))")),
    stat("Workers lost, all runs", Query(f"sum ({value('workers_lost_total')})")),
    stat("Batches tried again, all runs", Query(f"sum ({value('retries_total')})")),
)
_IDLE = value("idle_seconds_total", "increase({}[$__range])")
_EFFICIENCY = (
    Panel(
        "Workers by role",
        (
            Query(f"sum by (role) ({value('workers')})", "present"),
            Query(f"sum by (role) ({value('workers_desired')})", "wanted"),
        ),
        bounds=("wanted",),
    ),
    chart("Utilization by role", utilization('run=~"$run"', "role"), "Busy over busy and idle, all runs together."),
    chart("Utilization by run and role", utilization('run=~"$run"', "run", "role"), "Busy over busy and idle."),
    Panel(
        "What roles wait for",
        (Query(f"sum by (role, on) ({_IDLE})", legend="{{role}} for {{on}}"),),
        "Worker seconds in the time that is shown, all runs. The longest bar names the role that needs more workers.",
        kind="bargauge",
    ),
    Panel("What roles wait for, by run", (Query(_IDLE, "Worker seconds"),), "In the time that is shown.", kind="table"),
    chart(
        "Batches in line by role",
        f"sum by (role) ({rate('queue_seconds_total')})",
        "Mean number, all runs together.",
        unit=_COUNT,
    ),
    Panel("Tokens a second by run", (Query(_TOKENS),), "Counted once a step.", stacked=True),
    Panel(
        "Tokens a second per generator, by run",
        (
            Query(f"({_TOKENS} / {_GENERATORS})", "over all generators"),
            Query(value("generate_tokens_per_second"), "over the busy ones"),
        ),
    ),
    chart("Share of time the learner works", utilization('run=~"$run", role="learner"', "run"), "The rest it waits."),
    chart(
        "Learn loops by phase",
        f"sum by (phase) ({rate('phase_seconds_total')})",
        "Runs in each phase, mean number.",
        unit=_COUNT,
        stacked=True,
    ),
)
_FAILURES = _panels("""
    Workers lost by run and role | workers_lost_total | Since the run's process started.
    Weight loads that failed | load_failures_total | Since the run's process started.
    Samples that failed | samples_failed_total | Since the run's process started.
    Groups that were given up | groups_dropped_total | Since the run's process started.
    Rebuilds of learner and buffer | rebuilds_total | Since the run's process started.
    Batches tried again | retries_total | Since the run's process started.
""")
_PER_NODE = (  # names of Ray 2.60
    ("Processors", "avg by (instance) (ray_node_cpu_utilization)", ("percent", "")),
    (
        "Memory in use",
        "sum by (instance) (ray_node_mem_used_host) / sum by (instance) (ray_node_mem_total_host)",
        _SHARE,
    ),
    ("GPUs", "avg by (instance) (ray_node_gpus_utilization)", ("percent", "")),
    ("GPU memory", "sum by (instance) (ray_node_gram_used) * 1024 * 1024", ("bytes", "")),
    ("Network, received", "sum by (instance) (ray_node_network_receive_speed)", ("Bps", "")),
    ("Object store", "sum by (instance) (ray_object_store_memory)", ("bytes", "")),
)
_FROM_RAY = "From Ray's own metrics, where Prometheus scrapes them too. All runs and everything else on the cluster."
CLUSTER = Dashboard(
    "keel-cluster",
    "Keel: cluster efficiency",
    "All runs together: which role works, what it waits for, tokens a second, what fails.",
    (
        PanelRow("Cluster now", _CLUSTER_NOW),
        PanelRow("Efficiency", _EFFICIENCY),
        PanelRow("Failures", _FAILURES),
        PanelRow(
            "Ray nodes",
            tuple(Panel(title, (Query(text, unit=unit),), _FROM_RAY) for title, text, unit in _PER_NODE),
            collapsed=True,
        ),
    ),
    _EVENTS,
)
DASHBOARDS = (RUN, COMPARE, CLUSTER)


def files() -> dict[str, str]:
    """Render the dashboards as files: name -> JSON that Grafana imports."""
    return {
        f"{dashboard.uid}.json": json.dumps(as_json(dashboard, DASHBOARDS), indent=2) + "\n" for dashboard in DASHBOARDS
    }
