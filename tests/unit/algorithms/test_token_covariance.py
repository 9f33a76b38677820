"""KL-Cov and Clip-Cov (2505.22617): selection by brute force, gradients by finite differences, draws by their counts."""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keel.algorithms import token_covariance
from keel.algorithms.objective import Objective
from keel.algorithms.types import Credit
from keel.config.covariance import CovarianceSettings
from keel.config.regularizer import TERMS_OF_KEEL
from tabular import loss, objective, table, weigh

STEP = table()
CURRENT = STEP.logprobs(STEP.logits).tolist()
SAMPLER = STEP.logprobs(STEP.others["sampler"])
TOKENS = len(CURRENT)


def subject(**covariance: Any) -> Objective:
    config = {"covariance": covariance} if covariance else {}
    return objective(objective={"advantage": "grpo", "reduction": "token_mean", "epochs": 2, **config})


PLAIN = weigh(subject(), STEP)


def covariance_of(place: int) -> float:
    """The paper's equation at one token, with plain sums."""
    advantages = PLAIN.advantages.tolist()
    centered = CURRENT[place] - sum(CURRENT) / TOKENS
    return centered * (advantages[place] - sum(advantages) / TOKENS)


COVARIANCES = [covariance_of(place) for place in range(TOKENS)]


@pytest.mark.parametrize(("share", "size"), [(0.01, 1), (0.25, 4), (0.499, 7), (0.5, 8), (1.0, 16)])
def test_kl_cov_penalizes_the_tokens_of_largest_covariance(share: float, size: int) -> None:
    """No other set of as many of the 16 tokens has a larger sum: all sets are tried."""
    credit = weigh(subject(form="kl_cov", share=share), STEP)
    assert credit.penalized is not None
    places = tuple(np.flatnonzero(credit.penalized).tolist())
    assert len(places) == size
    best = max(itertools.combinations(range(TOKENS), size), key=lambda few: sum(COVARIANCES[p] for p in few))
    assert places == best
    assert credit.advantages.tolist() == PLAIN.advantages.tolist()
    assert credit.metrics["covariance_selected_ratio"] == pytest.approx(size / 16)


def test_clip_cov_takes_the_gradient_of_tokens_in_the_band_alone() -> None:
    low, high = sorted(COVARIANCES)[9], sorted(COVARIANCES)[13]
    band = {place for place, value in enumerate(COVARIANCES) if low <= value <= high}
    settings = {"form": "clip_cov", "low": low - 1e-9, "high": high + 1e-9}
    for share, size in ((0.2, 3), (1.0, 5)):
        credit = weigh(subject(share=share, **settings), STEP)
        changed = set(np.flatnonzero(credit.advantages != PLAIN.advantages).tolist())
        assert changed <= band and len(changed) == size and credit.penalized is None
        assert credit.advantages[list(changed)].tolist() == [0.0] * size
        assert credit.metrics["covariance_selected_ratio"] == pytest.approx(size / 16)


def test_an_empty_band_cuts_nothing() -> None:
    credit = weigh(subject(form="clip_cov", share=1.0, low=1e3, high=2e3), STEP)
    assert credit.advantages.tolist() == PLAIN.advantages.tolist()
    assert credit.metrics["covariance_selected_ratio"] == 0.0


def test_every_token_of_the_band_is_drawn_equally_often_and_alike_for_the_same_version() -> None:
    """2 of 4 in the band, limits included, 2000 versions: each 1000 times, give or take four deviations of 22."""
    config = CovarianceSettings(form="clip_cov", share=0.34, low=1.0, high=2.0)
    values = np.array([0.5, 1.0, 1.5, 3.0, 2.0, 1.2])
    seeds, lengths = np.array([1001, 1002]), np.array([2, 4])
    counts: Counter[int] = Counter()
    for version in range(2000):
        chosen, again = (
            token_covariance.selected(values, token_covariance.draws(seeds, lengths, version), config) for _ in range(2)
        )
        assert chosen.tolist() == again.tolist()
        counts.update(np.flatnonzero(chosen).tolist())
    assert set(counts) == {1, 2, 4, 5} and sum(counts.values()) == 4000
    assert all(abs(count - 1000) < 90 for count in counts.values())
    pairs = np.array([token_covariance.draws(seeds, np.array([1, 1]), version) for version in range(500)])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.2  # rows do not share their draws


@pytest.mark.parametrize("form", ["kl_cov", "clip_cov"])
def test_the_selection_follows_the_rows_in_any_order(form: str) -> None:
    settings = {"form": form, "share": 0.2, "low": -0.5, "high": 0.5}
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    moved = table(order)

    def marks(credit: Credit, row_of_item: np.ndarray, rows: Any) -> dict[int, list[bool]]:
        flat = credit.penalized if credit.penalized is not None else credit.advantages == 0
        return {row: flat[row_of_item == place].tolist() for place, row in enumerate(rows)}

    before = marks(weigh(subject(**settings), STEP), STEP.row_of_item, range(8))
    assert before == marks(weigh(subject(**settings), moved), moved.row_of_item, order)
    assert 0 < sum(map(sum, before.values())) < 16


def value_at(made: Objective, credit: Credit, logits: torch.Tensor, rows: Any = None) -> torch.Tensor:
    return loss(made, STEP, credit, logits, STEP.values, rows).loss


@pytest.mark.parametrize("form", ["kl_cov", "clip_cov"])
def test_two_micro_batches_have_the_gradient_of_one(form: str) -> None:
    made = subject(form=form, share=0.3, low=-0.5, high=0.5)
    credit = weigh(made, STEP)
    logits = STEP.logits.clone().requires_grad_()
    whole = torch.autograd.grad(value_at(made, credit, logits), logits)[0]
    parts = value_at(made, credit, logits, [0, 3, 5]) + value_at(made, credit, logits, [1, 2, 4, 6, 7])
    assert torch.autograd.grad(parts, logits)[0].numpy() == pytest.approx(whole.numpy(), abs=1e-12)
    plain = torch.autograd.grad(value_at(subject(), PLAIN, logits), logits)[0]
    assert whole.numpy() != pytest.approx(plain.numpy(), abs=1e-3)


def test_the_gradient_of_kl_cov_is_the_finite_difference_of_its_equation() -> None:
    """Surrogate plus beta (r - 1 - log r) / tokens at the largest four, r = pi/mu, written out in numpy."""
    beta = 0.7
    made = subject(form="kl_cov", share=0.25, coefficient=beta)
    credit = weigh(made, STEP)
    largest = np.argsort(COVARIANCES)[-4:]

    def added(logits: np.ndarray) -> float:
        log_policy = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        x = (log_policy[np.arange(TOKENS), STEP.targets.numpy()] - SAMPLER.numpy())[largest]
        return beta * float((np.exp(x) - 1 - x).sum()) / TOKENS

    logits = STEP.logits.clone().requires_grad_()
    with_term = torch.autograd.grad(value_at(made, credit, logits), logits)[0]
    without = torch.autograd.grad(value_at(subject(), PLAIN, logits), logits)[0]
    expected, step, start = np.zeros(STEP.logits.shape), 1e-6, STEP.logits.numpy()
    for place in np.ndindex(*expected.shape):
        move = np.zeros(expected.shape)
        move[place] = step
        expected[place] = (added(start + move) - added(start - move)) / (2 * step)
    assert (with_term - without).numpy() == pytest.approx(expected, abs=1e-7)
    assert np.abs(expected).max() > 1e-2
    sums = loss(made, STEP, credit, STEP.logits, STEP.values).sums
    assert sums["objective_term/kl_cov"] == pytest.approx(added(start), abs=1e-6)


def test_no_term_of_the_users_has_the_name_of_one_of_keels() -> None:
    """Every label of objective_term that the code writes is refused as the name of a user's term."""
    texts = [path.read_text(encoding="utf8") for path in Path(token_covariance.__file__).parent.glob("*.py")]
    written = {
        name for text in texts for pair in re.findall(r'objective_term/(\w+)"|terms\["(\w+)"\]', text) for name in pair
    }
    assert written - {""} == set(TERMS_OF_KEEL)
