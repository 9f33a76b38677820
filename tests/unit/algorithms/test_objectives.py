"""The policy-gradient objective against hand-computed losses, gradients and weights."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel import schema
from keel.algorithms.policy_gradient import PolicyGradient
from keel.algorithms.types import Credit, Measured, Outputs, Rows
from keel.config import loader

TOKENS_A, TOKENS_B = 3, 1


def objective(**blocks: dict[str, Any]) -> PolicyGradient:
    tree: dict[str, Any] = {
        "policy": {"model": "m"},
        "prompts": {"source": "p", "max_tokens": 8},
        "sampling": {"max_tokens": 4},
        "rewards": [{"name": "a", "source": "a:b"}],
    }
    return PolicyGradient(loader.parse({**tree, **blocks}))


def rows(advantages: list[float], lengths: list[int], sampler: list[float], **more: Any) -> Rows:
    return Rows(
        advantages=torch.repeat_interleave(torch.tensor(advantages, dtype=torch.float64), torch.tensor(lengths)),
        lengths=torch.tensor(lengths, dtype=torch.float64),
        row_of_item=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        sampler=torch.tensor(sampler, dtype=torch.float64),
        old=more.get("old"),
        reference=more.get("reference"),
    )


def credit(num_rows: int, num_tokens: int) -> Credit:
    return Credit(np.zeros(num_rows), num_rows, num_tokens, {})


def logs(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("low", "high", "up", "down"), [(0.2, 0.2, 1.2, 0.8), (0.1, 0.4, 1.4, 0.9), (0.45, 0.15, 1.15, 0.55)]
)
def test_ppo_clip_oracle(low: float, high: float, up: float, down: float) -> None:
    """P2b_ppo_clip: ratios [1.5, .6, 1.1, .5], A [1, 1, -1, -1], eps .2: losses [-1.2, -.6, 1.1, .8].

    With two bounds that differ each is seen on its own side: the first loss is that of the upper, the last of the lower.
    """
    subject = objective(objective={"clip_low": low, "clip_high": high, "correction": "none"})
    new = logs(np.log([1.5, 0.6, 1.1, 0.5]).tolist())
    terms = subject.loss(
        rows([1, 1, -1, -1], [1, 1, 1, 1], [0.0] * 4, old=torch.zeros(4, dtype=torch.float64)),
        Outputs(new),
        credit(4, 4),
    )
    assert terms.loss.item() == pytest.approx((-up - 0.6 + 1.1 + down) / 4, abs=1e-9)
    (gradient,) = torch.autograd.grad(terms.loss, new)
    assert gradient.tolist() == pytest.approx([0, -0.6 / 4, 1.1 / 4, 0], abs=1e-9)
    assert terms.sums["clip_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("token_mean", 2.5), ("sequence_mean", 3.0), ("sequence_sum", 5.0), ("constant", 1.25)],
)
def test_reductions_oracle(reduction: str, expected: float) -> None:
    """P2b_agg: per-token values [[1, 2, 3], [4]] give 2.5, 3.0, 5.0 and, with 4 tokens at most, 1.25."""
    subject = objective(objective={"reduction": reduction, "correction": "none"})
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    reduced = subject.reduce(values, rows([0, 0], [TOKENS_A, TOKENS_B], [0.0] * 4), credit(2, 4))
    assert reduced.item() == pytest.approx(expected, abs=1e-12)


def test_on_policy_gradient_is_advantage_times_score() -> None:
    """With rho = w = 1 the gradient of every token is -A / rows: REINFORCE on the sum of log-probs."""
    subject = objective(objective={"correction": "none"})
    new = logs([-1.0, -2.0, -0.5, -0.1])
    terms = subject.loss(rows([0.7, -0.3], [3, 1], [-1.0, -2.0, -0.5, -0.1]), Outputs(new), credit(2, 4))
    (gradient,) = torch.autograd.grad(terms.loss, new)
    assert gradient.tolist() == pytest.approx([-0.35, -0.35, -0.35, 0.15], abs=1e-12)


def test_truncated_weights_by_token_and_by_sequence() -> None:
    """Learner minus sampler [.5, 1, -.2 | .3], cap 2: tokens e^.5, 2, e^-.2 | e^.3; sequences 2 | e^.3."""
    sampler = [-1.5, -3.0, -0.3, -0.4]
    new = logs([-1.0, -2.0, -0.5, -0.1])
    weights = {"token": [np.exp(0.5), 2.0, np.exp(-0.2), np.exp(0.3)], "sequence": [2.0, 2.0, 2.0, np.exp(0.3)]}
    for correction, expected in weights.items():
        subject = objective(objective={"correction": correction})
        terms = subject.loss(rows([1.0, 1.0], [3, 1], sampler), Outputs(new), credit(2, 4))
        (gradient,) = torch.autograd.grad(terms.loss, new)
        assert (-2 * gradient).tolist() == pytest.approx(expected, abs=1e-12)
        assert terms.sums["importance_weight"] == pytest.approx(np.mean(expected))
    assert terms.sums["truncated_weight_ratio"] == pytest.approx(0.75)


def test_sequence_ratio_is_one_term_a_completion() -> None:
    subject = objective(objective={"level": "sequence", "correction": "none", "clip_low": 0.05, "clip_high": 0.2})
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    new = logs([-0.9, -0.9, -0.9, -1.1])
    terms = subject.loss(rows([1.0, 1.0], [3, 1], [0.0] * 4, old=old), Outputs(new), credit(2, 4))
    assert terms.loss.item() == pytest.approx(-(1.2 + np.exp(-0.1)) / 2)  # e^.3 is clipped to 1.2
    (gradient,) = torch.autograd.grad(terms.loss, new)
    assert gradient.tolist() == pytest.approx([0, 0, 0, -np.exp(-0.1) / 2])


def test_clamped_exponents_are_counted() -> None:
    subject = objective(objective={"correction": "token"})
    new = logs([-1.0, -1.0])
    terms = subject.loss(rows([1.0, 1.0], [1, 1], [-50.0, -1.0]), Outputs(new), credit(2, 2))
    assert terms.sums["clamped_log_ratios"] == 1.0
    assert np.isfinite(terms.loss.item())


def test_shares_of_micro_batches_add_up() -> None:
    """The loss of a step is the sum over any split of its rows, gradients included."""
    subject = objective(
        objective={"correction": "token", "reduction": "token_mean"},
        regularizer={
            "kl": {"coefficient": 0.1, "placement": "loss", "estimator": "k2"},
            "entropy": {"form": "token_bonus", "coefficient": 0.2},
        },
    )
    values = [-1.0, -2.0, -0.5, -0.1]
    sampler, reference = [-1.1, -1.9, -0.4, -0.2], [-0.8, -2.5, -0.9, -0.3]
    entropies = [2.0, 1.0, 0.5, 0.7]

    def part(which: slice, advantages: list[float], lengths: list[int]) -> tuple[float, list[float], dict[str, float]]:
        new = logs(values[which])
        made = rows(advantages, lengths, sampler[which], reference=torch.tensor(reference[which], dtype=torch.float64))
        terms = subject.loss(made, Outputs(new, torch.tensor(entropies[which], dtype=torch.float64)), credit(2, 4))
        return terms.loss.item(), torch.autograd.grad(terms.loss, new)[0].tolist(), dict(terms.sums)

    whole = part(slice(0, 4), [0.5, -0.5], [3, 1])
    one, two = part(slice(0, 3), [0.5], [3]), part(slice(3, 4), [-0.5], [1])
    assert one[0] + two[0] == pytest.approx(whole[0], abs=1e-12)
    assert one[1] + two[1] == pytest.approx(whole[1], abs=1e-12)
    for name, value in whole[2].items():
        assert one[2][name] + two[2][name] == pytest.approx(value, abs=1e-12), name
    assert whole[2]["entropy_loss"] == pytest.approx(-0.2 * np.mean(entropies))


def batch(rewards: list[float], lengths: list[int], logprobs: list[float], reference: list[float]) -> pa.RecordBatch:
    columns = {
        "ticket": pa.array([0] * len(rewards), pa.int64()),
        "reward": pa.array(rewards, pa.float32()),
        "completion_logprobs": schema.from_ragged(np.array(logprobs, np.float32), np.array(lengths), schema.NATS),
        "reference_logprobs": schema.from_ragged(np.array(reference, np.float32), np.array(lengths), schema.NATS),
    }
    return pa.record_batch(columns)


ROLLOUT = batch([1.0, 2.0, 5.0, 8.0], [1, 1, 2, 1], [-1, -2, -1, -1, -3], [-3, -3, -3, -3, -6])
"""KL of the completions: 2, 1, 4, 3."""


def by_row(credit: Credit) -> list[float]:
    """The completion of ROLLOUT that has two tokens gives both the same advantage."""
    values = credit.advantages.tolist()
    assert values[2] == values[3]
    return values[:3] + values[4:]


def test_kl_before_and_after_the_baseline_differ() -> None:
    kl = {"coefficient": 0.05}
    before = objective(regularizer={"kl": kl}).weigh(ROLLOUT, Measured())
    assert by_row(before) == pytest.approx([-3.9666666667, -2.5666666667, 1.2333333333, 5.3], abs=1e-6)
    after = objective(regularizer={"kl": {**kl, "order": "after_baseline"}}).weigh(ROLLOUT, Measured())
    plain = [-4.0, -2.6666666667, 1.3333333333, 5.3333333333]
    assert by_row(after) == pytest.approx(np.array(plain) - [0.1, 0.05, 0.2, 0.15], abs=1e-6)
    assert before.metrics["reward_kl_term"] == pytest.approx(-0.125)


def test_zero_coefficients_change_no_bit() -> None:
    none = objective().weigh(ROLLOUT, Measured()).advantages
    for form in ("sequence_sum", "sequence_mean_exact", "sequence_mean_naive"):
        zero = (
            objective(regularizer={"entropy": {"form": form, "coefficient": 0.0}}).weigh(ROLLOUT, Measured()).advantages
        )
        assert zero.tobytes() == none.tobytes()


def test_missing_columns_are_a_broken_invariant() -> None:
    subject = objective(regularizer={"kl": {"coefficient": 0.05}})
    with pytest.raises(AssertionError, match="reference_logprobs"):
        subject.weigh(ROLLOUT.select(["ticket", "reward", "completion_logprobs"]), Measured())
