"""The gold reward of the small half of the paper's experiment, fixed before any run of the grid.

gold = VADER x s(2 (fluency - FLUENCY)) x s((8 / scale) (relevance - RELEVANCE)), s the logistic function: the form and
the thresholds of `keel.examples:sentiment_on_topic`, which were set on SmolLM2, moved to where the small SFT model
speaks. There the SFT model's own answers have fluency -3.04 and relevance 0.814 nats a token; here they have
SFT_FLUENCY and SFT_RELEVANCE (6,144 completions, before any label was used). So FLUENCY lies 0.96 nats below the SFT
model's mean, and RELEVANCE and the width of its logistic are the same share of the SFT model's mean, 0.3 / 0.814 and
0.814 / 8.
"""

from collections.abc import Sequence
from typing import Any

from keel.examples import Completion, on_topic

SFT_FLUENCY, SFT_RELEVANCE = -4.77, 0.44
FLUENCY = SFT_FLUENCY - 0.96
RELEVANCE = SFT_RELEVANCE * 0.3 / 0.814
SLOPE = 8 * 0.814 / SFT_RELEVANCE


def gold(
    completions: Sequence[Completion],
    reference_logprobs: Sequence[Sequence[float]],
    relevance_nats: Sequence[float | None],
    **columns: Any,
) -> list[float | None]:
    """A number in [-1, 1] a completion; None where no other prompt was there to compare with."""
    return on_topic(completions, reference_logprobs, relevance_nats, fluency=FLUENCY, relevance=RELEVANCE, slope=SLOPE)
