"""The dashboard of one run. Its rows of curves are also those in which runs are compared."""

from keel.observability.panels import Dashboard, Panel, Query, Row
from keel.observability.promql import COUNT, SECONDS, Expression, Unit, age, events, gauge, peak, rate, slope, total


def curves(title: str, *names: str, note: str = "", unit: Unit | None = None) -> Panel:
    """The curves of some gauges, each under its own name; of one alone under its labels."""
    found = [gauge(name) if unit is None else gauge(name).in_unit(unit) for name in names]
    shown = names if len(names) > 1 else ("",)
    return Panel(title, tuple(Query(each, name) for each, name in zip(found, shown, strict=True)), note)


def counted(title: str, *names: str, note: str = "") -> Panel:
    """What some counters counted since the run's process started."""
    shown = names if len(names) > 1 else ("",)
    return Panel(title, tuple(Query(total(name), shown_as) for name, shown_as in zip(names, shown, strict=True)), note)


def against(title: str, x: Query, y: Query, note: str = "") -> Panel:
    """One number over another, a curve for each of y's series; x is a number a run."""
    repeated = Query(x.expression.each(y.expression), x.name)
    return Panel(title, (repeated, y), note, kind="xychart")


def stat(title: str, *queries: Query, note: str = "", width: int = 4) -> Panel:
    return Panel(title, queries, note, kind="stat", width=width, height=4)


def fall_from_peak() -> Expression:
    """How far each reward is below the largest value that is shown."""
    return peak("reward_component") - gauge("reward_component")


STEP = gauge("version")
EVENTS = (
    Query(events("rebuilds_total"), "Learner and buffer rebuilt"),
    Query(events("workers_lost_total"), "Worker lost"),
)
ROOT_KL = Query(gauge("kl_nats").root(), "sqrt(KL)")
OVER_OPTIMIZATION = (
    curves("Reward", "reward", "regularized_reward"),
    curves(
        "Rewards by name",
        "reward_component",
        note="A monitor (gold) that turns down while the training reward goes up: over-optimization.",
    ),
    curves("KL from the reference", "kl_nats", "kl_k3_nats", note="What the reward was bought with."),
    against("Rewards over sqrt(KL)", ROOT_KL, Query(gauge("reward_component"), "Reward")),
    curves("Entropy per token", "entropy_nats", "policy_entropy_nats", note="Towards 0: the policy repeats itself."),
    curves("Entropy per completion", "sequence_entropy_nats"),
    curves(
        "Completion length",
        "length_tokens",
        "sampled_length_tokens",
        note="The cheapest way to a reward that likes long answers.",
    ),
    curves("Completions with an end token", "finished_ratio"),
    Panel(
        "Fall from the peak",
        (Query(fall_from_peak()),),
        "How far each reward is below its largest value in the time that is shown.",
    ),
)
LEARNING = (
    curves("Loss", "loss", "policy_loss", "kl_loss", "log_ratio_loss", "entropy_loss"),
    curves("Gradient norm", "grad_norm"),
    curves("Learning rate", "learning_rate", unit=Unit("sci")),
    curves("Clipped and truncated", "clip_ratio", "truncated_weight_ratio"),
    curves("Coefficients", "kl_coefficient", "entropy_coefficient"),
    curves(
        "Gap between learner and sampler",
        "gap_nats",
        "fresh_gap_nats",
        note="Large: the sampler does not hold what is trained.",
    ),
    curves("Importance weight", "importance_weight"),
    curves("Spread", "reward_std", "advantage_std"),
    curves("Terms inside the reward", "reward_kl_term", "reward_entropy_term", "shaping_term"),
    curves("KL term without its coefficient", "kl_loss_nats", "log_ratio_loss_nats"),
    curves("Lost signal", "uniform_groups", "clamped_log_ratios"),
    curves("Terms by name", "objective_term"),
)
_WORKERS = Unit("none", "workers")
PIPELINE = (
    Panel(
        "What the learn loop does",
        (Query(rate("phase_seconds_total")),),
        "Share of time by phase. In `rollouts` the learner waits for them.",
        stacked=True,
    ),
    Panel("Workers at work", (Query(rate("busy_seconds_total").in_unit(_WORKERS)),), "Mean number by role."),
    Panel(
        "Workers that wait, and for whom",
        (Query(rate("idle_seconds_total").in_unit(_WORKERS), legend="{{role}} for {{on}}"),),
        "Mean number. The one who is waited for needs more workers.",
        stacked=True,
    ),
    Panel(
        "Batches in line",
        (Query(rate("queue_seconds_total").in_unit(COUNT), "mean"), Query(gauge("batches_waiting"), "now")),
        "By the role they wait for.",
    ),
    Panel(
        "Staleness",
        (
            Query(gauge("staleness_mean_versions"), "mean"),
            Query(gauge("staleness_max_versions"), "max"),
            Query(gauge("max_staleness_versions"), "bound"),
        ),
        bounds=("bound",),
    ),
    curves("Weight versions", "learner_version", "version", note="How far the generators are behind the learner."),
    curves("Groups in the buffer", "buffer_groups"),
    curves("Bytes in the buffer", "buffer_bytes"),
    curves("Seconds of a step", "step_seconds", "wait_seconds", "weight_sync_seconds", "buffer_age_seconds"),
    Panel(
        "Tokens a second",
        (
            Query(rate("completion_tokens_total"), "sampled"),
            Query(rate("trained_tokens_total"), "trained"),
            Query(gauge("generate_tokens_per_second"), "per busy generator"),
        ),
        "Counted once a step: spikes where a step takes longer than the window of the rate.",
    ),
    Panel(
        "Bytes a second",
        (Query(rate("weight_sync_bytes_total"), "weights"), Query(rate("rollout_bytes_total"), "rollouts")),
    ),
    curves("Free memory", "free_memory_bytes"),
)
RELIABILITY = (
    Panel(
        "Workers",
        (Query(gauge("workers"), "present"), Query(gauge("workers_desired"), "wanted")),
        bounds=("wanted",),
    ),
    counted("Workers lost", "workers_lost_total", "load_failures_total"),
    counted("Built again, tried again", "rebuilds_total", "retries_total"),
    counted("Failures of trackers", "tracker_failures_total", note="Lines that did not arrive; the run went on."),
    counted("Samples without a reward", "samples_failed_total", note="By reason."),
    counted("Groups given up", "groups_dropped_total", note="By reason."),
    counted("Samples accepted", "samples_accepted_total"),
    Panel(
        "Time since a stage finished something",
        (Query(age("progress_timestamp_seconds")),),
        "The stage that climbs alone is the one that hangs.",
    ),
    Panel(
        "Age of the last checkpoint",
        (Query(age("progress_timestamp_seconds", stage="checkpoint")),),
        "What a crash now would cost. Nothing before the first checkpoint of the run's process.",
    ),
    counted("Checkpoints and evaluations", "checkpoints_total", "evaluations_total"),
)
PREFERENCES = (
    curves("Preference loss", "preference_loss"),
    curves("Pairs", "pairs"),
    curves("Implicit rewards", "chosen_implicit_reward", "rejected_implicit_reward", "implicit_margin"),
    curves("Pairs in the right order", "preference_accuracy_ratio", "held_out_accuracy_ratio"),
    curves(
        "Log-probability", "chosen_logprob_nats", "rejected_logprob_nats", note="Both falling: mass goes elsewhere."
    ),
    curves("Log-ratio to the reference", "chosen_log_ratio_nats", "rejected_log_ratio_nats"),
    curves(
        "Stored completions", "stored_logprob_nats", "stored_log_ratio_nats", note="The policy did not sample them."
    ),
    curves("Stored completions, per token", "stored_token_logprob_nats", "teacher_forced_entropy_nats"),
    curves("Disagreement of the ensemble", "pair_disagreement"),
    curves("Prompts on which the ensemble agrees", "settled_ratio"),
    curves("Completions that may be best", "plausible_completions"),
    counted("Pairs left out", "pairs_dropped_total", note="By reason."),
)
OTHERS = (
    curves("Value loss", "critic_loss"),
    curves("Explained variance", "explained_variance"),
    curves("Values", "value_mean"),
    curves("PopArt", "popart_mean", "popart_std"),
    curves("Normalized reward", "normalizer_mean", "normalizer_std"),
    curves("SAFE: threshold", "safe_threshold_nats"),
    curves("SAFE: gate and penalty", "safe_gate", "safe_penalty"),
    curves("Likelihood weights: effective samples", "effective_samples"),
    curves("Completions with a weight", "accepted_ratio"),
    curves("Reward of the best completion", "best_reward"),
    curves("KL of best-of-n", "best_of_n_kl_nats"),
    curves("Held-out loss", "held_out_loss"),
    curves("Passes over the training rows", "epochs"),
    counted("Rows left out", "rows_dropped_total", note="By reason."),
)
STEPS_LEFT = gauge("steps_wanted") - STEP
NOW = (
    stat("Step", Query(STEP, "done"), Query(gauge("steps_wanted"), "of"), note="Steps, one weight version each."),
    stat(
        "Time left",
        Query((STEPS_LEFT / slope("version").above_zero()).in_unit(SECONDS)),
        note="Steps left over the steps a second of the last hour; nothing while none is taken.",
    ),
    stat("Reward now", Query(gauge("reward"))),
    stat("KL now", Query(gauge("kl_nats").in_unit(Unit("suffix:nats")))),
    stat("Entropy now", Query(gauge("entropy_nats").in_unit(Unit("suffix:nats")))),
    stat("Tokens a second, all generators", Query(rate("completion_tokens_total"))),
)
RUN = Dashboard(
    "keel-run",
    "Keel: one run",
    "Is it over-optimizing, does it learn, who waits for whom, what went wrong.",
    (
        Row("Now", NOW),
        Row("Over-optimization", OVER_OPTIMIZATION),
        Row("Learning", LEARNING),
        Row("Pipeline", PIPELINE),
        Row("Reliability", RELIABILITY),
        Row("Preferences", PREFERENCES, collapsed=True),
        Row("Critics, SAFE, weighted likelihood, offline stages", OTHERS, collapsed=True),
    ),
    EVENTS,
    many_runs=False,
)
