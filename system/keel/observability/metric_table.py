"""The one table of metrics: the Prometheus page, metrics.jsonl and `keel metrics` come from it.

Tests hold dashboards.py and the rules in deploy/prometheus/rules to its names. The number itself is computed where it
arises: rewards and KL in diagnostics.py, losses in algorithms/ and learner/, times and counts in online/ and cluster/.

It imports nothing heavy: dashboards are rendered without a run.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "keel_"


Section = Literal["train", "rollout", "reward", "perf"]
_SECTIONS: dict[Section, str] = {
    "reward": """
        reward reward_std regularized_reward reward_kl_term reward_entropy_term reward_component shaping_term
        normalizer_mean normalizer_std best_reward reward_length_correlation reward_tail_index reward_correlation
    """,
    "rollout": """
        kl_nats kl_k3_nats entropy_nats sequence_entropy_nats stored_logprob_nats stored_token_logprob_nats
        stored_log_ratio_nats length_tokens sampled_length_tokens finished_ratio repetition_ratio reference_nll_nats
        template_overlap compression_ratio reference_importance_mass reference_effective_sample_ratio uniform_groups
        staleness_mean_versions staleness_max_versions buffer_groups completion_tokens_total samples_accepted_total
        rows_dropped_total pairs_dropped_total samples_failed_total groups_dropped_total
    """,
    "perf": """
        buffer_bytes buffer_age_seconds micro_batches weight_sync_seconds step_seconds wait_seconds
        generate_tokens_per_second free_memory_bytes generate_seconds_total score_seconds_total
        learner_seconds_total weight_syncs_total rollout_bytes_total
    """,
}
"""Sections of experiment trackers; operational metrics are in `perf`, too, and all others in `train`."""


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["gauge", "counter"]
    meaning: str
    labels: tuple[str, ...] = ()
    """Labels besides `run`; their values come from a fixed set of the configuration or the code. Numbers travel under
    their values joined by `/`."""
    operational: bool = False
    """Whether it measures how the run went, not its result: equal runs may differ in it, a rebuild does not undo it."""

    @property
    def section(self) -> Section:
        """The group in which experiment trackers show the metric."""
        listed = (section for section, names in _SECTIONS.items() if self.name in names.split())
        return next(listed, "perf" if self.operational else "train")


def _gauges(*rows: tuple[str, str]) -> list[Metric]:
    return [Metric(name, "gauge", meaning) for name, meaning in rows]


def _counters(*rows: tuple[str, str]) -> list[Metric]:
    return [Metric(name, "counter", meaning) for name, meaning in rows]


def _operational(*rows: tuple[str, Literal["gauge", "counter"], str, tuple[str, ...]]) -> list[Metric]:
    return [Metric(*row, operational=True) for row in rows]


TABLE: list[Metric] = [
    *_gauges(
        ("version", "Weight version the generators hold."),
        ("reward", "Mean over the step's completions of the training reward (sum or ensemble), regularizers excluded."),
        ("reward_std", "Standard deviation of the reward over the step's completions."),
        ("regularized_reward", "Mean reward plus the regularizers that live in it: what the advantage is made of."),
        ("reward_kl_term", "Mean KL term inside the reward: minus coefficient times nats."),
        (
            "reward_entropy_term",
            "Mean entropy term inside the reward: coefficient times nats (sequence_mean_exact: less coefficient/|y|).",
        ),
        ("kl_nats", "Mean over sampled completions of sum_t log pi_sampler - log pi_ref (k1, on every run)."),
        ("kl_k3_nats", "Mean over sampled completions of sum_t k3, never negative."),
        (
            "kl_exact_nats",
            "Mean over regularizer.kl.exact_share of the sampled completions of sum_t KL(pi, ref) over the vocabulary,"
            " pi before the step's update.",
        ),
        ("entropy_nats", "Mean over sampled completions of -log pi(y)/|y| under the sampler (sampled estimate)."),
        ("sequence_entropy_nats", "Mean over sampled completions of -log pi(y) under the sampler (sampled estimate)."),
        (
            "policy_entropy_nats",
            "Mean over sampled tokens of the learner's full-vocabulary entropy; absent when not computed.",
        ),
        (
            "clamped_policy_entropy_nats",
            "Mean over sampled tokens of the learner's entropy among its likeliest tokens (entropy.top_share).",
        ),
        ("stored_logprob_nats", "Mean over stored completions of log pi(y), summed over tokens."),
        ("stored_token_logprob_nats", "Mean over stored completions of log pi(y)/|y|."),
        (
            "stored_log_ratio_nats",
            "Mean over stored completions of log pi(y) - log pi_ref(y): no KL, for the policy did not sample them.",
        ),
        ("teacher_forced_entropy_nats", "As policy_entropy_nats, over the tokens of stored completions."),
        ("clamped_teacher_forced_entropy_nats", "As clamped_policy_entropy_nats, over those of stored completions."),
        ("length_tokens", "Mean completion length, end token included."),
        ("sampled_length_tokens", "The same of the sampled completions, in steps that also have stored ones."),
        ("finished_ratio", "Share of completions that sampled an end token."),
        ("repetition_ratio", "Mean over completions of 1 - distinct / all 3-grams of their tokens."),
        ("reference_nll_nats", "Mean over completions of -log pi_ref(y)/|y|."),
        ("template_overlap", "Mean Jaccard overlap of the 3-grams of completions of different prompts."),
        ("compression_ratio", "Bytes of the step's completions over their bytes after zlib."),
        ("reward_length_correlation", "Correlation of the training reward with the completion's length."),
        (
            "reward_tail_index",
            "Hill's estimate of the reward's upper tail over the step: near 0 light, above 0.5 heavy.",
        ),
        ("reference_importance_mass", "Mean over sampled completions of pi_ref(y)/pi(y): below 1 where mass was lost."),
        ("reference_effective_sample_ratio", "(sum w)^2 / (n sum w^2) of these weights."),
        (
            "uniform_groups",
            "Groups of two or more samples that all have the same reward, but for rounding: no gradient.",
        ),
        ("shaping_term", "Mean change of the reward by length and missing end."),
        ("advantage_std", "Standard deviation of the advantages over the step's tokens, before whitening."),
        ("loss", "Loss of the step: all terms."),
        ("policy_loss", "Surrogate term of the loss."),
        ("kl_loss", "KL term of the loss, coefficient included; absent when none lives there."),
        ("kl_loss_nats", "The same without its coefficient, by its estimator and reduction."),
        ("log_ratio_loss", "What the KL term of the loss is on stored completions: no KL, a penalty on log-ratios."),
        ("log_ratio_loss_nats", "The same without its coefficient, by its estimator and reduction."),
        ("entropy_loss", "Entropy bonus term of the loss; absent when none lives there."),
        ("kl_coefficient", "Coefficient of the KL term in force at the step."),
        ("entropy_coefficient", "Coefficient of the entropy term in force at the step."),
        ("safe_threshold_nats", "SAFE: KL per token that cost nothing, by PID and phase."),
        ("safe_gate", "SAFE: how much low entropy raised the cost."),
        ("safe_penalty", "SAFE: the penalty whose slope is the coefficient, reward units."),
        ("normalizer_mean", "Running mean of the reward (objective.normalize_reward)."),
        ("normalizer_std", "Running standard deviation of the reward (objective.normalize_reward)."),
        ("preference_loss", "Mean loss of the step's pairs or rankings, likelihood term included."),
        ("pairs", "Pairs the step trained on."),
        ("chosen_implicit_reward", "Mean beta * score of the chosen completions."),
        ("rejected_implicit_reward", "Mean beta * score of the rejected completions."),
        ("implicit_margin", "Mean difference of these, chosen minus rejected."),
        ("preference_accuracy_ratio", "Share of pairs in which the chosen completion has the larger implicit reward."),
        ("chosen_logprob_nats", "Mean log pi(chosen), summed over tokens."),
        ("rejected_logprob_nats", "Mean log pi(rejected), summed over tokens."),
        ("chosen_log_ratio_nats", "Mean log pi - log ref of the chosen completions, also where no loss reads ref."),
        ("rejected_log_ratio_nats", "The same of the rejected completions."),
        ("plausible_completions", "Completions of a prompt that some member of the reward ensemble holds best."),
        ("settled_ratio", "Share of prompts whose ensemble agrees on the best completion."),
        ("pair_disagreement", "Mean spread of the members' margins on the queried pairs, reward units."),
        ("effective_samples", "Mean over prompts of (sum w)^2 / sum w^2 of the likelihood weights."),
        ("accepted_ratio", "Share of completions with a weight above 0."),
        ("best_reward", "Mean over prompts of the best completion's reward."),
        ("best_of_n_kl_nats", "KL of best-of-n from the policy, n samples a prompt: log n - (n-1)/n."),
        ("held_out_loss", "Stages: loss on the held-out rows at the last evaluation."),
        ("held_out_accuracy_ratio", "Stages: share of held-out pairs in the right order at the last evaluation."),
        ("epochs", "Stages: passes over the training rows so far."),
        ("guard_kl_multiplier", "The guard's factor in kl_coefficient at the step (raise_kl)."),
        ("guard_learning_rate_multiplier", "The guard's factor in learning_rate at the step (lower_lr)."),
        ("grad_norm", "Global gradient norm before clipping."),
        ("learning_rate", "Learning rate of the step."),
        ("clip_ratio", "Share of surrogate terms where the PPO clip was active."),
        ("clamped_log_ratios", "Exponents of log-ratios cut at +-20 nats in the step."),
        ("importance_weight", "Mean truncated importance weight learner/sampler."),
        ("covariance_selected_ratio", "Share of tokens that KL-Cov penalizes or Clip-Cov cuts."),
        ("truncated_weight_ratio", "Share of importance weights at their cap."),
        ("gap_nats", "Mean over tokens of |learner - sampler| log-prob at the start of the step."),
        ("fresh_gap_nats", "The same over tokens that the version under training sampled; parity.max_step_gap_nats."),
        ("staleness_mean_versions", "Mean over the step's tokens of versions behind the learner."),
        ("staleness_max_versions", "Largest number of versions a token of the step was behind."),
        ("buffer_groups", "Groups waiting in the buffer after the step's were taken."),
        ("buffer_bytes", "Bytes of rows waiting in the buffer."),
        ("buffer_age_seconds", "Age of the oldest group of the step when it was taken."),
        ("micro_batches", "Passes through the model of one rank in one update."),
        ("weight_sync_seconds", "Publish and load of the newest weights, until the last generator proved them."),
        ("step_seconds", "Learner step, without waiting."),
        ("wait_seconds", "Learner waiting for the step's rollouts."),
        ("generate_tokens_per_second", "Completion tokens of the step over the generators' busy seconds."),
        ("free_memory_bytes", "Available memory of the driver's machine."),
    ),
    Metric(
        "reward_component", "gauge", "Mean of each reward over the step's completions, monitors included.", ("reward",)
    ),
    Metric(
        "reward_correlation",
        "gauge",
        "Correlation of the training reward with each reward, monitors included.",
        ("reward",),
    ),
    Metric("objective_term", "gauge", "Regularizer terms and metrics of the user's own objective, by name.", ("term",)),
    Metric("critic_loss", "gauge", "Loss of each value head, coefficient included.", ("head",)),
    Metric("explained_variance", "gauge", "1 - var(target - value) / var(target) before the step.", ("head",)),
    Metric("value_mean", "gauge", "Mean predicted value of the step's states before the step.", ("head",)),
    Metric("popart_mean", "gauge", "PopArt: running mean of the head's targets.", ("head",)),
    Metric("popart_std", "gauge", "PopArt: running standard deviation of the head's targets.", ("head",)),
    *_counters(
        ("steps_total", "Optimizer steps taken."),
        ("completion_tokens_total", "Completion tokens sampled, or read where completions were stored."),
        ("samples_accepted_total", "Completions that entered the buffer, of the tickets up to the step's last."),
        ("trained_tokens_total", "Completion tokens the learner trained on."),
        ("generate_seconds_total", "Seconds generators were busy sampling."),
        ("score_seconds_total", "Seconds scorers were busy."),
        ("learner_seconds_total", "Seconds the learner was busy with steps."),
        ("weight_syncs_total", "Weight loads proved by all generators."),
        ("rollout_bytes_total", "Bytes of rollout files written."),
        ("evaluations_total", "Evaluations on the held-out prompts."),
        ("checkpoints_total", "Checkpoints committed."),
    ),
    Metric("guard_fired_total", "counter", "Times a detector of the guard fired.", ("detector",)),
    Metric("rows_dropped_total", "counter", "Stages: rows of the source left out, by reason.", ("reason",)),
    Metric("pairs_dropped_total", "counter", "Pairs or prompts not compared, by reason.", ("reason",)),
    Metric("samples_failed_total", "counter", "Completions without a reward, by reason.", ("reason",)),
    Metric("groups_dropped_total", "counter", "Prompt groups given up, by reason.", ("reason",)),
    *_operational(
        ("weight_sync_bytes_total", "counter", "Bytes of weights loaded, all generators together.", ()),
        ("retries_total", "counter", "Batches started again after a worker was lost.", ()),
        ("workers_lost_total", "counter", "Generators, references or scorers that were replaced, by role.", ("role",)),
        ("rebuilds_total", "counter", "Times the learner and buffer were built again from the last commit.", ()),
        ("learner_version", "gauge", "Weight version of the learner; ahead of keel_version until it is loaded.", ()),
        ("max_staleness_versions", "gauge", "Bound on staleness: buffer.max_staleness.", ()),
        ("steps_wanted", "gauge", "Optimizer steps the run is to take: run.steps.", ()),
        ("busy_seconds_total", "counter", "Seconds that workers of a role worked, all of them together.", ("role",)),
        (
            "idle_seconds_total",
            "counter",
            "Seconds that serving workers of a role had nothing to do, all of them together, by what they waited for.",
            ("role", "on"),
        ),
        ("queue_seconds_total", "counter", "Seconds that batches waited for a worker of a role.", ("role",)),
        ("batches_waiting", "gauge", "Batches that wait for a worker of a role.", ("role",)),
        ("phase_seconds_total", "counter", "Seconds of the learn loop, by what it was doing.", ("phase",)),
        ("load_failures_total", "counter", "Weight loads that a worker did not prove; it was replaced.", ("role",)),
        ("workers", "gauge", "Workers that serve, by role; learner: ranks.", ("role",)),
        ("workers_desired", "gauge", "Workers that are wanted, by role.", ("role",)),
        (
            "tracker_failures_total",
            "counter",
            "Steps and evaluations that an experiment tracker did not take; the run went on.",
            ("tracker",),
        ),
        ("progress_timestamp_seconds", "gauge", "Unix time at which a stage last finished something.", ("stage",)),
    ),
]


def reference_table() -> str:
    """The metrics as a Markdown table, for `keel metrics` and the documentation."""
    rows = [
        f"| `{PREFIX}{metric.name}` | {metric.kind} | {', '.join(('run', *metric.labels))} | {metric.meaning} |"
        for metric in TABLE
    ]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])
