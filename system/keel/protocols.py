"""What the components of a run promise, what travels between them, and what the controller reports to an observer.

A batch travels as a `Batch`: either an Arrow record batch or a handle to one (a Ray object reference). The
controller passes it on unopened; only the two ends open it. Nothing of Ray, torch or vLLM: in a unit test the
components are in-process fakes.
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

Batch = Any
"""A pa.RecordBatch, or an opaque handle to one that the receiving end resolves."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Log-probs come back at this temperature and after this filter."""

    temperature: float
    top_p: float
    max_tokens: int
    """Completion budget, end token included."""
    stop_token_ids: tuple[int, ...]
    """A completion ends with the first of these; it is kept and counts as an action."""


@dataclass(frozen=True)
class GenerateRequest:
    """What one generate call asks for: completions of prompt rows, whose turns are sampled one behind the other."""

    prompts: pa.RecordBatch
    """Rows of schema.PROMPT."""
    turns: tuple[Sampling, ...]
    """How the completion of each turn is drawn. Generators take one turn today."""
    given: Sequence[list[int]] | None = None
    """Row by row, a completion that exists already (only its log-probs are computed) or [] (it is sampled)."""

    @property
    def sampling(self) -> Sampling:
        """The sampling of the only turn."""
        (sampling,) = self.turns
        return sampling


@dataclass(frozen=True)
class TensorSpec:
    """Where one parameter lies in the flat weight buffer."""

    name: str
    """Hugging Face checkpoint name."""
    shape: tuple[int, ...]
    dtype: str
    """bfloat16 or float32."""
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Weights:
    """All parameters of one policy version as one flat buffer, with the digest that proves it."""

    version: int
    digest: str
    """xxh3-128 over specs and buffer."""
    specs: tuple[TensorSpec, ...]
    buffer: np.ndarray = field(repr=False)
    """uint8 [num_bytes]."""


@dataclass(frozen=True)
class LoadReceipt:
    """A generator's proof of which weights it now holds."""

    version: int
    digest: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class StageReceipt:
    """Row, token and failure counts of one generate or score call; the driver gets this instead of the batch."""

    rows: int
    tokens: int
    seconds: float
    worker: str
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed samples by reason."""


@dataclass(frozen=True)
class AddReceipt:
    """Accepted, failed and dropped counts of one add call."""

    accepted_groups: int
    accepted_samples: int
    failed: Mapping[str, int]
    """Failed samples by reason."""
    dropped: Mapping[str, int]
    """Dropped groups by reason."""
    num_bytes: int


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: the version it made and the numbers it saw, by metric name."""

    version: int
    metrics: Mapping[str, Any]
    """Gauges; those with a label are mappings."""
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Increments of counters by metric name and label."""
    finished: bool = False
    """The objective's own stopping rule holds: no further step is wanted."""


class Generator(Protocol):
    async def generate(self, request: GenerateRequest) -> tuple[Batch, StageReceipt]:
        """Prompt rows in, the same rows with the generate columns appended out, in the same order."""

    async def load_weights(self, weights: Any) -> Sequence[LoadReceipt]:
        """Take over a Weights (or a handle to one); one receipt from every generator behind this one."""


class Scorer(Protocol):
    async def score(self, batch: Batch) -> tuple[Batch, StageReceipt]:
        """The same rows with this scorer's columns appended."""


class Buffer(Protocol):
    async def admit(self) -> list[int]:
        """The next tickets that share a generator batch; waits until the staleness bound allows them."""

    async def add(self, tickets: list[int], batch: Batch) -> AddReceipt:
        """Accept the scored rows of admitted tickets; on disk before this returns."""

    async def drop(self, tickets: list[int], reason: str) -> None:
        """Give up admitted tickets."""

    async def take(self, groups: int) -> tuple[Batch, Mapping[str, Any]]:
        """The next groups in admission order as one batch, written to the run directory; waits for them.

        Beside it gauges by metric name, and `counts`: increments of counters by metric name and label ("": none).
        """

    async def advance(self, version: int) -> None:
        """All generators now hold this version."""

    async def waiting(self) -> str:
        """Which tickets the next step waits for, and for how long they have been in flight: one line."""


class Learner(Protocol):
    async def step(self, batch: Batch) -> StepReport: ...

    async def publish(self) -> tuple[Any, LoadReceipt]:
        """A handle to the current Weights, and what it holds."""

    async def compare(self, batch: Batch) -> Mapping[str, float]:
        """Gap between the learner's and the sampler's log-probs of the same tokens, in nats."""

    async def save(self, directory: str) -> None: ...

    async def restore_checkpoint(self, directory: str) -> int:
        """Restore a checkpoint; the version it holds."""

    async def export(self, folder: str) -> None:
        """Write the current policy as a Hugging Face folder."""

    async def state(self) -> Mapping[str, Any]:
        """What changes the run and is not in the weights: coefficients, moments, normalizers. JSON."""

    async def set_multipliers(self, kl: float, learning_rate: float) -> None:
        """Multiply the KL coefficient and the learning rate from now on; no checkpoint of the learner holds them."""

    async def renew_reference(self, folder: str) -> None:
        """Read the reference inside the learner from this folder from now on, where there is one."""


class WeightTransport(Protocol):
    def begin(
        self, learner: Learner, generators: Generator
    ) -> tuple[Coroutine[Any, Any, LoadReceipt], Coroutine[Any, Any, Sequence[LoadReceipt]]]:
        """Two coroutines that move one version: publish, on the learner, and load, on every generator.

        The caller starts both together and awaits both, so that one collective may serve both ends.
        """


class Checkpoints(Protocol):
    async def save(self, step: int, *, finished: bool) -> None:
        """Write a checkpoint of this step. `finished`: the objective wants no further one."""

    async def renew_reference(self, step: int) -> None:
        """Make the current policy the reference."""


@dataclass(frozen=True)
class Components:
    """What a run is made of. A component may stand for one worker or for many."""

    generators: Generator
    scorers: Sequence[Scorer]
    buffer: Buffer
    learner: Learner
    transport: WeightTransport
    checkpoints: Checkpoints
    prompts: Callable[[list[int]], pa.RecordBatch]
    """Prompt rows of tickets."""
    held_out: pa.RecordBatch
    fetch: Callable[[Batch], Awaitable[pa.RecordBatch]]
    """Bring a batch into this process: only for evaluations and the start-up test, which are small."""


class Observer:
    """What the controller reports to. The default ignores everything."""

    def set(self, values: dict[str, Any]) -> None: ...

    def add(self, values: dict[str, Any]) -> None: ...

    def event(self, name: str, **fields: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, step: int) -> None: ...

    def occupied(self, role: str, running: int, waiting: int, serving: int) -> None:
        """Report how many workers of a role work, how many batches wait for one, and how many workers serve."""

    def tick(self) -> None:
        """Record what is measured once a second, also while a step runs."""

    def waiting_for_resources(self, name: str, asked: str, free: str) -> None:
        """Report that a worker or the learner waits for a placement group; repeated while the wait lasts."""

    def waited_for_resources(self, name: str, seconds: float, *, granted: bool) -> None:
        """Report that such a wait is over: the placement group was granted, or is not wanted any more."""

    async def evaluated(self, step: int, batch: pa.RecordBatch) -> None: ...

    async def quarantine(self, step: int, batch: Batch, reason: str, multipliers: Mapping[str, float]) -> None:
        """Keep the rows of a step that the learner refused, and the guard's multipliers in force in it."""
