"""The start-up test: learner and sampler give the same tokens the same log-probs."""

import pyarrow as pa

from keel.controller import Controller
from keel.recorder import Recorder
from keel.settings import Settings

PROMPTS = 8


class ParityError(RuntimeError):
    """Learner and sampler disagree on the log-probs of the same tokens."""


async def test(controller: Controller, probe: pa.RecordBatch, settings: Settings, recorder: Recorder) -> None:
    """Learner and generator give the same tokens the same log-probs, or there is nothing to train on."""
    recorder.doing("parity test")
    gap = await controller.compare(await controller.generate(probe))
    mean, bound = gap["gap_mean_nats"], settings.parity.max_gap_nats
    recorder.event("parity", **gap)
    recorder.display.note(f"parity: learner and sampler differ by {mean:.4f} nats a token (bound {bound})")
    if not mean <= bound:
        raise ParityError(
            f"learner and sampler log-probs differ by {mean:.3f} nats a token on average (largest"
            f" {gap['gap_max_nats']:.3f}); parity.max_gap_nats={bound}. Likely cause: {_likely_cause(settings)}"
        )


def _likely_cause(settings: Settings) -> str:
    if settings.sampling.top_p < 1:
        return (
            f"sampling.top_p={settings.sampling.top_p} renormalises the sampler's log-probs over the kept tokens,"
            " the learner's are over all; set it to 1"
        )
    if settings.generators.dtype == "bfloat16" or settings.learners.precision == "bf16":
        return (
            "bfloat16 arithmetic on a model that does not bear it; try generators.dtype=float32 learners.precision=fp32"
        )
    return "the two load different weights, or the model scales its logits in a way the learner does not know"
