"""Completions that came with the prompts: what the policy thinks of them is no KL and no entropy, and moves nothing."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel import schema
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.learner.policy_learner import DeepSpeedLearner
from keel.observability import diagnostics
from rollouts import generated, prompts, referenced, scored
from tabular import objective

SAMPLER = [[-0.5, -1.0, -0.2], [-2.0], [-0.1, -0.3], [-7.0, -7.0, -7.0, -7.0]]
REFERENCE = [[-1.0, -1.5, -0.1], [-0.5], [-0.1, -0.4], [-1.0, -1.0, -1.0, -1.0]]
OF_SAMPLES = {"kl_nats", "kl_k3_nats", "entropy_nats", "sequence_entropy_nats"}
OF_STORED = {"stored_logprob_nats", "stored_token_logprob_nats", "stored_log_ratio_nats"}
KINDS = {
    "sampled": ["generator-0"] * 4,
    "mixed": ["generator-0", "generator-1", "stored", "stored"],
    "stored": ["stored"] * 4,
}
RATIOS = {"sampled": 0.0, "mixed": 0.5, "stored": 1.0}


def rollout(kind: str) -> pa.RecordBatch:
    """Two prompts of two completions; in `mixed` those of the second prompt are stored."""
    rows = scored(referenced(generated(prompts([0, 1]), logprobs=SAMPLER), REFERENCE), [0.1, 0.2, 0.3, 0.4])
    place = rows.schema.get_field_index("generator")
    return rows.set_column(place, rows.schema.field(place), pa.array(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_says_kl_and_entropy_of_its_samples_alone(kind: str) -> None:
    means = diagnostics.summarize(rollout(kind))
    names = OF_SAMPLES | OF_STORED
    expected = {"sampled": OF_SAMPLES, "mixed": names, "stored": OF_STORED}[kind]
    assert {name for name in means if name in names} == expected
    samples = {"sampled": slice(0, 4), "mixed": slice(0, 2), "stored": slice(0, 0)}[kind]
    totals, reference = np.array([sum(row) for row in SAMPLER]), np.array([sum(row) for row in REFERENCE])
    lengths = np.array([len(row) for row in SAMPLER])
    if kind != "stored":
        assert means["kl_nats"] == pytest.approx((totals - reference)[samples].mean(), abs=1e-6)
        assert means["sequence_entropy_nats"] == pytest.approx(-totals[samples].mean(), abs=1e-6)
        assert means["entropy_nats"] == pytest.approx((-totals / lengths)[samples].mean(), abs=1e-6)
    if kind != "sampled":
        rest = slice(samples.stop, 4)
        assert means["stored_log_ratio_nats"] == pytest.approx((totals - reference)[rest].mean(), abs=1e-6)
        assert means["stored_logprob_nats"] == pytest.approx(totals[rest].mean(), abs=1e-6)
        assert means["stored_token_logprob_nats"] == pytest.approx((totals / lengths)[rest].mean(), abs=1e-6)
    assert means["length_tokens"] == 2.5
    assert means.get("sampled_length_tokens") == (2.0 if kind == "mixed" else None)


def test_answers_of_a_column_have_no_log_probs_at_all() -> None:
    """`given` ones stand there with log-probs 0, which mean nothing."""
    rows = rollout("sampled")
    place = rows.schema.get_field_index("generator")
    given = rows.set_column(place, rows.schema.field(place), pa.array([schema.GIVEN] * 4))
    assert not (OF_SAMPLES | OF_STORED) & set(diagnostics.per_completion(given))


def test_one_value_a_completion_and_none_where_it_has_no_meaning() -> None:
    values = diagnostics.per_completion(rollout("mixed"))
    assert values["kl_nats"] == pytest.approx([0.9, -1.5, math.nan, math.nan], abs=1e-6, nan_ok=True)
    assert values["stored_log_ratio_nats"] == pytest.approx([math.nan, math.nan, 0.1, -24], abs=1e-6, nan_ok=True)


PREFER: dict[str, Any] = {"kind": "preference", "loss": "dpo"}
CONTROLLERS: dict[str, dict[str, Any]] = {
    "dual": {"kind": "dual", "target_nats": 0.01},
    "proportional": {"kind": "proportional", "target_nats": 0.01, "horizon_completions": 4},
    "safe": {"kind": "safe", "threshold_nats": 0.001},
}
BONUS = {"form": "token_bonus", "coefficient": 0.3, "controller": {"kind": "dual", "target_nats": 0.01}}


def steered(kind: str, controller: dict[str, Any]) -> Objective:
    kl = {"placement": "loss", "estimator": "k2", "coefficient": 0.2, "controller": controller}
    return objective(
        objective=PREFER,
        sampling={"stored_ratio": RATIOS[kind], "samples_per_prompt": 2},
        regularizer={"kl": kl, "entropy": BONUS},
    )


@pytest.mark.parametrize("controller", CONTROLLERS.values(), ids=CONTROLLERS)
def test_stored_completions_move_no_controller(controller: dict[str, Any]) -> None:
    still, moved = steered("stored", controller), steered("sampled", controller)
    before = still.state()
    for _ in range(3):
        still.adapt(rollout("stored"))
        moved.adapt(rollout("sampled"))
    assert still.state() == before
    assert moved.state()["kl"] != before["kl"] and moved.state()["entropy"] != before["entropy"]


@pytest.mark.parametrize("controller", CONTROLLERS.values(), ids=CONTROLLERS)
def test_beside_stored_completions_the_sampled_ones_steer_as_if_they_were_alone(controller: dict[str, Any]) -> None:
    mixed, alone = steered("mixed", controller), steered("sampled", controller)
    mixed.adapt(rollout("mixed"))
    alone.adapt(schema.select(rollout("sampled"), np.array([True, True, False, False])))
    assert mixed.state() == alone.state()


def losses(kind: str, columns: bool = True) -> tuple[float, dict[str, float]]:
    """Loss and metric sums of a step with a KL and an entropy term in the loss; columns: with the sampler's log-probs."""
    kl = {"placement": "loss", "estimator": "k2", "coefficient": 0.2}
    built = objective(
        objective=PREFER,
        sampling={"stored_ratio": RATIOS[kind], "samples_per_prompt": 2},
        regularizer={"kl": kl, "entropy": {"form": "token_bonus", "coefficient": 0.3}},
    )
    batch = rollout(kind)
    lengths = schema.completion_lengths(batch)
    sampler, reference = (
        torch.from_numpy(schema.ragged(batch, name)[0].copy()).double()
        for name in ("completion_logprobs", "reference_logprobs")
    )
    if not columns:
        batch = batch.drop_columns(["completion_logprobs"])
    credit = built.credited(batch, Measured(sampler.numpy()))
    rows = Rows(
        advantages=torch.from_numpy(credit.advantages),
        lengths=torch.from_numpy(lengths).double(),
        row_of_item=torch.repeat_interleave(torch.arange(4), torch.from_numpy(lengths)),
        sampler=sampler if columns else None,
        reference=reference,
        stored=torch.from_numpy(~schema.sampled(batch)),
    )
    entropies = torch.arange(1.0, len(sampler) + 1, dtype=torch.float64)
    terms = built.loss(rows, Outputs(sampler, entropies), credit)
    return terms.loss.item(), dict(terms.sums)


def test_terms_of_the_loss_on_stored_completions_have_names_of_their_own() -> None:
    """The loss is what it was: only what its parts are called depends on where completions come from."""
    (whole, sampled), (loss, mixed), (_, stored) = (losses(kind) for kind in KINDS)
    assert whole == pytest.approx(loss, abs=1e-12)
    half_squares = [0.5 * (np.array(p) - q) ** 2 for p, q in zip(SAMPLER, np.array(REFERENCE, object), strict=True)]
    share = np.array([terms.sum() for terms in half_squares]) / 4
    assert sampled["kl_loss_nats"] == pytest.approx(share.sum(), rel=1e-6)
    assert stored["log_ratio_loss_nats"] == pytest.approx(share.sum(), rel=1e-6)
    assert mixed["kl_loss_nats"] == pytest.approx(share[:2].sum(), rel=1e-6)
    assert mixed["log_ratio_loss_nats"] == pytest.approx(share[2:].sum(), rel=1e-6)
    for sums in (sampled, stored, mixed):
        for name in {"kl_loss", "log_ratio_loss"} & set(sums):
            assert sums[name] == pytest.approx(0.2 * sums[f"{name}_nats"], rel=1e-9)
    assert sampled["policy_entropy_nats"] == stored["teacher_forced_entropy_nats"] == pytest.approx(5.5)
    assert mixed["policy_entropy_nats"] == pytest.approx(np.mean([1, 2, 3, 4]))
    assert mixed["teacher_forced_entropy_nats"] == pytest.approx(np.mean([5, 6, 7, 8, 9, 10]))
    assert not {"log_ratio_loss", "log_ratio_loss_nats", "teacher_forced_entropy_nats"} & set(sampled)
    assert not {"kl_loss", "kl_loss_nats", "policy_entropy_nats"} & set(stored)


def test_an_offline_stage_calls_nothing_kl() -> None:
    """keel prefer: no sampler's log-probs in the rows."""
    _, sums = losses("stored", columns=False)
    assert {"log_ratio_loss", "teacher_forced_entropy_nats"} <= set(sums)
    assert not {"kl_loss", "kl_loss_nats", "policy_entropy_nats"} & set(sums)


def test_the_learner_hands_on_which_rows_are_stored() -> None:
    """Of the rows of a micro-batch, in its order; nothing where all rows are of one kind."""
    for kind, expected in (("mixed", [True, False]), ("sampled", None), ("stored", None)):
        batch = rollout(kind)
        lengths = schema.completion_lengths(batch)
        places = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
        micro = SimpleNamespace(
            rows=np.array([2, 1]),
            items=np.concatenate([places[2], places[1]]),
            row_of_item=torch.repeat_interleave(torch.arange(2), torch.from_numpy(lengths[[2, 1]])),
        )
        learner = SimpleNamespace(
            settings=SimpleNamespace(sampling=SimpleNamespace(stored_ratio=RATIOS[kind])), device="cpu"
        )
        credit = Credit(np.zeros(int(lengths.sum())), 4, int(lengths.sum()))
        rows = DeepSpeedLearner._rows(learner, batch, micro, credit, None)  # type: ignore[arg-type]
        assert (None if rows.stored is None else rows.stored.tolist()) == expected
        assert rows.sampler is not None and rows.sampler.tolist() == pytest.approx([*SAMPLER[2], *SAMPLER[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_of_best_of_n_is_that_of_samples(kind: str) -> None:
    """n is the number of samples a prompt; of stored completions it is not known what they were chosen from."""
    built = objective(
        objective={"kind": "weighted_likelihood", "weights": "best_of_n"},
        sampling={"stored_ratio": RATIOS[kind], "samples_per_prompt": 2},
    )
    metrics = built.weigh(rollout(kind), Measured()).metrics
    assert metrics.get("best_of_n_kl_nats") == (None if kind == "stored" else pytest.approx(math.log(2) - 0.5))
