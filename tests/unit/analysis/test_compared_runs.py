"""The paper's contrast where it can be solved exactly: four answers, one reward hack, 2,000 kinds of gibberish.

The proxy reward likes the hack, the gold reward does not; the reference knows the four answers. Reference numbers:
oracle P1d, computed in closed form: KL control ends at ref exp(proxy / beta), maximum entropy at exp(proxy / alpha).
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from keel.algorithms.policy_gradient import PolicyGradient
from keel.algorithms.types import Measured
from keel.config import loader
from keel.observability import diagnostics
from optimal_policies import GOLD, OPTIMA, PROXY, REFERENCE, optimum
from rollouts import generated, prompts, referenced, scored

# arm, temperature -> proxy, gold, KL, entropy, P(hack)


def objective(arm: str, temperature: float) -> PolicyGradient:
    terms: dict[str, Any] = {
        "kl": {"kl": {"coefficient": temperature}},
        "entropy": {"entropy": {"form": "sequence_sum", "coefficient": temperature}},
    }
    return PolicyGradient(
        loader.parse(
            {
                "policy": {"model": "m"},
                "prompts": {"source": "p"},
                "objective": {"advantage": "rloo"},
                "regularizer": terms[arm],
                "rewards": [{"name": "proxy", "source": "a:b"}],
            }
        )
    )


def rows(policy: np.ndarray) -> pa.RecordBatch:
    """Every answer once, each a completion of one token under this policy."""
    batch = generated(prompts([0], samples=len(PROXY)), logprobs=np.log(policy)[:, None].tolist())
    return scored(referenced(batch, np.log(REFERENCE)[:, None].tolist()), PROXY.tolist())


@pytest.mark.parametrize(("arm", "temperature"), OPTIMA)
def test_no_answer_has_an_advantage_at_the_arms_optimum(arm: str, temperature: float) -> None:
    """The regularized reward is constant there, so nothing moves; away from it the gradient points back."""
    policy = optimum(arm, temperature)
    assert np.abs(objective(arm, temperature).weigh(rows(policy), Measured()).advantages).max() < 1e-5
    for answer in (0, 4, 1000):
        pushed = policy.copy()
        pushed[answer] *= 1.5
        pushed /= pushed.sum()
        result = objective(arm, temperature).weigh(rows(pushed), Measured()).advantages
        assert result[answer] == result.min() < -0.9 * temperature * np.log(1.5)


@pytest.mark.parametrize(("arm", "temperature"), OPTIMA)
def test_monitors_read_kl_and_entropy_of_the_oracle(arm: str, temperature: float) -> None:
    """Sampled estimates, here summed over all answers with their probabilities."""
    policy = optimum(arm, temperature)
    values = diagnostics.per_completion(rows(policy))
    kl, entropy = policy @ values["kl_nats"], policy @ values["sequence_entropy_nats"]
    result = (policy @ values["reward"], policy @ GOLD, kl, entropy, policy[4])
    assert result == pytest.approx(OPTIMA[arm, temperature], abs=2e-4)
    assert policy @ values["kl_k3_nats"] == pytest.approx(kl, abs=1e-3)  # unbiased, too
