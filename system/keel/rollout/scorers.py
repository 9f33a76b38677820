"""The reward scorer: computes every reward of a completion. A new kind of reward is an entry of `_SCORERS`
and of `kind` in config/rewards.py; kind `rule` is a function of the user's (reward_functions.py).

A sample is scored or failed with a reason; a failure is a null, never a number. Functions follow TRL's reward
signature `function(prompts, completions, completion_ids, **columns) -> list[float | None]`.
"""

import functools
import inspect
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from keel import schema, user_code
from keel.algorithms import reward_ensembles
from keel.config.rewards import RELEVANCE, EnsembleSettings, RewardSettings
from keel.config.workers import ScorerSettings
from keel.protocols import StageReceipt
from keel.rollout import http_rewards, row_columns, stored_completions
from keel.rollout.dataset_layouts import ANSWERS
from keel.rollout.reward_functions import LATE, Calls, EventLoop, Late, Outcome, WrongAnswer

Values = Sequence[float | None]
Failure = str
"""Why a reward could not be computed: a short fixed word, it becomes a metric label."""
_LABEL_CHARACTERS = 64
_SHARE_OF_DEADLINE = 0.9
"""Of the time for a batch, how much async functions have: behind it the scorer itself would be given up."""


class RewardScorer:
    """Appends every configured reward, the one the objective sees, and why a sample has none."""

    def __init__(
        self,
        rewards: Sequence[RewardSettings],
        ensemble: EnsembleSettings,
        settings: ScorerSettings,
        name: str,
        seconds: float = 600,
    ) -> None:
        """`seconds`: the deadline of a call from outside; async functions end before it, or their samples fail."""
        self.name = name
        self.ensemble = ensemble
        self.rewards = rewards
        spread = [spread_names(reward, num_members(reward)) for reward in rewards]
        columns = [name for reward, names in zip(rewards, spread, strict=True) for name in (reward.name, *names)]
        self.adds = pa.schema([schema.reward_field(name) for name in columns] + list(schema.SCORE))
        self._functions = {reward.name: load_function(reward) for reward in rewards if reward.kind == "rule"}
        self._seconds = _SHARE_OF_DEADLINE * seconds
        self._loop = EventLoop()
        self._compute = {
            reward.name: _SCORERS[reward.kind](reward, settings) for reward in rewards if reward.kind != "rule"
        }

    def score(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, StageReceipt]:
        """A failed training reward fails the sample; a failed judge or monitor is a null and is counted too."""
        started = time.monotonic()
        members: list[np.ndarray] = []
        failure: list[str | None] = [None] * batch.num_rows
        columns: dict[str, Any] = {}
        failures: Counter[str] = Counter()
        results = self._results(batch)
        for reward in self.rewards:
            result = results[reward.name]
            if isinstance(result, np.ndarray):
                columns |= _spread(reward, result)
                result = of_members(reward, result, batch.column("ticket").to_numpy()).tolist()
            values, reasons = checked(reward.name, result, batch.num_rows)
            columns[f"reward_{reward.name}"] = pa.array(values, pa.float32(), mask=np.isnan(values))
            failures.update(reason for reason in reasons if reason)
            if reward.role == "train":
                members.append(values)
                failure = [earlier or new for earlier, new in zip(failure, reasons, strict=True)]
        weights = np.array([reward.weight for reward in self.rewards if reward.role == "train"])
        total = np.nan_to_num(_combined(np.stack(members), weights, self.ensemble, batch.column("ticket").to_numpy()))
        for row in np.flatnonzero(np.abs(total) > np.finfo(np.float32).max):
            failure[row] = failure[row] or "sum_not_finite"
        failed = np.array([reason is not None for reason in failure])
        seconds = time.monotonic() - started
        columns |= {
            "reward": pa.array(total, pa.float32(), mask=failed),
            "failure": failure,
            "score_seconds": [seconds] * batch.num_rows,
            "scorer": ["+".join(reward.name for reward in self.rewards)] * batch.num_rows,
        }
        scored = schema.append(batch, schema.build(self.adds, columns))
        return scored, StageReceipt(batch.num_rows, 0, seconds, self.name, dict(failures))

    def _results(self, batch: pa.RecordBatch) -> dict[str, Values | Failure | np.ndarray]:
        """Compute every reward of the batch; async functions run while all the others are computed."""
        functions = {name: with_measurements(function, batch) for name, function in self._functions.items()}
        calls = Calls(functions, lambda: arguments(batch), self._loop, self._seconds)
        results: dict[str, Values | Failure | np.ndarray] = {
            name: compute(batch) for name, compute in self._compute.items()
        }
        return results | {name: values_or_reason(outcome) for name, outcome in calls.finish().items()}


def num_members(reward: RewardSettings) -> int:
    """Models behind a reward: 1, or the members of an ensemble folder."""
    if reward.kind != "model":
        return 1
    from keel.learner import loading, reward_models

    setting = f"rewards.{reward.name}.source"
    return len(reward_models.members(loading.locate(reward.source, setting), setting))


def spread_names(reward: RewardSettings, members: int) -> list[str]:
    """Names of the further columns of an ensemble's reward; one model has no spread."""
    return [f"{reward.name}_{what}" for what in schema.SPREAD] if members > 1 else []


def _spread(reward: RewardSettings, members: np.ndarray) -> dict[str, pa.Array]:
    """Mean, deviation and minimum of an ensemble's members [M, rows], as columns beside the reward."""
    statistics = (members.mean(0), members.std(0), members.min(0)) if len(members) > 1 else ()
    columns = zip(spread_names(reward, len(members)), statistics, strict=True)
    return {f"reward_{name}": pa.array(values, pa.float32(), mask=np.isnan(values)) for name, values in columns}


def of_members(reward: RewardSettings, members: np.ndarray, tickets: np.ndarray) -> np.ndarray:
    """The reward [rows] of an ensemble's members [M, rows], as `rewards.NAME.ensemble` says; NaN where one has none."""
    known = ~np.isnan(members).any(0)
    rewards = np.full(members.shape[1], np.nan)
    rewards[known] = _combined(members[:, known], np.ones(len(members)), reward.ensemble, tickets[known])
    return rewards


def _combined(members: np.ndarray, weights: np.ndarray, config: EnsembleSettings, tickets: np.ndarray) -> np.ndarray:
    """One reward [rows] of several [M, rows]: their weighted sum, or an ensemble's estimate."""
    centered = reward_ensembles.center(members, tickets) if config.center else None
    return reward_ensembles.combine(members, weights, config.form, config.coefficient, centered)


def checked(name: str, result: Values | Failure, rows: int) -> tuple[np.ndarray, list[str | None]]:
    """float64 [rows] with NaN for failed samples, and the reason of each failure.

    Raises ValueError when there are not as many values as rows: nothing can be said about which is whose.
    """
    if isinstance(result, str):
        return np.full(rows, np.nan), [f"{name}_{result}"] * rows
    if len(result) != rows:
        raise ValueError(f"reward {name}: {len(result)} values for {rows} completions; expected one for each")
    values = np.array([math.nan if value is None else float(value) for value in result])
    values[np.abs(values) > np.finfo(np.float32).max] = math.inf  # the column is float32
    reasons = [
        None if math.isfinite(value) else f"{name}_{'none' if given is None else 'not_finite'}"
        for given, value in zip(result, values, strict=True)
    ]
    return np.where(np.isfinite(values), values, math.nan), reasons


def arguments(batch: pa.RecordBatch) -> dict[str, Any]:
    """Keyword arguments of a reward function: TRL's names, and every further column of the prompt source.

    A column of one of TRL's names is not handed on: the name means what was sampled.
    """
    further = [row_columns.from_json(row) for row in batch.column("prompt_columns").to_pylist()]
    names = [name for name in (further[0] if further else {}) if name != ANSWERS]
    return {name: [row[name] for row in further] for name in names} | {
        "prompts": batch.column("prompt").to_pylist(),
        "completions": batch.column("completion").to_pylist(),
        "completion_ids": batch.column("completion_tokens").to_pylist(),
    }


def measured_by_reference(function: Callable[..., Any]) -> list[str]:
    """The parameters of a reward function that the reference policy's measurements are given to.

    reference_logprobs: nats a token, a list a completion. relevance_nats: a number or None a completion.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # a built-in function without a signature
        return []
    return [name for name in (*schema.REFERENCE.names, *schema.RELEVANCE.names) if name in parameters]


def with_measurements(function: Callable[..., Any], batch: pa.RecordBatch) -> Callable[..., Any]:
    """The function with the measurements of the batch that it reads."""
    names = [name for name in measured_by_reference(function) if name in batch.schema.names]
    return functools.partial(function, **{name: batch.column(name).to_pylist() for name in names})


def load_function(reward: RewardSettings) -> Callable[..., Any]:
    """The function of a rule. Raises ConfigError."""
    return user_code.import_symbol(reward.source, f"rewards.{reward.name}.source")


def values_or_reason(outcome: Outcome) -> Values | Failure:
    """The numbers of a function, or one word: `timeout`, `not_numbers`, or the name of what it raised."""
    if isinstance(outcome, list):
        return outcome
    if isinstance(outcome, Late | WrongAnswer):
        return LATE if isinstance(outcome, Late) else "not_numbers"
    name = type(outcome).__name__  # whatever the code, and what it called, made of it
    return name if len(name) <= _LABEL_CHARACTERS and name.isascii() and name.isidentifier() else "Exception"


def _reference(reward: RewardSettings, settings: ScorerSettings) -> Callable[[pa.RecordBatch], Values | Failure]:
    """Mean log-prob of a completion's tokens under the reference, nats: sees word salad that rewards miss.

    `relevance`: minus the same given another prompt: sees one answer to every question, which fluency misses.
    """
    if reward.source == RELEVANCE:
        return lambda batch: batch.column("relevance_nats").to_pylist()

    def compute(batch: pa.RecordBatch) -> Values:
        values, lengths = schema.ragged(batch, "reference_logprobs")
        return (schema.row_sums(values, lengths) / lengths).tolist()

    return compute


def _http(reward: RewardSettings, settings: ScorerSettings) -> Callable[[pa.RecordBatch], Values | Failure]:
    call = http_rewards.caller(reward, f"rewards.{reward.name}.source")
    return lambda batch: call(row_columns.for_http(arguments(batch)), batch.num_rows)


def _model(reward: RewardSettings, settings: ScorerSettings) -> Callable[[pa.RecordBatch], np.ndarray]:
    """Scores [members, rows] of a reward-model folder; its own text form, offset and ensemble (reward_models.py)."""
    import torch

    from keel.learner import loading, reward_models

    torch.set_num_threads(settings.threads)
    setting = f"rewards.{reward.name}.source"
    folder, options = loading.locate(reward.source, setting), reward.chat_template_options
    ensemble = reward_models.Ensemble(folder, setting, "cuda" if settings.gpus else "cpu", options, settings.dtype)
    return lambda batch: ensemble.scores(reward_models.from_batch(batch), settings.tokens_per_batch)


def _stored(reward: RewardSettings, settings: ScorerSettings) -> Callable[[pa.RecordBatch], Values | Failure]:
    """Rewards that the prompt source has for its own completions; None for generated ones."""

    def compute(batch: pa.RecordBatch) -> Values:
        rows = zip(batch.column("prompt_columns").to_pylist(), batch.column("sample").to_pylist(), strict=True)
        generators = batch.column("generator").to_pylist()
        return [
            stored_completions.rewards(json.loads(columns))[sample] if name == schema.STORED else None
            for (columns, sample), name in zip(rows, generators, strict=True)
        ]

    return compute


_SCORERS: dict[
    str, Callable[[RewardSettings, ScorerSettings], Callable[[pa.RecordBatch], Values | Failure | np.ndarray]]
] = {
    "reference": _reference,
    "http": _http,
    "model": _model,
    "stored": _stored,
}
