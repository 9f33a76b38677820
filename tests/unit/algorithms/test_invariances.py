"""What holds for every kind of objective: gradients, shares that add up, groups by ticket, shifts, special cases."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit, Measured
from tabular import (
    CASES,
    PREFERENCE,
    ROWS,
    TICKETS,
    Table,
    case,
    loss,
    objective,
    rollout,
    table,
    token_kl,
    weigh,
)

STEP = table()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Handing such small tensors to other threads takes ten times as long as the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SPLITS = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[2], [0, 5, 7], [6, 1, 3, 4]], [[row] for row in ROWS]]


def leaves() -> tuple[Tensor, Tensor]:
    return STEP.logits.clone().requires_grad_(), STEP.values.clone().requires_grad_()


def gradients(subject: Objective, credit: Credit, rows: Any = ROWS, old: bool = True) -> tuple[float, Tensor, Any]:
    """Loss, its gradient by all logits and values as one vector, and the sums of the metrics."""
    logits, values = leaves()
    terms = loss(subject, STEP, credit, logits, values, rows, old)
    result = torch.autograd.grad(terms.loss, [logits, values], allow_unused=True, materialize_grads=True)
    return terms.loss.item(), torch.cat([item.flatten() for item in result]), terms.sums


@pytest.mark.parametrize("name", list(CASES))
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    """Central finite differences along random directions of logits and values, with the credit held."""
    subject = case(name)
    credit = weigh(subject, STEP)
    _, gradient, _ = gradients(subject, credit)
    parameters = torch.cat([STEP.logits.flatten(), STEP.values.flatten()])
    size = STEP.logits.numel()

    def at(flat: Tensor) -> float:
        parts = flat[:size].reshape(STEP.logits.shape), flat[size:].reshape(STEP.values.shape)
        return loss(subject, STEP, credit, *parts).loss.item()

    directions = torch.from_numpy(np.random.default_rng(1).normal(size=(12, len(parameters))))
    numeric = [(at(parameters + 1e-6 * item) - at(parameters - 1e-6 * item)) / 2e-6 for item in directions]
    assert (directions @ gradient).tolist() == pytest.approx(numeric, abs=1e-8)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("rows", SPLITS, ids=["halves", "uneven", "single"])
def test_shares_add_up(name: str, rows: list[list[int]]) -> None:
    """Loss, gradient and metrics of a step are the sums over any split of its rows, also where pi_old is pi."""
    subject = case(name)
    credit = weigh(subject, STEP)
    for old in (True, False):
        whole, gradient, sums = gradients(subject, credit, old=old)
        parts = [gradients(subject, credit, part, old) for part in rows]
        assert sum(part[0] for part in parts) == pytest.approx(whole, abs=1e-12)
        assert sum(part[1] for part in parts).tolist() == pytest.approx(gradient.tolist(), abs=1e-12)
        for key in sums:
            assert sum(part[2][key] for part in parts) == pytest.approx(sums[key], abs=1e-12), key


ORDER = [5, 2, 7, 1, 0, 3, 6, 4]
KEEPS_ORDER_WITHIN_A_PROMPT = {"ipo_average": "random", "max_random": "max_random", "best_of_n_vs_policy": "sample 0"}


@pytest.mark.parametrize("name", list(CASES))
def test_groups_are_tickets_not_positions(name: str) -> None:
    """Rows in another order have the same advantages, targets and selected tokens, moved along with them."""
    order = ORDER
    if name in KEEPS_ORDER_WITHIN_A_PROMPT:  # these selections speak of the k-th sample of a prompt
        order = sorted(ROWS, key=lambda row: TICKETS[row])
        order = order[:3] + order[4:6] + order[3:4] + order[6:]
    places = np.concatenate([np.flatnonzero(STEP.row_of_item == row) for row in order])
    before, after = weigh(case(name), STEP), weigh(case(name), table(order))
    assert after.advantages == pytest.approx(before.advantages[places], abs=1e-12)
    assert np.ptp(before.advantages) > 1e-3 or name == "uniform"
    for old, new in ((before.targets, after.targets), (before.selected, after.selected)):
        assert (old is None) == (new is None)
        if old is not None and new is not None:
            assert new == pytest.approx(old[places], abs=1e-12, nan_ok=True)
    numbers = [key for key, value in before.metrics.items() if isinstance(value, float)]
    assert [after.metrics[key] for key in numbers] == pytest.approx([before.metrics[key] for key in numbers], abs=1e-12)


BASELINES = ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline", "gspo", "eapo_free", "lco_mse", "lco_log_cosh"]
WEIGHTS = ["kl", "chi2", "soft_chi2", "best_of_n", "rejection"]


@pytest.mark.parametrize("name", [*BASELINES, *WEIGHTS, *PREFERENCE])
def test_a_prompt_may_have_any_zero(name: str) -> None:
    """Rewards plus a number of the prompt: Bradley-Terry, group baselines and per-prompt weights do not see it."""
    plain, moved = weigh(case(name), STEP), weigh(case(name), table(shift={7: 3.0, 2: -11.0}))
    assert moved.advantages == pytest.approx(plain.advantages, abs=1e-11)


@pytest.mark.parametrize("name", ["none", "reinforce_pp", "gae"])
def test_without_a_baseline_the_zero_matters(name: str) -> None:
    plain, moved = weigh(case(name), STEP), weigh(case(name), table(shift={7: 3.0, 2: -11.0}))
    assert np.abs(moved.advantages - plain.advantages).max() > 0.1


@pytest.mark.parametrize("name", list(PREFERENCE))
def test_preferences_are_trained_by_the_slope_of_their_loss(name: str) -> None:
    """-advantage / rows of every token is the central difference of `preference_loss` by its log-prob."""
    logprobs = STEP.logprobs(STEP.logits).numpy()
    if name == "kto":  # its z is detached: a difference sees it too, unless it is 0
        logprobs = logprobs - 3.0
    credit = case(name).weigh(STEP.batch, Measured(logprobs))

    def at(flat: np.ndarray) -> float:
        return case(name).weigh(STEP.batch, Measured(flat)).metrics["preference_loss"]

    numeric = [(at(logprobs + item) - at(logprobs - item)) / 2e-6 for item in 1e-6 * np.eye(len(logprobs))]
    assert -credit.advantages / credit.num_rows == pytest.approx(numeric, abs=1e-8)
    assert np.abs(credit.advantages).max() > 1e-3


def test_kto_holds_its_baseline() -> None:
    """z = mean h = .5 where that is positive: slopes -+ beta s (1 - s) at h - z, halved over the two losses."""
    config = {"kind": "preference", "loss": "kto", "beta": 0.4}
    batch = rollout([[-1.0], [-1.0]], [1.0, 0.0], reference=[[-2.5], [-1.5]])
    credit = objective(objective=config).weigh(batch, Measured(np.array([-1.0, -2.0])))
    won, lost = (1 / (1 + np.exp(-0.4 * x)) for x in (1.5 - 0.5, 0.5 + 0.5))
    assert credit.metrics["preference_loss"] == pytest.approx(1 - (won + lost) / 2, abs=1e-12)
    slopes = [-0.4 * won * (1 - won) / 2, 0.4 * lost * (1 - lost) / 2]
    assert -credit.advantages / 2 == pytest.approx(slopes, abs=1e-12)


def test_straight_through_kl_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    result = {}
    for estimator in ("k2", "k3", "k3_k2"):
        subject = objective(regularizer=token_kl(estimator))
        result[estimator] = gradients(subject, weigh(subject, STEP))
    assert result["k3_k2"][0] == pytest.approx(result["k3"][0], abs=1e-12)
    assert result["k3_k2"][1].tolist() == pytest.approx(result["k2"][1].tolist(), abs=1e-12)
    assert (result["k3"][1] - result["k2"][1]).abs().max() > 1e-2


def test_an_anchor_that_is_the_policy_itself_needs_no_copy() -> None:
    """LCO with one epoch reads its own logits, detached; with two the kept ones: the same where they are equal."""
    here = Table(**{**vars(STEP), "others": {**STEP.others, "old": STEP.logits}})
    for name in ("lco_mse", "lco_log_cosh", "lco_kl", "lco_ratio"):
        result = []
        for epochs in (1, 2):
            subject = case(name, epochs=epochs)
            logits, values = leaves()
            terms = loss(subject, here, weigh(subject, here), logits, values)
            result.append((terms.loss.item(), torch.autograd.grad(terms.loss, logits)[0]))
        assert result[0][0] == pytest.approx(result[1][0], abs=1e-12)
        assert torch.allclose(result[0][1], result[1][1], atol=1e-12)
        assert result[0][1].abs().max() > 1e-3
