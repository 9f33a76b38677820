"""Parity checks: learner and sampler must give the same tokens the same log-probs, at the start and at every step.

The start is judged on several samples of a prompt, in the micro-batches that training makes. Later steps are judged on
the tokens that were sampled by the version under training: importance weights would hide a drift there.
"""

import math
from collections.abc import Mapping

from keel.config.run import Settings
from keel.errors import KeelError
from keel.protocols import Observer

PROMPTS = 8


class ParityError(KeelError, RuntimeError):
    """Learner and sampler disagree on the log-probs of the same tokens."""


def num_prompts(samples: int, ranks: int) -> int:
    """Number of prompts of the start-up test: about PROMPTS rows, at least two prompts, and a row for each rank."""
    return max(2, math.ceil(PROMPTS / samples), math.ceil(ranks / samples))


def judge_start(gap: Mapping[str, float], settings: Settings, observer: Observer) -> None:
    """Compare the gap of the start-up test with its bound. Raises ParityError with the likely cause."""
    mean, bound = gap["gap_mean_nats"], settings.parity.max_gap_nats
    observer.event("parity", **gap)
    observer.note(f"parity: learner and sampler differ by {mean:.4f} nats a token (bound {bound})")
    if not mean <= bound:
        raise ParityError(
            f"learner and sampler log-probs differ by {mean:.3f} nats a token on average (largest"
            f" {gap['gap_max_nats']:.3f}); parity.max_gap_nats={bound}. Likely cause: {_likely_cause(settings)}"
        )


def judge_step(step: int, metrics: Mapping[str, float], settings: Settings, observer: Observer) -> str | None:
    """Compare the gap of a step with its bound; returns the problem if it must end the run, and prints a warning else.

    A step whose tokens were all sampled by earlier versions is not judged.
    """
    gap, bound = metrics.get("fresh_gap_nats"), settings.parity.max_step_gap_nats
    if gap is None or gap <= bound:
        return None
    problem = (
        f"step {step}: learner and sampler log-probs of the step's own tokens differ by {gap:.3f} nats a token;"
        f" parity.max_step_gap_nats={bound}. Likely cause: {_likely_cause(settings)}"
    )
    observer.event("parity", step=step, gap_mean_nats=gap)
    if settings.parity.on_step_gap == "stop":
        return problem
    observer.note(f"warning: {problem}")
    return None


def _likely_cause(settings: Settings) -> str:
    if settings.sampling.top_p < 1:
        return (
            f"sampling.top_p={settings.sampling.top_p} renormalizes the sampler's log-probs over the kept tokens,"
            " the learner's are over all; set it to 1"
        )
    if settings.generators.dtype == "bfloat16" or settings.learners.precision == "bf16":
        return (
            "bfloat16 arithmetic on a model that does not bear it; try generators.dtype=float32 learners.precision=fp32"
        )
    return "the two load different weights, or vLLM computes this family otherwise than transformers"
