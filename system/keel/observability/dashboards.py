"""The Grafana dashboards as tables of panels: one run, runs beside each other, the whole cluster.

    tables here --> panels of PromQL --> JSON (grafana.py) --> `keel deploy grafana`, deploy/grafana

To show a metric, add it to a line. A line `# title` begins a row; every other line is a panel:

    title | curves | note | options
    curves     `metric`, `rate metric` or a name of EXPRESSIONS, each with `as legend`; separated by commas
    options    kind, width, unit (Grafana's unit, then the text at the axis), legend, dashed (the name of a bound),
               stacked; separated by semicolons. A row's options are those of its panels; it may be `collapsed`

Alerts are in deploy/prometheus/rules. Every expression aggregates by run first: a run that is resumed at another
address is still one curve.
"""

import json
from typing import Any

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


def event(name: str) -> str:
    """PromQL of the increase of a counter in the last minute, where it is above 0.

    `increase` would miss the first event: a counter with a label does not exist before it. A series that was absent
    for less than ten minutes, as after a failed scrape, has counted nothing in between.
    """
    return f"({value(name, '({0} - (last_over_time({0}[10m] offset 1m) or 0 * {0}))')} > 0)"


def utilization(matchers: str, *labels: str) -> str:
    """Busy seconds over busy and idle ones. A role that was never idle has no series of idle seconds."""
    seconds = "sum by ({}) (sum by (run, {}) (rate(keel_{}_seconds_total{{{}}}[$__rate_interval])))"
    busy = seconds.format(", ".join(labels), "role", "busy", matchers)
    idle = seconds.format(", ".join(labels), "role, on", "idle", matchers)
    return f"({busy} / ({busy} + ({idle} or 0 * {busy})))"


_GENERATORS = 'max by (run) (keel_workers{run=~"$run", role="generator"})'
_TOKENS = rate("completion_tokens_total")
_IDLE = value("idle_seconds_total", "increase({}[$__range])")
EXPRESSIONS: dict[str, tuple[str, str]] = {
    "sqrt_kl": (f"sqrt(clamp_min({value('kl_nats')}, 0))", "none sqrt(nats)"),
    "fall_from_peak": (
        '(max by (run, reward) (max_over_time(keel_reward_component{run=~"$run"}[$__range]))'
        ' - max by (run, reward) (keel_reward_component{run=~"$run"}))',
        "",
    ),
    "time_left": (
        '((max by (run) (keel_steps_wanted{run=~"$run"}) - max by (run) (keel_version{run=~"$run"}))'
        ' / (max by (run) (deriv(keel_version{run=~"$run"}[1h])) > 0))',
        "s",
    ),
    "stage_age": (f"(time() - {value('progress_timestamp_seconds')})", "s"),
    "checkpoint_age": (
        '(time() - max by (run, stage) (keel_progress_timestamp_seconds{run=~"$run", stage="checkpoint"}))',
        "s",
    ),
    "runs": (f"count({value('version')})", ""),
    "generators": (f"sum ({_GENERATORS})", ""),
    "tokens_of_all": (f"sum ({_TOKENS})", ""),
    "tokens_of_all_per_generator": (f"(sum ({_TOKENS}) / sum ({_GENERATORS}))", ""),
    "tokens_per_generator": (f"({_TOKENS} / {_GENERATORS})", ""),
    "workers_lost_of_all": (f"sum ({value('workers_lost_total')})", ""),
    "retries_of_all": (f"sum ({value('retries_total')})", ""),
    "workers_by_role": (f"sum by (role) ({value('workers')})", ""),
    "workers_desired_by_role": (f"sum by (role) ({value('workers_desired')})", ""),
    "utilization_by_role": (utilization('run=~"$run"', "role"), ""),
    "utilization_by_run": (utilization('run=~"$run"', "run", "role"), ""),
    "utilization_of_learner": (utilization('run=~"$run", role="learner"', "run"), ""),
    "idle_seconds_in_range": (_IDLE, ""),
    "idle_seconds_by_role": (f"sum by (role, on) ({_IDLE})", ""),
    "batches_in_line_by_role": (f"sum by (role) ({rate('queue_seconds_total')})", "short"),
    "runs_by_phase": (f"sum by (phase) ({rate('phase_seconds_total')})", "short"),
    # names of Ray 2.60
    "node_cpu": ("avg by (instance) (ray_node_cpu_utilization)", "percent"),
    "node_memory": (
        "sum by (instance) (ray_node_mem_used_host) / sum by (instance) (ray_node_mem_total_host)",
        "percentunit",
    ),
    "node_gpu": ("avg by (instance) (ray_node_gpus_utilization)", "percent"),
    "node_gpu_memory": ("sum by (instance) (ray_node_gram_used) * 1024 * 1024", "bytes"),
    "node_received": ("sum by (instance) (ray_node_network_receive_speed)", "Bps"),
    "node_object_store": ("sum by (instance) (ray_object_store_memory)", "bytes"),
}
"""Name in the tables -> PromQL, and its unit where that does not follow from the first metric."""

_OVER_OPTIMIZATION = """
Reward | reward, regularized_reward
Rewards by name | reward_component | A monitor (gold) that turns down while the training reward goes up: \
over-optimization.
KL from the reference | kl_nats, kl_k3_nats, kl_exact_nats | What the reward was bought with.
Rewards over sqrt(KL) | sqrt_kl as sqrt(KL), reward_component as Reward | | kind=xychart
Entropy per token | entropy_nats, policy_entropy_nats, clamped_policy_entropy_nats | Towards 0: the policy \
repeats itself.
Entropy per completion | sequence_entropy_nats
Completion length | length_tokens, sampled_length_tokens | The cheapest way to a reward that likes long answers.
Completions with an end token | finished_ratio
Detectors of the guard | guard_fired_total | Times that each fired; events.jsonl has the numbers.
Factors of the guard | guard_kl_multiplier, guard_learning_rate_multiplier | Moved by raise_kl and lower_lr.
Repetition and templates | repetition_ratio, template_overlap | Overlap that rises: one answer to every question, \
which sentiment and fluency do not see.
Compression of the completions | compression_ratio | Rises with repetition, between batches of equal size.
Negative log-likelihood under the reference | reference_nll_nats | Up: word salad. Down: stock phrases.
Correlation with the training reward | reward_correlation, reward_length_correlation | Gold near 0 or below: the proxy \
no longer says what is good.
Tail of the training reward | reward_tail_index | A noisy number; above 0.5 a bound on KL bounds little.
Mass of the reference | reference_importance_mass, reference_effective_sample_ratio | Towards 0: the policy no longer \
samples what the reference would.
Fall from the peak | fall_from_peak | How far each reward is below its largest value in the time that is shown.
"""
_LEARNING = """
Loss | loss, policy_loss, kl_loss, log_ratio_loss, entropy_loss
Gradient norm | grad_norm
Learning rate | learning_rate
Clipped and truncated | clip_ratio, truncated_weight_ratio, covariance_selected_ratio
Coefficients | kl_coefficient, entropy_coefficient
Gap between learner and sampler | gap_nats, fresh_gap_nats | Large: the sampler does not hold what is trained.
Importance weight | importance_weight
Spread | reward_std, advantage_std
Terms inside the reward | reward_kl_term, reward_entropy_term, shaping_term
KL term without its coefficient | kl_loss_nats, log_ratio_loss_nats
Lost signal | uniform_groups, clamped_log_ratios
Terms by name | objective_term
"""
_RUN = f"""
# Now | kind=stat
Step | version as done, steps_wanted as of | Steps, one weight version each.
Time left | time_left | Steps left over the steps a second of the last hour; nothing while none is taken.
Reward now | reward
KL now | kl_nats | | unit=suffix:nats
Entropy now | entropy_nats | | unit=suffix:nats
Tokens a second, all generators | rate completion_tokens_total
# Over-optimization
{_OVER_OPTIMIZATION}
# Learning
{_LEARNING}
# Pipeline
What the learn loop does | rate phase_seconds_total | Share of time by phase. In `rollouts` the learner waits for \
them. | stacked
Workers at work | rate busy_seconds_total | Mean number by role. | unit=none workers
Workers that wait, and for what | rate idle_seconds_total | Mean number. The one who is waited for needs more workers. \
| unit=none workers; legend={{{{role}}}} for {{{{on}}}}; stacked
Batches in line | rate queue_seconds_total as mean, batches_waiting as now | By the role they wait for. | unit=short
Staleness | staleness_mean_versions as mean, staleness_max_versions as max, max_staleness_versions as bound | \
| dashed=bound
Weight versions | learner_version, version | How far the generators are behind the learner.
Groups in the buffer | buffer_groups
Bytes in the buffer | buffer_bytes
Seconds of a step | step_seconds, wait_seconds, weight_sync_seconds, buffer_age_seconds
Tokens a second | rate completion_tokens_total as sampled, rate trained_tokens_total as trained, \
generate_tokens_per_second as per busy generator | Counted once a step: spikes where a step takes longer than the \
window of the rate.
Bytes a second | rate weight_sync_bytes_total as weights, rate rollout_bytes_total as rollouts
Free memory | free_memory_bytes
# Reliability
Workers | workers as present, workers_desired as wanted | | dashed=wanted
Workers lost | workers_lost_total, load_failures_total
Built again, tried again | rebuilds_total, retries_total
Failures of trackers | tracker_failures_total | Lines that did not arrive; the run went on.
Samples without a reward | samples_failed_total | By reason.
Groups given up | groups_dropped_total | By reason.
Samples accepted | samples_accepted_total
Time since a stage finished something | stage_age | The stage that climbs alone is the one that hangs.
Age of the last checkpoint | checkpoint_age | What a crash now would cost. Nothing before the first checkpoint of the \
run's process.
Checkpoints and evaluations | checkpoints_total, evaluations_total
# Preferences | collapsed
Preference loss | preference_loss
Pairs | pairs
Implicit rewards | chosen_implicit_reward, rejected_implicit_reward, implicit_margin
Pairs in the right order | preference_accuracy_ratio, held_out_accuracy_ratio
Log-probability | chosen_logprob_nats, rejected_logprob_nats | Both falling: mass goes elsewhere.
Log-ratio to the reference | chosen_log_ratio_nats, rejected_log_ratio_nats
Stored completions | stored_logprob_nats, stored_log_ratio_nats | The policy did not sample them.
Stored completions, per token | stored_token_logprob_nats, teacher_forced_entropy_nats, \
clamped_teacher_forced_entropy_nats
Disagreement of the ensemble | pair_disagreement
Prompts on which the ensemble agrees | settled_ratio
Completions that may be best | plausible_completions
Pairs left out | pairs_dropped_total | By reason.
# Critics, SAFE, weighted likelihood, offline stages | collapsed
Value loss | critic_loss
Explained variance | explained_variance
Values | value_mean
PopArt | popart_mean, popart_std
Normalized reward | normalizer_mean, normalizer_std
SAFE: threshold | safe_threshold_nats
SAFE: gate and penalty | safe_gate, safe_penalty
Likelihood weights: effective samples | effective_samples
Completions with a weight | accepted_ratio
Reward of the best completion | best_reward
KL of best-of-n | best_of_n_kl_nats
Held-out loss | held_out_loss
Passes over the training rows | epochs
Rows left out | rows_dropped_total | By reason.
"""
_COMPARE = f"""
# Over-optimization by run | kind=table; width=12
Runs now | version as Step, reward as Reward, kl_nats as KL (nats), entropy_nats as Entropy (nats), \
length_tokens as Length (tokens), finished_ratio as With an end, staleness_mean_versions as Staleness (versions)
Rewards now, and how far below their peak | reward_component as Reward now, fall_from_peak as Below its peak by \
| By reward. A monitor far below its peak while the training reward is at its own: over-optimized.
# Over KL | kind=xychart
Training reward over sqrt(KL) | sqrt_kl as sqrt(KL), reward as Training reward
Reward by name over sqrt(KL) | sqrt_kl as sqrt(KL), reward_component as Reward by name
Length over sqrt(KL) | sqrt_kl as sqrt(KL), length_tokens as Length
# Over steps | kind=xychart
Training reward over steps | version as Step, reward as Training reward
Reward by name over steps | version as Step, reward_component as Reward by name
Length over steps | version as Step, length_tokens as Length
KL over steps | version as Step, kl_nats as KL
Entropy per token over steps | version as Step, entropy_nats as Entropy per token
End tokens over steps | version as Step, finished_ratio as End tokens
# Over-optimization over time
{_OVER_OPTIMIZATION}
# Learning over time | collapsed
{_LEARNING}
"""
_CLUSTER = """
# Cluster now | kind=stat
Runs | runs | Runs that are scraped.
Generators | generators
Tokens a second, all runs | tokens_of_all
Tokens a second per generator | tokens_of_all_per_generator
Workers lost, all runs | workers_lost_of_all
Batches tried again, all runs | retries_of_all
# Efficiency
Workers by role | workers_by_role as present, workers_desired_by_role as wanted | | dashed=wanted
Utilization by role | utilization_by_role | Busy over busy and idle, all runs together.
Utilization by run and role | utilization_by_run | Busy over busy and idle.
What roles wait for | idle_seconds_by_role | Worker seconds in the time that is shown, all runs. The longest bar names \
the role that needs more workers. | kind=bargauge; legend={{role}} for {{on}}
What roles wait for, by run | idle_seconds_in_range as Worker seconds | In the time that is shown. | kind=table
Batches in line by role | batches_in_line_by_role | Mean number, all runs together.
Tokens a second by run | rate completion_tokens_total | Counted once a step. | stacked
Tokens a second per generator, by run | tokens_per_generator as over all generators, \
generate_tokens_per_second as over the busy ones
Share of time the learner works | utilization_of_learner | The rest it waits.
Learn loops by phase | runs_by_phase | Runs in each phase, mean number. | stacked
# Failures | note=Since the run's process started.
Workers lost by run and role | workers_lost_total
Weight loads that failed | load_failures_total
Samples that failed | samples_failed_total
Groups that were given up | groups_dropped_total
Rebuilds of learner and buffer | rebuilds_total
Batches tried again | retries_total
# Ray nodes | collapsed; note=From Ray's own metrics, where Prometheus scrapes them too. All runs and everything else \
on the cluster.
Processors | node_cpu
Memory in use | node_memory
GPUs | node_gpu
GPU memory | node_gpu_memory
Network, received | node_received
Object store | node_object_store
"""


def _query(text: str, options: dict[str, str], alone: bool) -> Query:
    """Read one curve of a table; several without `as` are told apart by the names of their metrics."""
    named, _, name = text.partition(" as ")
    expression, unit = EXPRESSIONS.get(named) or (
        rate(named.removeprefix("rate ")) if named.startswith("rate ") else value(named),
        "",
    )
    unit = options.get("unit", unit)
    measured: Unit | None = (unit.partition(" ")[0], unit.partition(" ")[2]) if unit else None
    return Query(expression, name or ("" if alone else named), options.get("legend", ""), measured)


def _panel(line: str, row: dict[str, str]) -> Panel:
    title, curves, *rest = (cell.strip() for cell in line.split("|"))
    note, options = rest[0] if rest else "", row | _options(rest[1] if len(rest) > 1 else "")
    texts = curves.split(", ")
    queries = [_query(text, options, len(texts) == 1) for text in texts]
    kind: Any = options.get("kind", "timeseries")
    if kind == "xychart":  # x is repeated for each series of y
        x, y = queries
        if labels_of(y.expression) != ["run"]:
            repeated = f"(0 * {y.expression} + on (run) group_left () {x.expression})"
            queries[0] = Query(repeated, x.name, unit=x.unit)
    size = (4, 4) if kind == "stat" else (int(options.get("width", 8)), 8)
    bounds = (options["dashed"],) if "dashed" in options else ()
    return Panel(title, tuple(queries), note or options.get("note", ""), kind, *size, "stacked" in options, bounds)


def _options(text: str) -> dict[str, str]:
    return {name: given for name, _, given in (option.partition("=") for option in text.split("; "))}


def _dashboard(uid: str, title: str, description: str, table: str, many_runs: bool = True) -> Dashboard:
    rows: list[PanelRow] = []
    for part in table.split("\n# ")[1:]:
        head, *lines = part.strip().splitlines()
        name, _, text = (cell.strip() for cell in head.partition("|"))
        options = _options(text)
        panels = tuple(_panel(line, options) for line in lines if line)
        rows.append(PanelRow(name, panels, "collapsed" in options))
    return Dashboard(uid, title, description, tuple(rows), _EVENTS, many_runs)


_EVENTS = (
    Query(event("rebuilds_total"), "Learner and buffer rebuilt"),
    Query(event("workers_lost_total"), "Worker lost"),
)
DASHBOARDS = (
    _dashboard(
        "keel-run",
        "Keel: one run",
        "Is it over-optimizing, does it learn, what each role waits for, what went wrong.",
        _RUN,
        many_runs=False,
    ),
    _dashboard(
        "keel-compare", "Keel: runs compared", "The same curves of several runs, over KL, steps and time.", _COMPARE
    ),
    _dashboard(
        "keel-cluster",
        "Keel: cluster efficiency",
        "All runs together: which role works, what it waits for, tokens a second, what fails.",
        _CLUSTER,
    ),
)


def files() -> dict[str, str]:
    """Render the dashboards as files: name -> JSON that Grafana imports."""
    return {
        f"{dashboard.uid}.json": json.dumps(as_json(dashboard, DASHBOARDS), indent=2) + "\n" for dashboard in DASHBOARDS
    }
