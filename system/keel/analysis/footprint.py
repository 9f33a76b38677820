"""Memory of one worker of each role, from the number of parameters: lower bounds, in parts that say what they are.

    generator   weights + the key-value cache of its setting; one of tensor_parallel GPUs: its share of the weights,
                a whole cache (vLLM's is by GPU)
    reference   weights
    learner     bf16: 2 bytes of weights, 2 of gradients, 12 of fp32 master weights and Adam's two moments a parameter
                fp32: 4, 4 and 12, at stage 3 8: it keeps no second copy of weights that are fp32 (DeepSpeed 0.19)
                ZeRO stage 1 divides the optimizer state among the ranks, 2 also the gradients, 3 also the weights
    node        the published weights in Ray's object store, on a node that has a generator or the learner: twice, since
                the old version is kept for generators that are replaced until the new one is there (where the learner
                is not, Ray may drop the old one for room)

Estimated as 0: activations, logits, CUDA and NCCL contexts, fragmentation, temporary fp32 gradients, Python itself.
DeepSpeed's own estimates in bf16 are 2 + 18 / ranks bytes at stage 2 and 18 / ranks and the largest layer at stage 3:
they count fp32 gradients.
Not counted: reward models, and the critic, teacher or reference that some objectives keep inside the learner.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from keel.config.run import Settings
from keel.observability.utilization import LEARNER

_BYTES = {"bfloat16": 2, "float32": 4}
_TRAINING = {"bf16": (2, 2, 12), "fp32": (4, 4, 12)}
"""Bytes a parameter: weights, gradients, optimizer state with its own fp32 weights."""


@dataclass(frozen=True)
class Footprint:
    """One worker (learner: one rank, tensor parallel generator: one GPU)."""

    role: str
    parts: Mapping[str, float]
    """Bytes by what they hold."""

    @property
    def num_bytes(self) -> float:
        return sum(self.parts.values())


def footprints(settings: Settings, parameters: int, ranks: int) -> list[Footprint]:
    """Of a policy (and reference) with so many parameters."""
    published = float(parameters * _BYTES[settings.generators.dtype])
    own = published / settings.generators.tensor_parallel
    found = [Footprint("generator", {"weights": own, "KV cache": float(settings.generators.kv_cache_bytes)})]
    if settings.reference:
        found.append(Footprint("reference", {"weights": float(parameters * _BYTES[settings.reference.dtype])}))
    weights, gradients, optimizer = (parameters * each for each in _TRAINING[settings.learners.precision])
    stage = settings.learners.zero_stage
    if settings.learners.precision == "fp32" and stage == 3:
        optimizer -= weights
    learner = {
        "weights": weights / (ranks if stage == 3 else 1),
        "gradients": gradients / (ranks if stage >= 2 else 1),
        "optimizer state": optimizer / ranks,
    }
    return [*found, Footprint(LEARNER, learner), Footprint("node", {"published weights, old and new": 2 * published})]
