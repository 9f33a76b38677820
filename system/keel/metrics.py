"""The one table of metrics: the Prometheus page, metrics.jsonl and `keel metrics` all come from it.

Actors return numbers; the driver records them here and serves one endpoint for the run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server

from keel import durable
from keel.settings import MetricsSettings

PREFIX = "keel_"
Values = Mapping[str, float | Mapping[str, float]]


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["gauge", "counter"]
    meaning: str
    label: str | None = None
    """Second label besides `run`; its values come from a fixed set of the configuration or the code."""
    operational: bool = False
    """Says how the run went, not what it computed: two equal runs may differ in it, and a rebuild does not undo it."""


def _gauges(*rows: tuple[str, str]) -> list[Metric]:
    return [Metric(name, "gauge", meaning) for name, meaning in rows]


def _counters(*rows: tuple[str, str]) -> list[Metric]:
    return [Metric(name, "counter", meaning) for name, meaning in rows]


def _operational(*rows: tuple[str, Literal["gauge", "counter"], str, str | None]) -> list[Metric]:
    return [Metric(*row, operational=True) for row in rows]


TABLE: list[Metric] = [
    *_gauges(
        ("version", "Weight version the generators hold."),
        (
            "reward",
            "Mean over the step's completions of the training reward (sum or ensemble), regularisers excluded.",
        ),
        ("reward_std", "Standard deviation of the reward over the step's completions."),
        ("regularised_reward", "Mean reward plus the regularisers that live in it: what the advantage is made of."),
        ("reward_kl_term", "Mean KL term inside the reward: minus coefficient times nats."),
        ("reward_entropy_term", "Mean entropy term inside the reward: coefficient times nats."),
        ("kl_nats", "Mean over completions of sum_t log pi_sampler - log pi_ref (k1, on every run)."),
        ("kl_k3_nats", "Mean over completions of sum_t k3, never negative."),
        ("entropy_nats", "Mean over completions of -log pi(y)/|y| under the sampler (sampled estimate)."),
        ("sequence_entropy_nats", "Mean over completions of -log pi(y) under the sampler (sampled estimate)."),
        ("policy_entropy_nats", "Mean over tokens of the learner's full-vocabulary entropy; absent when not computed."),
        ("length_tokens", "Mean completion length, end token included."),
        ("finished_ratio", "Share of completions that sampled an end token."),
        ("uniform_groups", "Groups of the step whose samples all have the same reward: no gradient."),
        ("shaping_term", "Mean change of the reward by length and missing end."),
        ("advantage_std", "Standard deviation of the advantages over the step's tokens, before whitening."),
        ("loss", "Loss of the step: all terms."),
        ("policy_loss", "Surrogate term of the loss."),
        ("kl_loss", "KL term of the loss, coefficient included; absent when none lives there."),
        ("kl_loss_nats", "The same without its coefficient, by its estimator and reduction."),
        ("entropy_loss", "Entropy bonus term of the loss; absent when none lives there."),
        ("kl_coefficient", "Coefficient of the KL term in force at the step."),
        ("entropy_coefficient", "Coefficient of the entropy term in force at the step."),
        ("safe_threshold_nats", "SAFE: KL per token that cost nothing, by PID and phase."),
        ("safe_gate", "SAFE: how much low entropy raised the cost."),
        ("safe_penalty", "SAFE: the penalty whose slope is the coefficient, reward units."),
        ("normaliser_mean", "Running mean of the reward (objective.normalise_reward)."),
        ("normaliser_std", "Running standard deviation of the reward (objective.normalise_reward)."),
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
        ("grad_norm", "Global gradient norm before clipping."),
        ("learning_rate", "Learning rate of the step."),
        ("clip_ratio", "Share of surrogate terms where the PPO clip was active."),
        ("clamped_log_ratios", "Exponents of log-ratios cut at +-20 nats in the step."),
        ("importance_weight", "Mean truncated importance weight learner/sampler."),
        ("truncated_weight_ratio", "Share of importance weights at their cap."),
        ("gap_nats", "Mean over tokens of |learner - sampler| log-prob at the start of the step."),
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
        "reward_component", "gauge", "Mean of each reward over the step's completions, monitors included.", "reward"
    ),
    Metric("objective_term", "gauge", "Regulariser terms and metrics of the user's own objective, by name.", "term"),
    Metric("critic_loss", "gauge", "Loss of each value head, coefficient included.", "head"),
    Metric("explained_variance", "gauge", "1 - var(target - value) / var(target) before the step.", "head"),
    Metric("value_mean", "gauge", "Mean predicted value of the step's states before the step.", "head"),
    Metric("popart_mean", "gauge", "PopArt: running mean of the head's targets.", "head"),
    Metric("popart_std", "gauge", "PopArt: running standard deviation of the head's targets.", "head"),
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
    Metric("rows_dropped_total", "counter", "Stages: rows of the source left out, by reason.", "reason"),
    Metric("pairs_dropped_total", "counter", "Pairs or prompts not compared, by reason.", "reason"),
    Metric("samples_failed_total", "counter", "Completions without a reward, by reason.", "reason"),
    Metric("groups_dropped_total", "counter", "Prompt groups given up, by reason.", "reason"),
    *_operational(
        ("weight_sync_bytes_total", "counter", "Bytes of weights loaded, all generators together.", None),
        ("retries_total", "counter", "Batches started again after a worker was lost.", None),
        ("workers_lost_total", "counter", "Generators or scorers that were replaced, by role.", "role"),
        (
            "rebuilds_total",
            "counter",
            "Times the learner and buffer were built again from the last commit.",
            None,
        ),
        ("workers", "gauge", "Workers that serve, by role; learner: ranks.", "role"),
        ("workers_desired", "gauge", "Workers that are wanted, by role.", "role"),
        ("progress_timestamp_seconds", "gauge", "Unix time at which a stage last finished something.", "stage"),
    ),
]
_BY_NAME = {metric.name: metric for metric in TABLE}


class RunMetrics:
    """Current value of every metric of one run; `record` closes a step and appends it to metrics.jsonl."""

    def __init__(self, run: str, path: Path) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.run = run
        self.path = path
        self._gauge_values: dict[str, Any] = {}
        self._operational: dict[str, Any] = {}
        self.totals: dict[str, Any] = {
            metric.name: {} if metric.label else 0.0 for metric in TABLE if metric.kind == "counter"
        }
        self._collectors = {metric.name: self._collector(metric) for metric in TABLE}

    def _collector(self, metric: Metric) -> Any:
        labels = _labels(metric)
        kind = Gauge if metric.kind == "gauge" else Counter
        collector = kind(PREFIX + metric.name, metric.meaning, labels, registry=self.registry)
        if not metric.label:
            collector.labels(self.run)  # the series exists from the start
        return collector

    def serve(self, settings: MetricsSettings) -> int:
        """Answer GET /metrics until the process ends; the port."""
        server, _ = start_http_server(settings.port, settings.host, registry=self.registry)
        return server.server_port

    def set(self, values: Values) -> None:
        """New values of gauges."""
        for name, value in values.items():
            assert _metric(name).kind == "gauge", name
            if _metric(name).operational:
                self._operational[name] = {**self._operational.get(name, {}), **dict(_by_label(value))}
            else:
                self._gauge_values[name] = value
            for label, number in _labelled(value):
                self._collectors[name].labels(self.run, *label).set(number)

    def add(self, values: Values) -> None:
        """Increments of counters."""
        for name, value in values.items():
            assert _metric(name).kind == "counter", name
            for label, number in _labelled(value):
                self._collectors[name].labels(self.run, *label).inc(number)
                if label:
                    self.totals[name][label[0]] = self.totals[name].get(label[0], 0.0) + number
                else:
                    self.totals[name] += number

    def restore(self, totals: Values) -> None:
        """Go on from the totals of a checkpoint, or from none: what was counted since is done again.

        Operational totals keep the larger value: what happened has happened. The endpoint counts what this process
        did, as Prometheus expects it of a process.
        """
        self._gauge_values = {}
        for metric in [metric for metric in TABLE if metric.kind == "counter"]:
            own, stored = (dict(_by_label(each.get(metric.name, {}))) for each in (self.totals, totals))
            if metric.operational:
                stored = {label: max(own.get(label, 0.0), stored.get(label, 0.0)) for label in {**own, **stored}}
            self.totals[metric.name] = stored if metric.label else stored.get("", 0.0)

    def record(self, step: int, time_seconds: float) -> dict[str, Any]:
        """Append the step: every metric under its name without the prefix, labelled ones as objects."""
        line = {"step": step, "time": time_seconds, **self._gauge_values, **self._operational, **self.totals}
        self._gauge_values = {}  # what the next step does not say is absent from its line, not repeated
        durable.append_json(self.path, line)
        return line


def _metric(name: str) -> Metric:
    if name not in _BY_NAME:
        raise KeyError(f"{name!r} is no metric of the table; one of your own belongs under objective_term")
    return _BY_NAME[name]


def _labels(metric: Metric) -> list[str]:
    return ["run", metric.label] if metric.label else ["run"]


def _labelled(value: float | Mapping[str, float]) -> Iterable[tuple[tuple[str, ...], float]]:
    if isinstance(value, Mapping):
        return [((label,), number) for label, number in value.items()]
    return [((), value)]


def _by_label(value: float | Mapping[str, float]) -> Mapping[str, float]:
    """A value without label under the empty one."""
    return value if isinstance(value, Mapping) else {"": value}


def gauges_of_step(report: Any, buffered: Any) -> dict[str, Any]:
    """Numbers of the learner and the buffer under their metric names; reward_<name> become one labelled metric."""
    numbers = {**report, **buffered}
    for name in ("trained_tokens", "rollout_bytes", "counts"):
        del numbers[name]
    own = {"reward_std", "reward_kl_term", "reward_entropy_term"}
    components = {name: numbers.pop(name) for name in list(numbers) if name.startswith("reward_") and name not in own}
    return numbers | {"reward_component": {name.removeprefix("reward_"): value for name, value in components.items()}}


def unlabelled(values: Mapping[str, float]) -> float | Mapping[str, float]:
    """A counter without label travels under the empty one."""
    return values.get("", values)


def reference_table() -> str:
    """The metrics as a Markdown table, for `keel metrics` and the documentation."""
    rows = [
        f"| `{PREFIX}{metric.name}` | {metric.kind} | {', '.join(_labels(metric))} | {metric.meaning} |"
        for metric in TABLE
    ]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])
