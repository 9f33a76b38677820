"""An online run from settings to its last step; resuming is the same path with a checkpoint.

preflight ----------------> one line and exit 2, nothing written
    |
run directory, config.yaml
    |
Ray: generators | reference | scorers | buffer | learner ranks        (cluster.py, gang.py)
    |   learner.load(checkpoint), buffer state, counters              only when resuming
    |   publish -> load: every generator proves its weights
    |   parity test: learner and sampler agree on the same tokens, or stop
    |
Controller: rollouts loop || learn loop                               (controller.py)
    |   per step: metrics.jsonl, Prometheus; when due: evaluation, checkpoint
    |
Outcome: first and last evaluation on the same held-out prompts
"""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import pyarrow as pa

from keel import checkpoint, cluster, config, durable, evaluate, gang, references
from keel.controller import Controller, Observer, Parts
from keel.metrics import RunMetrics
from keel.preflight import Prepared
from keel.settings import Settings

PARITY_PROMPTS = 8


class ParityError(RuntimeError):
    """Learner and sampler disagree on the log-probs of the same tokens."""


class Display(Protocol):
    """Where progress goes: a live table, plain lines, or nothing."""

    def note(self, text: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, line: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    directory: Path
    steps: int
    seconds: float
    """Of this process: start-up, steps and evaluations."""


class Recorder(Observer):
    """Puts what the controller tells into metrics, files and the display."""

    def __init__(self, prepared: Prepared, metrics: RunMetrics, display: Display) -> None:
        self.prepared, self.metrics, self.display = prepared, metrics, display
        self.directory = prepared.directory
        self.buffer: cluster.RemoteBuffer | None = None
        self.learner: gang.LearnerGang | None = None
        self.reference: cluster.ScorerPool | None = None
        self.finished = False

    def set(self, values: dict[str, Any]) -> None:
        self.metrics.set(values)

    def add(self, values: dict[str, Any]) -> None:
        self.metrics.add(values)

    def event(self, name: str, **fields: Any) -> None:
        self.finished |= name == "objective_finished"
        durable.append_json(self.directory / "events.jsonl", {"event": name, "time": time.time(), **fields})

    def doing(self, what: str) -> None:
        self.display.doing(what)

    def step(self, step: int) -> None:
        self.metrics.set({"free_memory_bytes": float(psutil.virtual_memory().available)})
        self.display.step(self.metrics.record(step, time.time()))

    async def evaluated(self, step: int, batch: pa.RecordBatch) -> None:
        row = evaluate.store(self.directory, step, batch)
        self.display.note(
            f"evaluation at step {step}: reward {row['proxy']:+.3f} +- {row['stderr']:.3f} (standard error),"
            f" KL {row['kl_nats']:.2f} nats, {row['n']:.0f} held-out prompts"
        )

    async def checkpoint(self, step: int) -> None:
        """Learner and policy from the ranks, state from buffer and counters; then what it makes obsolete goes."""
        assert self.learner and self.buffer
        aside = checkpoint.begin(self.directory, step)
        await self.learner.save(str(aside))
        buffer = await self.buffer.state() | {"version": step}
        self.metrics.add({"checkpoints_total": 1.0})
        settings = self.prepared.settings
        state = {
            "version": step,
            "finished": self.finished,
            "buffer": buffer,
            "objective": await self.learner.state(),
            "totals": self.metrics.totals,
            "digest": config.digest(settings),
        }
        checkpoint.commit(aside, state)
        checkpoint.prune(self.directory, settings.checkpoint.keep)
        references.prune(self.directory, settings, checkpoint.steps(self.directory)[0])
        await self.buffer.forget(buffer["next_ticket"])

    async def iteration(self, step: int) -> None:
        """Write the policy of now into references/ and let everyone who reads the reference read that."""
        assert self.learner
        folder = references.folder_of(self.directory, step)
        await self.learner.export(str(references.begin(folder)))
        references.commit(folder)
        await self.renew(str(folder))

    async def renew(self, folder: str) -> None:
        assert self.learner and self.reference
        await self.reference.pool.load(folder)
        await self.learner.renew_reference(folder)


def run(prepared: Prepared, display: Display) -> Outcome:
    """Train to `run.steps`, from the last committed checkpoint of the run directory if there is one.

    Raises ParityError, or whatever a part of the run raised, with its cause.
    """
    started = time.monotonic()
    settings, directory = prepared.settings, prepared.directory
    directory.mkdir(parents=True, exist_ok=True)
    durable.write(directory / "config.yaml", config.dump(settings).encode())
    saved = checkpoint.latest(directory)
    state = checkpoint.read_state(saved) if saved else None
    version = state["version"] if state else 0
    if version < settings.run.steps and not (state and state["finished"]):
        _cut_back(directory, version)
        metrics = RunMetrics(settings.run.name, directory / "metrics.jsonl")
        port = metrics.serve(settings.metrics)
        display.note(f"metrics: http://{settings.metrics.host}:{port}/metrics")
        recorder = Recorder(prepared, metrics, display)
        if saved and state:
            display.note(f"resuming from {saved.name}")
            recorder.event("resume", step=version)
            metrics.restore(state["totals"])
        display.doing("starting Ray, generators, scorers, learner")
        cluster.connect(settings)
        try:
            asyncio.run(_train(prepared, recorder, str(saved) if saved else None, state))
        finally:
            cluster.disconnect()
    return Outcome(directory, settings.run.steps, time.monotonic() - started)


def _cut_back(directory: Path, version: int) -> None:
    """Forget what a killed run did after its last checkpoint; it is done again."""
    durable.keep_steps(directory / "metrics.jsonl", version)
    for path in (directory / "rollouts").glob("step-*.arrow"):
        if int(path.stem.removeprefix("step-")) > version:
            path.unlink()


async def _train(prepared: Prepared, recorder: Recorder, saved: str | None, state: dict[str, Any] | None) -> None:
    settings = prepared.settings
    # The learner first, alone: two models loading at once take longer on few cores than one after the other.
    given = prepared.given()
    generators = cluster.generators(settings, prepared.policy_folder, given)
    scorers = cluster.scorers(settings, prepared.reference_folder)
    learner = gang.LearnerGang(settings, prepared.policy_folder, prepared.learner_folders)
    buffer = cluster.RemoteBuffer(settings, str(prepared.directory), state["buffer"] if state else {})
    async with asyncio.timeout(settings.deadlines.start_seconds):
        await asyncio.gather(generators.pool.ready(), learner.ready(), *(scorer.pool.ready() for scorer in scorers))
    recorder.buffer, recorder.learner = buffer, learner
    recorder.reference = scorers[0] if prepared.reference_folder else None
    version = await learner.load(saved) if saved else 0
    if renewed := references.of_version(prepared.directory, settings, version):
        await recorder.renew(str(renewed))
    parts = Parts(
        generators=generators,
        scorers=scorers,
        buffer=buffer,
        learner=learner,
        prompts=prepared.prompts.batch,
        held_out=prepared.prompts.held_out(),
        fetch=cluster.fetch,
    )
    controller = Controller(settings, parts, prepared.sampling, recorder, version)
    await controller.sync()
    await _test_parity(controller, settings, recorder)
    await controller.run()


async def _test_parity(controller: Controller, settings: Settings, recorder: Recorder) -> None:
    """Learner and generator give the same tokens the same log-probs, or there is nothing to train on."""
    recorder.doing("parity test")
    probe = controller.parts.held_out.slice(0, PARITY_PROMPTS)
    gap = await controller.parts.learner.compare(await controller.generate(probe))
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
