"""A step whose policy is a table of logits, one row for each completion token: float64, finite differences in reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from keel.algorithms import critics, registry
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, LossTerms, Measured, Outputs, Rows
from keel.config import loader
from keel.learner.frozen_models import FrozenView, chunk_term_of
from keel.learner.networks import TokenLogprobs

VOCABULARY = 4
TICKETS = [7, 2, 7, 2, 2, 7, 7, 2]
"""Two prompts of four completions each, not one after the other."""
LENGTHS = [2, 3, 1, 2, 3, 1, 2, 2]
ROWS = range(len(TICKETS))


def tree(**blocks: Any) -> dict[str, Any]:
    """The smallest configuration with an ensemble of two rewards and a judge."""
    return {
        "policy": {"model": "m"},
        "prompts": {"source": "p", "max_tokens": 8},
        "sampling": {"max_tokens": 4},
        "rewards": [{"name": name, "source": "x:y"} for name in "ab"]
        + [{"name": "gold", "source": "x:y", "role": "judge"}],
        **blocks,
    }


def objective(**blocks: Any) -> Objective:
    return registry.build(loader.parse(tree(**blocks)))


def rollout(
    logprobs: Sequence[Sequence[float]],
    rewards: Sequence[float],
    tickets: Sequence[int] | None = None,
    reference: Sequence[Sequence[float]] | None = None,
    **columns: Any,
) -> pa.RecordBatch:
    """Rows in float64, so that numbers can be compared to the last digit (stored ones are float32)."""
    nats = pa.list_(pa.float64())
    columns = {"seed": pa.array([1000 + row for row in range(len(rewards))]), **columns}
    if reference is not None:
        columns["reference_logprobs"] = pa.array([list(row) for row in reference], nats)
    return pa.record_batch(
        {
            "ticket": pa.array(list(tickets) if tickets is not None else [0] * len(rewards), pa.int64()),
            "reward": pa.array(rewards, pa.float64()),
            "completion_logprobs": pa.array([list(row) for row in logprobs], nats),
            **columns,
        }
    )


@dataclass(frozen=True)
class Table:
    """Everything of one step: stored rows, and logits [N, V] of every model that looks at them."""

    batch: pa.RecordBatch
    row_of_item: np.ndarray
    targets: Tensor
    logits: Tensor
    values: Tensor
    """[N, 3]: twin heads of the value, head of the entropy."""
    others: Mapping[str, Tensor]
    """old, sampler, reference, teacher."""

    def logprobs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, self.targets[:, None]).squeeze(-1)


def table(order: Sequence[int] = ROWS, shift: Mapping[int, float] | None = None) -> Table:
    """The step's rows in this order, each the same wherever it stands; shift: added to the rewards of a ticket."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("logits", "old", "sampler", "reference", "teacher")}
    targets, values, members = [], [], []
    for row in order:
        draw = np.random.default_rng([5, row])
        subject = draw.normal(size=(LENGTHS[row], VOCABULARY))
        for name, scale in zip(parts, (0.0, 0.3, 0.5, 0.8, 0.8), strict=True):
            parts[name].append(subject + scale * draw.normal(size=subject.shape))
        targets.append(draw.integers(VOCABULARY, size=LENGTHS[row]))
        values.append(draw.normal(size=(LENGTHS[row], 3)))
        members.append(draw.normal(size=3))
    models = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
    places = torch.from_numpy(np.concatenate(targets))
    tickets, lengths = [TICKETS[row] for row in order], [LENGTHS[row] for row in order]
    taken = {name: logits.log_softmax(-1).gather(-1, places[:, None]).squeeze(-1) for name, logits in models.items()}
    split = {name: np.split(flat.numpy(), np.cumsum(lengths)[:-1]) for name, flat in taken.items()}
    a, b, gold = np.transpose(members) + [(shift or {}).get(ticket, 0.0) for ticket in tickets]
    batch = rollout(
        split["sampler"],
        a + b,
        tickets,
        split["reference"],
        seed=pa.array([1000 + row for row in order]),
        reward_a=pa.array(a),
        reward_b=pa.array(b),
        reward_gold=pa.array(gold),
    )
    row_of_item = np.repeat(np.arange(len(lengths)), lengths)
    return Table(batch, row_of_item, places, models.pop("logits"), torch.from_numpy(np.concatenate(values)), models)


def heads(subject: Objective, values: Tensor) -> Tensor | None:
    """[N, K] of the table's value columns, twins joined as the critic joins them."""
    critic = getattr(subject.settings.objective, "critic", None)
    if critic is None:
        return None
    twin = values[:, 0] if critic.softmin_temperature is None else None
    joined = critics.soft_min(values[:, :2], critic.softmin_temperature or 1.0) if twin is None else twin
    return torch.stack([{"value": joined, "entropy": values[:, 2]}[head] for head in subject.heads], dim=-1)


def weigh(subject: Objective, step: Table) -> Credit:
    values = heads(subject, step.values)
    logprobs = step.logprobs(step.logits).numpy()
    return subject.weigh(step.batch, Measured(logprobs, None if values is None else values.numpy(), version=3))


def loss(
    subject: Objective,
    step: Table,
    credit: Credit,
    logits: Tensor,
    values: Tensor,
    rows: Sequence[int] | None = None,
    old: bool = True,
) -> LossTerms:
    """The share of these rows, by default of all; old: log-probs of the table's old policy, as with several epochs."""
    rows = range(step.batch.num_rows) if rows is None else rows
    items = np.concatenate([np.flatnonzero(step.row_of_item == row) for row in rows])
    lengths = torch.bincount(torch.from_numpy(step.row_of_item))[list(rows)]

    def column(flat: np.ndarray | None) -> Tensor | None:
        return None if flat is None else torch.from_numpy(flat[items])

    targets, advantages = step.targets[items], torch.from_numpy(credit.advantages[items])
    made = Rows(
        advantages=advantages,
        lengths=lengths.double(),
        row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        sampler=step.logprobs(step.others["sampler"])[items],
        old=step.logprobs(step.others["old"])[items] if old else None,
        reference=step.logprobs(step.others["reference"])[items],
        targets=column(credit.targets),
        old_values=column(credit.old_values),
        penalized=column(credit.penalized),
    )
    term = None
    if subject.vocabulary is not None:
        views = {name: FrozenView(step.others[name][items], nn.Identity()) for name in subject.vocabulary.models}
        piece = chunk_term_of(subject.vocabulary, targets, advantages, column(credit.selected), views, 1.0)
        term = piece(logits[items], 0, len(items))
    taken, entropies = TokenLogprobs.apply(logits[items], targets, 1.0, subject.needs_entropy)
    columns = heads(subject, values)
    return subject.loss(made, Outputs(taken, entropies, None if columns is None else columns[items], term), credit)


def token_kl(estimator: str, **more: Any) -> dict[str, Any]:
    return {"kl": {"coefficient": 0.3, "placement": "loss", "estimator": estimator, **more}}


KL_REWARD: dict[str, Any] = {"kl": {"coefficient": 0.3}}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
POLICY_GRADIENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rloo": ({"advantage": "rloo"}, KL_REWARD),
    "rloo_after": ({"correction": "sequence"}, {"kl": {"coefficient": 0.3, "order": "after_baseline"}}),
    "grpo": ({"advantage": "grpo", "reduction": "sequence_mean", **CLIP}, token_kl("k3")),
    "dr_grpo": ({"advantage": "dr_grpo", "reduction": "constant"}, token_kl("k2")),
    "gspo": ({"level": "sequence_mean", "correction": "sequence", "clip_low": 0.05, "clip_high": 0.08}, {}),
    "sequence": ({"level": "sequence", "correction": "none", **CLIP}, KL_REWARD),
    "reinforce_pp": ({"advantage": "reinforce_pp", "discount": 0.9, **CLIP}, KL_REWARD),
    "reinforce_pp_baseline": ({"advantage": "reinforce_pp_baseline", "reduction": "token_mean"}, KL_REWARD),
    "none": ({"advantage": "none", "normalize_reward": True}, KL_REWARD),
    "gae": ({"advantage": "gae", "critic": {}, **CLIP}, KL_REWARD),
    "value_baseline": (
        {
            "advantage": "value_baseline",
            "critic": {"softmin_temperature": 0.3, "loss": "huber", "clipped": "mean", "head": "mlp"},
        },
        token_kl("k2"),
    ),
    "eapo": ({"advantage": "gae", "critic": {"popart": True}, "entropy_advantage": {}}, KL_REWARD),
    "eapo_rloo": ({"critic": {"clip": None}, "entropy_advantage": {}}, {}),
    "eapo_free": ({"entropy_advantage": {"critic": False, "coefficient": 0.5}}, KL_REWARD),
    "sequence_sum": ({}, {"entropy": {"form": "sequence_sum", "coefficient": 0.2}}),
    "sequence_mean_exact": ({}, {"entropy": {"form": "sequence_mean_exact", "coefficient": 0.2}}),
    "sequence_mean_naive": ({}, {"entropy": {"form": "sequence_mean_naive", "coefficient": 0.2}}),
    "token_bonus": ({}, {"entropy": {"form": "token_bonus", "coefficient": 0.2}}),
    "clamped": ({}, {"entropy": {"form": "token_bonus", "coefficient": 0.2, "top_share": 0.5}}),
    "exact": ({"reduction": "token_mean"}, token_kl("exact", token_share=0.5)),
    "exact_all": ({}, token_kl("exact")),
    "k3_weighted": ({}, token_kl("k3", importance_weighted=True)),
    "kl_cov": ({**CLIP, "covariance": {"form": "kl_cov", "share": 0.3, "coefficient": 0.7}, "epochs": 2}, {}),
    "clip_cov": ({"covariance": {"form": "clip_cov", "share": 0.2, "low": 0.1, "high": 2.0}}, KL_REWARD),
    "chi_squared": ({}, {"chi_squared": {"coefficient": 0.3, "max_ratio": 3.0}}),
    "reward_weighted": ({}, {"kl": {"coefficient": 0.3, "importance_weighted": True}}),
}
LCO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({"kind": "logits_convexity", "temperature": 0.5, **config}, terms)
    for name, config, terms in [
        ("lco_mse", {"form": "mse", "epochs": 2}, KL_REWARD),
        ("lco_log_cosh", {"form": "log_cosh", "epochs": 2, "advantage": "grpo"}, token_kl("k3")),
        ("lco_kl", {"form": "kl", "epochs": 2, "reduction": "sequence_sum"}, {}),
        ("lco_ratio", {"target": "ratio", "epochs": 2}, {}),
        ("lco_reference", {"anchor": "reference"}, {}),
        ("lco_dense", {"dense": {"teacher": "t"}, "epochs": 2, "form": "mse"}, {}),
    ]
}
PREFERENCE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({"kind": "preference", **config}, terms)
    for name, config, terms in [
        ("dpo", {"loss": "dpo", "beta": 0.7, "target_margin": 0.2}, {}),
        ("cdpo_all", {"loss": "dpo", "label_smoothing": 0.1, "pairs": {"selection": "all"}}, {}),
        ("dpo_pessimism", {"loss": "dpo", "pessimism": 0.6, "pairs": {"selection": "most_disagreeing"}}, {}),
        ("dpo_judge", {"loss": "dpo", "pairs": {"judge": "gold", "selection": "max_max"}}, token_kl("k2")),
        ("dpo_hinge", {"loss": "dpo_hinge"}, {}),
        ("chi_po", {"loss": "chi_po"}, {}),
        ("dpo_plackett_luce", {"loss": "dpo_plackett_luce", "pessimism": 0.3}, {}),
        ("ipo_sum", {"loss": "ipo_sum", "beta": 0.5}, {}),
        ("ipo_average", {"loss": "ipo_average", "beta": 0.5, "pairs": {"selection": "random"}}, {}),
        ("kto", {"loss": "kto", "pairs": {"selection": "all"}}, {}),
        ("simpo", {"loss": "simpo", "beta": 2.0, "target_margin": 0.5, "exact_length_margin": True}, {}),
        ("simpo_hinge", {"loss": "simpo_hinge", "beta": 2.0, "target_margin": 0.5}, {}),
        ("simpo_plackett_luce", {"loss": "simpo_plackett_luce", "beta": 2.0, "target_margin": 0.5}, {}),
        ("cpo", {"loss": "cpo", "likelihood_coefficient": 0.3}, {}),
        ("orpo", {"loss": "orpo", "likelihood_coefficient": 1.0, "likelihood": "average"}, {}),
        ("max_random", {"pairs": {"selection": "max_random"}}, {}),
        ("best_of_n_vs_policy", {"pairs": {"selection": "best_of_n_vs_policy"}}, token_kl("exact", token_share=0.5)),
    ]
}
WEIGHTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    weights: ({"kind": "weighted_likelihood", "weights": weights, "temperature": 0.8}, terms)
    for weights, terms in [
        ("kl", {}),
        ("chi2", token_kl("k2")),
        ("soft_chi2", {"entropy": {"form": "token_bonus", "coefficient": 0.2}}),
        ("best_of_n", {}),
        ("rejection", token_kl("exact")),
        ("uniform", {}),
    ]
}
CASES = {**POLICY_GRADIENT, **LCO, **PREFERENCE, **WEIGHTED}
"""Every kind of objective in its variants: blocks `objective` and `regularizer`."""


def case(name: str, **more: Any) -> Objective:
    config, terms = CASES[name]
    return objective(objective={**config, **more}, regularizer=terms)
