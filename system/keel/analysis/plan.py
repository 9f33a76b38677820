"""Step time, idle shares and memory of a configuration before it runs, and which counts suit a budget best.

    rates (rates.py) + sizes of the configuration -> simulation.py -> Prediction
    budget -> counts of generators, reference, scorers and learner ranks -> the fastest of many Predictions

Assumptions, besides the straight lines of rates.py: answers stay as long as they were measured; a generator that is
given more than max_sequences decodes them in waves, each with the fixed part of the time; a stage's durations are
independent of each other; where workers share the cores of one machine (`cores`), all that compute are slowed
down alike as soon as they have more threads than there are cores; GPUs are not shared; the network is never full.

Memory of one worker of each role, from the number of parameters: lower bounds, in parts that say what they are.

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

import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keel.analysis.rates import LearnerRates, Rates, StageRates, waves
from keel.analysis.simulation import Shape, Simulation, Timeline
from keel.cluster import capacity
from keel.config.run import Settings
from keel.observability.utilization import LEARNER, STAGES

WARM_UP_STEPS = 3
"""Left out of every prediction, besides those in which the staleness bound fills the pipeline."""

_BYTES = {"bfloat16": 2, "float32": 4}
_TRAINING = {"bf16": (2, 2, 12), "fp32": (4, 4, 12)}
"""Bytes a parameter: weights, gradients, optimizer state with its own fp32 weights."""


@dataclass(frozen=True)
class Prediction:
    """Means over simulated steps after the warm-up."""

    counts: Mapping[str, int]
    max_staleness: int
    step_seconds: float
    step_seconds_p90: float
    tokens_per_second: float
    """Completion tokens trained on."""
    wait_seconds: float
    """Seconds of a step in which the learner waits for rollouts."""
    busy: Mapping[str, float]
    """Share of a role's worker seconds."""
    idle: Mapping[str, Mapping[str, float]]
    """Share of a role's worker seconds by what it waits for, as `keel_idle_seconds_total` has it."""
    queue: Mapping[str, float]
    """Batches that wait for a worker of a role, mean."""
    staleness: Mapping[int, float]
    """Share of the groups by how many versions late they are trained."""


@dataclass(frozen=True)
class Machine:
    """Where workers run."""

    cores: float | None = None
    """Shared by all workers; None: every worker has devices of its own."""
    devices_per_node: int = 8


class _Drawn:
    """Seconds by rates, drawn by what is done: the same tickets take equally long under every split of a budget."""

    def __init__(
        self, rates: Rates, settings: Settings, counts: Mapping[str, int], machine: Machine, seed: int
    ) -> None:
        self._rates, self._seed = rates, seed
        self._samples, self._held_out = settings.sampling.samples_per_prompt, settings.prompts.held_out
        self._together = settings.generators.max_sequences
        rows = settings.buffer.groups_per_step * self._samples
        ranks = counts[LEARNER]
        communication = rates.learner.communication_seconds if ranks > 1 else 0.0
        self._step = rates.learner.seconds(math.ceil(rows / ranks)) + communication
        devices = counts["generator"] * settings.generators.tensor_parallel
        nodes = 1 if machine.cores else math.ceil(devices / machine.devices_per_node)
        self._load = rates.weights.load_seconds + rates.weights.node_seconds * (nodes - 1)

    def stage(self, role: str, tickets: Sequence[int]) -> float:
        sequences = len(tickets) * self._samples or self._held_out
        passes = waves(sequences, self._together) if role == "generator" else 1.0
        mean = self._rates.of(role).seconds(sequences, passes)
        return mean * self._factor(role, tickets[0] if tickets else -1)

    def step(self, version: int) -> float:
        return self._step * self._factor(LEARNER, version)

    def load(self, version: int, worker: int) -> float:
        return self._load

    def driver(self, what: str) -> float:
        rates = self._rates.driver
        return {
            "publish": self._rates.weights.publish_seconds,
            "add": rates.add_seconds,
            "take": rates.take_seconds,
            "advance": rates.advance_seconds,
            "checkpoint": rates.checkpoint_seconds,
        }[what]

    def _factor(self, role: str, key: int) -> float:
        rates: StageRates | LearnerRates = self._rates.learner if role == LEARNER else self._rates.of(role)
        if not rates.relative_seconds and not rates.variation_ratio:
            return 1.0
        draw = random.Random(f"{self._seed} {role} {key}")
        if rates.relative_seconds:
            return draw.choice(rates.relative_seconds)
        variance = math.log1p(rates.variation_ratio**2)
        return draw.lognormvariate(-variance / 2, math.sqrt(variance))


def predict(
    settings: Settings, rates: Rates, counts: Mapping[str, int], machine: Machine, steps: int = 30, seed: int = 0
) -> Prediction:
    """Simulate this many steps after the warm-up, with these counts in place of the configuration's."""
    warm_up = WARM_UP_STEPS + settings.buffer.max_staleness
    shape = shape_of(settings, rates, counts, machine, warm_up + steps + 1)
    line = Simulation(shape, _Drawn(rates, settings, counts, machine, seed)).run()
    tokens = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt * rates.tokens_per_sequence
    return _prediction(line, counts, settings.buffer.max_staleness, warm_up, tokens)


def shape_of(settings: Settings, rates: Rates, counts: Mapping[str, int], machine: Machine, steps: int) -> Shape:
    return Shape(
        workers={role: counts[role] for role in STAGES if role in counts},
        ranks=counts[LEARNER],
        groups_per_step=settings.buffer.groups_per_step,
        groups_per_batch=settings.groups_per_batch_of(counts["generator"]),
        max_staleness=settings.buffer.max_staleness,
        steps=steps,
        evaluate_every=settings.evaluation.every_steps,
        checkpoint_every=settings.checkpoint.every_steps,
        threads={role: float(worker.threads) for role, worker in capacity.workers(settings).items()},
        cpu_ratios={role: rates.of(role).cpu_ratio for role in STAGES if role in counts},
        cores=machine.cores,
    )


def _prediction(line: Timeline, counts: Mapping[str, int], staleness: int, warm_up: int, tokens: float) -> Prediction:
    kept = slice(warm_up, -1)  # the last step has an evaluation
    seconds = line.step_seconds[kept]
    elapsed = sum(seconds)
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for counted in line.counted[kept]:
        for name, values in counted.items():
            totals[name].update(values)
    idle: dict[str, dict[str, float]] = {role: {} for role in counts}
    for label, value in totals["idle_seconds_total"].items():
        role, _, on = label.partition("/")
        idle[role][on] = value / (elapsed * counts[role])
    late: Counter[int] = sum(line.staleness[kept], Counter())
    return Prediction(
        counts=dict(counts),
        max_staleness=staleness,
        step_seconds=statistics.mean(seconds),
        step_seconds_p90=sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1],
        tokens_per_second=tokens * len(seconds) / elapsed,
        wait_seconds=statistics.mean(line.waited[kept]),
        busy={role: totals["busy_seconds_total"][role] / (elapsed * count) for role, count in counts.items()},
        idle=idle,
        queue={role: totals["queue_seconds_total"][role] / elapsed for role in STAGES if role in counts},
        staleness={versions: groups / late.total() for versions, groups in sorted(late.items())},
    )


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
    """List the memory of each role for a policy (and reference) of this size."""
    published = float(parameters * _BYTES[settings.generators.dtype])
    share = published / settings.generators.tensor_parallel
    workers = [Footprint("generator", {"weights": share, "KV cache": float(settings.generators.kv_cache_bytes)})]
    if settings.reference:
        workers.append(Footprint("reference", {"weights": float(parameters * _BYTES[settings.reference.dtype])}))
    weights, gradients, optimizer = (parameters * size for size in _TRAINING[settings.learners.precision])
    stage = settings.learners.zero_stage
    if settings.learners.precision == "fp32" and stage == 3:
        optimizer -= weights
    learner = {
        "weights": weights / (ranks if stage == 3 else 1),
        "gradients": gradients / (ranks if stage >= 2 else 1),
        "optimizer state": optimizer / ranks,
    }
    if settings.learner_holds_reference and settings.reference:
        learner["reference"] = float(parameters * _BYTES[settings.reference.dtype])
    return [*workers, Footprint(LEARNER, learner), Footprint("node", {"published weights, old and new": 2 * published})]
