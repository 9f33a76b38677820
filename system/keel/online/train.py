"""An online run from settings to its last step. Resuming, rebuilding and re-sizing are the same path with a checkpoint.

preflight ----------------> one line and exit 2, nothing written
    |
run directory, config.yaml
    |
Ray: generators | reference | scorers                 live as long as the run, each worker replaced alone  (pool.py)
    |
    +--> newest intact checkpoint                                                                   (checkpoint.py)
    |    learner ranks | buffer actor                 one lost, all built again       (learner_group.py, actors.py)
    |        learner.restore_checkpoint(checkpoint), buffer state, counters
    |    publish -> load: every generator proves its weights
    |    parity test: learner and sampler agree on the same tokens, or stop
    |        |
    |    Controller: rollouts loop || learn loop                                                    (controller.py)
    |        |   per step: metrics.jsonl, Prometheus; when due: evaluation, checkpoint
    +--------+-- LearnerLost | BufferLost | other number of ranks wanted (scaling.py)
             |
Outcome: first and last evaluation on the same held-out prompts; or where `keel stop` ended it, with a checkpoint
"""

import asyncio
import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from keel import checkpoint, files, references
from keel.cluster import actors, learner_group
from keel.cluster.control import ControlLink
from keel.cluster.pool import Pool
from keel.config import loader
from keel.config.run import Settings
from keel.errors import BufferLost, BuildFailed, LearnerLost
from keel.observability import endpoint
from keel.observability.metrics import RunMetrics
from keel.online import parity, scaling
from keel.online.controller import Controller, one_cause
from keel.online.preflight import Prepared
from keel.online.recorder import Display, Recorder
from keel.online.scaling import Scaling
from keel.protocols import Components
from keel.rollout import manifest

_STARTING = "starting Ray, generators, scorers, learner"
_END_SECONDS = 20.0


@dataclass(frozen=True)
class Outcome:
    """A finished run, or one that stopped before its last step, as it was asked to."""

    directory: Path
    steps: int
    stopped: bool
    seconds: float
    """Of this process: start-up, steps and evaluations."""


def run(prepared: Prepared, display: Display) -> Outcome:
    """Train to `run.steps`, from the newest intact checkpoint of the run directory if there is one.

    Raises ConfigError for a directory another process works on, ParityError, CheckpointError, or what a part raised.
    """
    started = time.monotonic()
    settings, directory = prepared.settings, prepared.directory
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: asked_to_stop.set())  # batch systems send it before a time limit
    files.make_folder(directory)
    with files.lock(directory):
        saved = _run_alone(prepared, display, asked_to_stop)
    return Outcome(directory, saved.version, not saved.over(settings), time.monotonic() - started)


def _run_alone(prepared: Prepared, display: Display, asked_to_stop: threading.Event) -> "Saved":
    settings, directory = prepared.settings, prepared.directory
    checkpoint.check_known(directory)
    (directory / "control.json").unlink(missing_ok=True)  # nobody is to ask the actor of an earlier process
    with contextlib.ExitStack() as last, contextlib.ExitStack() as ray:
        new = not checkpoint.committed(directory) and not scaling.has_counts(directory)
        counts = scaling.configured(settings, directory)
        for line in prepared.notes:
            display.note(line)
        if new:  # Ray first: what its cluster can never hold leaves nothing behind
            display.doing(_STARTING)
            display.note(ray.enter_context(actors.joined(settings, counts)))
        files.write(directory / "config.yaml", loader.dump(settings).encode())
        recorder = Recorder(prepared, RunMetrics(settings.run.name, directory / "metrics.jsonl"), display)
        saved = _newest(recorder)
        if saved.over(settings):
            return saved
        page = recorder.metrics.page
        url = last.enter_context(endpoint.serving(settings.metrics, settings.run.name, directory, page))
        display.note(f"metrics: {url}")
        last.enter_context(recorder.tracking)  # finished after Ray: an interrupted run has not long
        if saved.path:
            display.note(f"resuming from {saved.path.name}")
            recorder.event("resume", step=saved.version)
        if not new:
            display.doing(_STARTING)
            display.note(ray.enter_context(actors.joined(settings, counts, degraded=True)))
        return asyncio.run(_Run(prepared, recorder, asked_to_stop).to_the_end(saved))


@dataclass(frozen=True)
class Saved:
    """Where a run goes on."""

    path: Path | None
    state: Mapping[str, Any]

    @property
    def version(self) -> int:
        return self.state.get("version", 0)

    def over(self, settings: Settings) -> bool:
        return self.version >= settings.run.steps or self.state.get("finished", False)


def _newest(recorder: Recorder) -> Saved:
    """Find the newest intact checkpoint and move aside what was written after it: those steps are made again."""
    path, state, damaged = checkpoint.newest_intact(recorder.directory)
    for what in damaged:
        recorder.event("checkpoint_damaged", what=what, step=state["version"] if state else 0)
        recorder.display.note(f"damaged checkpoint put aside ({what}); going on from {path and path.name}")
    saved = Saved(path, state or {})
    for what in files.keep_steps(recorder.directory / "metrics.jsonl", saved.version):
        recorder.event("line_damaged", what=what)
        recorder.display.note(f"{what} is damaged and was left out")
    manifest.undo(recorder.directory, saved.version)
    recorder.metrics.restore(saved.state.get("totals", {}))
    return saved


class _Run:
    """The pools of a run, and one learner group and buffer after the other."""

    def __init__(self, prepared: Prepared, recorder: Recorder, asked_to_stop: threading.Event) -> None:
        self.prepared, self.recorder, self.settings = prepared, recorder, prepared.settings
        self.generators = actors.generators(self.settings, prepared.models.policy, prepared.given(), recorder)
        self.scorers = actors.scorers(self.settings, prepared.models.reference, recorder)
        pools = {pool.role: pool for pool in self._pools()}
        desired = scaling.configured(self.settings, prepared.directory)
        for role, pool in pools.items():
            pool.count = desired[role]
        link = ControlLink(self.settings, prepared.directory, desired)
        self.placement: learner_group.Placement | None = None
        self.has_run = False
        self.scaling = Scaling(self.settings, prepared.directory, pools, link, recorder, asked_to_stop)
        recorder.reference = next((pool for pool in self.scorers if pool.pool.role == "reference"), None)

    def _pools(self) -> list[Pool]:
        return [self.generators.pool, *(scorer.pool for scorer in self.scorers)]

    async def to_the_end(self, saved: Saved) -> Saved:
        """Build, run, and build again from the newest commit when learner or buffer are lost or re-sized.

        Returns where it ended: at its last step, or where it was asked to stop.
        """
        _end_on_signals()
        losses = 0
        try:
            while not saved.over(self.settings):
                furthest = self.recorder.furthest
                try:
                    await self._go_on(saved)
                except (LearnerLost, BufferLost, BuildFailed) as lost:
                    if isinstance(lost, BuildFailed) and not self.has_run:
                        raise
                    losses = losses + 1 if self.recorder.furthest == furthest else 1
                    if losses > self.settings.failures.max_rebuilds:
                        raise
                    self.recorder.event("rebuild", reason=str(lost))
                    self.recorder.add({"rebuilds_total": 1.0})
                    self.recorder.display.note(f"{lost}; going on from the newest checkpoint")
                saved = _newest(self.recorder)
                if self.scaling.stopping and not saved.over(self.settings):
                    self.recorder.event("stopped", step=saved.version)
                    self.recorder.display.note(f"stopped, as asked, after step {saved.version}")
                    break
        finally:
            self.scaling.end()
        return saved

    async def _go_on(self, saved: Saved) -> None:
        """One learner group and one buffer, from a checkpoint until the run ends, or one of them does."""
        with contextlib.ExitStack() as ends:
            started = await self.scaling.unless_stopped(self._start(saved, ends))
            if started is None:
                return
            learner, buffer, controller = started
            async with one_cause() as tasks:
                following = tasks.create_task(self.scaling.follow(learner, buffer, controller))
                await controller.run()
                following.cancel()

    async def _start(
        self, saved: Saved, ends: contextlib.ExitStack
    ) -> tuple[learner_group.LearnerGroup, actors.RemoteBuffer, Controller]:
        """Room, a learner group and a buffer, and everyone at the checkpoint. `ends` ends the two."""
        settings, recorder = self.settings, self.recorder
        recorder.utilization.doing("start")  # whatever the learner did that was lost, nobody does it now
        began = time.monotonic()
        self.generators.pool.forget_load()
        # at first others may occupy a part of the cluster, later only this run's own workers do as a rule
        if not actors.holds(settings, self.scaling.desired, at_once=not self.has_run):
            for pool in self._pools():
                pool.give_way()  # a worker that waits for room would take the learner's
            await asyncio.gather(*(pool.first() for pool in self._pools()))  # one of each before a second of any
        placement = await self._placement_for(self.scaling.desired["learner"])
        learner = learner_group.LearnerGroup(
            settings, self.prepared.models.policy, self.prepared.models.frozen, placement
        )
        ends.callback(learner.stop)
        directory, state = str(self.prepared.directory), saved.state.get("buffer", {})
        buffer = actors.RemoteBuffer(settings, directory, self.scaling.groups_per_batch, state)
        ends.callback(buffer.stop)
        recorder.begin(learner, buffer, saved.version)
        controller = await self._build(saved, learner, buffer)
        self.has_run = True
        recorder.event("running", step=saved.version, ranks=placement.ranks, seconds=round(time.monotonic() - began, 3))
        return learner, buffer, controller

    async def _placement_for(self, ranks: int) -> learner_group.Placement:
        """Reuse the current placement group if its size fits, else request a new one.

        No other process can claim a reused one between two learner groups.
        """
        self.scaling.release()
        patience = self.settings.failures.degrade_after_seconds
        if self.placement is not None:
            if self.placement.ranks == ranks and await self.placement.granted(patience):
                return self.placement
            self.placement.release()
            self.placement = None  # nobody may find room for the next one, and then this one is not asked again
        last = self.settings.deadlines.room_seconds
        self.placement = await learner_group.largest_placement(
            self.settings.learners, ranks, patience, max(patience, last), self.recorder
        )
        if self.placement.ranks < ranks:
            self.recorder.event("degraded", role="learner", desired=ranks, actual=self.placement.ranks)
            self.recorder.display.note(f"no resources for {ranks} learner ranks: going on with {self.placement.ranks}")
        return self.placement

    async def _build(
        self, saved: Saved, learner: learner_group.LearnerGroup, buffer: actors.RemoteBuffer
    ) -> Controller:
        """Everyone is up, holds what the checkpoint says, and agrees on log-probs."""
        settings, recorder = self.settings, self.recorder
        limits = settings.deadlines
        patience = (limits.start_seconds + limits.load_seconds) * (settings.failures.retries + 2)
        try:
            async with asyncio.timeout(patience) as limit:
                await asyncio.gather(learner.ready(), *(pool.ready() for pool in self._pools()))
                version = await learner.restore_checkpoint(str(saved.path)) if saved.path else 0
                found = await buffer.found()
                await recorder.refer_to(
                    references.of_version(self.prepared.directory, settings.reference_iteration_steps, version)
                )
        except TimeoutError:
            if not limit.expired():
                raise
            serving = {pool.role: f"{pool.serving} of {pool.count}" for pool in self._pools()}
            raise LearnerLost(f"not everyone was up after {patience:.0f} s; serving: {serving}") from None
        if found["groups"] or found["damaged"]:
            recorder.event("restored", step=version, **found)
        components = Components(
            generators=self.generators,
            scorers=self.scorers,
            buffer=buffer,
            learner=learner,
            prompts=self.prepared.prompts.batch,
            held_out=self.prepared.prompts.held_out(),
            fetch=actors.fetch,
        )
        controller = Controller(settings, components, self.prepared.sampling, recorder, version)
        await controller.sync()
        recorder.doing("parity test")
        samples = settings.sampling.samples_per_prompt
        prompts = min(parity.num_prompts(samples, learner.placement.ranks), components.held_out.num_rows)
        samples = max(samples, math.ceil(learner.placement.ranks / prompts))  # every rank needs a row
        probe = self.prepared.prompts.held_out(samples).slice(0, prompts * samples)
        parity.judge_start(await controller.compare(await controller.generate(probe)), settings, recorder)
        return controller


def _end_on_signals() -> None:
    """SIGTERM ends the loop as Ctrl-C does. What has not ended by itself after a while is ended: all is on disk."""
    own = signal.getsignal(signal.SIGINT)  # asyncio's, unless whoever started this had it ignored
    interrupt = own if callable(own) else signal.default_int_handler

    def end(number: int, frame: FrameType | None) -> None:
        last_call = threading.Timer(_END_SECONDS, os._exit, [loader.INTERRUPTED])
        last_call.daemon = True
        last_call.start()
        for each in ending:
            signal.signal(each, signal.SIG_IGN)  # a second one would be raised wherever the end is, also inside Ray
        interrupt(number, frame)

    ending = [signal.SIGTERM, *([signal.SIGINT] if callable(own) else [])]
    for each in ending:
        signal.signal(each, end)
