"""An online run, in the order in which it happens. Resuming, recovery and re-sizing are one path with a checkpoint.

preflight (called before by the command) ---> one line and exit 2, nothing written                (preflight.py)
    |
a new run joins Ray first: what its cluster can never hold leaves no run directory        (cluster/actors.py)
    |
run directory, config.yaml, metrics endpoint
    |
Ray: generators | reference | scorers        as long as the run; each worker is replaced alone    (cluster/pool.py)
    |
    +--> newest intact checkpoint                                                                 (checkpoint.py)
    |        |
    |    start      placement group, learner group, buffer actor             (cluster/learner_group.py, actors.py)
    |        |      restore: learner, reference, buffer state, counters                           (checkpointer.py)
    |        |      weights: publish || load, every generator proves them         (cluster/weight_transport.py)
    |        |      parity test: learner and sampler agree on the same tokens                     (parity.py)
    |        |
    |    steps      Controller: learn loop || rollouts loop                                       (controller.py)
    |        |      once a second: wanted counts, a request to stop                               (scaling.py)
    |        |
    +--------+-- recovery: LearnerLost | BufferLost | BuildFailed after a first step |
             |   another number of ranks is wanted (the controller leaves its loops)
             |   the guard rolls back: newer checkpoints are moved aside first            (roll_back.py)
             |
end: Outcome at the last step, or where `keel stop` ended the run, with a checkpoint
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

from keel import checkpoint, files
from keel.cluster import actors, learner_group
from keel.cluster.control import ControlLink
from keel.cluster.pool import Pool
from keel.cluster.weight_transport import ObjectStoreTransport
from keel.config import loader
from keel.config.run import Settings
from keel.errors import BufferLost, BuildFailed, LearnerLost
from keel.observability import endpoint
from keel.observability.console import Display
from keel.observability.metrics import RunMetrics
from keel.online import parity, roll_back, scaling
from keel.online.checkpointer import Checkpointer
from keel.online.controller import Controller, one_cause
from keel.online.guard import Guard
from keel.online.preflight import Prepared
from keel.online.recorder import Recorder
from keel.online.roll_back import RollBack
from keel.online.scaling import Scaling
from keel.protocols import Components
from keel.rollout import manifest

_STARTING = "starting Ray, generators, scorers, learner"
_END_SECONDS = 20.0


@dataclass(frozen=True)
class Outcome:
    """A run at its last step, or at the step after which it was asked to stop."""

    directory: Path
    steps: int
    stopped: bool
    seconds: float
    """Duration of this process: start-up, steps and evaluations."""


def run(prepared: Prepared, display: Display) -> Outcome:
    """Train to `run.steps`, from the newest intact checkpoint of the run directory if there is one.

    Raises ConfigError for a directory that another process uses, ParityError, CheckpointError, or a component's error.
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
    (directory / "control.json").unlink(missing_ok=True)  # of an earlier process
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
            if saved.version < settings.run.steps:
                display.note(f"ended for good after step {saved.version}, by its guard or its objective")
            return saved
        page = recorder.metrics.page
        url = last.enter_context(endpoint.serving(settings.metrics, settings.run.name, directory, page))
        display.note(f"metrics: {url}")
        last.enter_context(recorder.tracking)  # finished after Ray: an interrupted run has little time
        if saved.path:
            display.note(f"resuming from {saved.path.name}")
            recorder.event("resume", step=saved.version)
        if not new:
            display.doing(_STARTING)
            display.note(ray.enter_context(actors.joined(settings, counts, degraded=True)))
        return asyncio.run(OnlineRun(prepared, recorder, asked_to_stop).to_the_end(saved))


@dataclass(frozen=True)
class Saved:
    """The checkpoint from which a run continues; no path: the start."""

    path: Path | None
    state: Mapping[str, Any]

    @property
    def version(self) -> int:
        return self.state.get("version", 0)

    def over(self, settings: Settings) -> bool:
        return self.version >= settings.run.steps or self.state.get("finished", False)


def _newest(recorder: Recorder) -> Saved:
    """Find the newest intact checkpoint and move aside what was written after it: those steps are made again."""
    roll_back.carry_out(recorder.directory)
    path, state, damaged = checkpoint.newest_intact(recorder.directory)
    for what in damaged:
        recorder.event("checkpoint_damaged", what=what, step=state["version"] if state else 0)
        recorder.display.note(f"damaged checkpoint put aside ({what}); continuing from {path and path.name}")
    saved = Saved(path, roll_back.laid_over(recorder.directory, state or {}))
    for what in files.keep_steps(recorder.directory / "metrics.jsonl", saved.version):
        recorder.event("line_damaged", what=what)
        recorder.display.note(f"{what} is damaged and was left out")
    manifest.undo(recorder.directory, saved.version)
    recorder.metrics.restore(saved.state.get("totals", {}))
    return saved


class OnlineRun:
    """The pools of a run, and one learner group and one buffer after another."""

    def __init__(self, prepared: Prepared, recorder: Recorder, asked_to_stop: threading.Event) -> None:
        self.prepared, self.recorder, self.settings = prepared, recorder, prepared.settings
        self.generators = actors.generators(self.settings, prepared.models.policy, prepared.given(), recorder)
        self.scorers = actors.scorers(self.settings, prepared.models.reference, prepared.prompts.rows, recorder)
        pools = {pool.role: pool for pool in self._pools()}
        desired = scaling.configured(self.settings, prepared.directory)
        for role, pool in pools.items():
            pool.count = desired[role]
        link = ControlLink(self.settings, prepared.directory, desired)
        self.placement: learner_group.Placement | None = None
        self.has_run = False
        self.scaling = Scaling(self.settings, prepared.directory, pools, link, recorder, asked_to_stop)
        self.reference = next((pool for pool in self.scorers if isinstance(pool, actors.ReferencePool)), None)

    def _pools(self) -> list[Pool]:
        return [self.generators, *self.scorers]

    async def to_the_end(self, saved: Saved) -> Saved:
        """Start, run, and start from the newest checkpoint after a loss, a re-sizing or a roll back.

        Returns the checkpoint of its last step, or of the step after which it was asked to stop.
        """
        _end_on_signals()
        losses = 0
        try:
            while not saved.over(self.settings):
                furthest = self.recorder.furthest
                try:
                    await self._attempt(saved)
                except (LearnerLost, BufferLost, BuildFailed) as lost:
                    if isinstance(lost, BuildFailed) and not self.has_run:
                        raise
                    losses = losses + 1 if self.recorder.furthest == furthest else 1
                    if losses > self.settings.failures.max_rebuilds:
                        raise
                    self.recorder.event("rebuild", reason=str(lost))
                    self.recorder.add({"rebuilds_total": 1.0})
                    self.recorder.display.note(f"{lost}; continuing from the newest checkpoint")
                except RollBack as asked:
                    losses, self.recorder.furthest = 0, asked.step  # the steps after it count when made again
                    fired = {"guard_fired_total": self.recorder.metrics.totals["guard_fired_total"]}
                    roll_back.request(self.prepared.directory, asked, fired)
                    self.recorder.event("roll_back", step=asked.step, **asked.carried)
                    factors = asked.carried["multipliers"]
                    self.recorder.display.note(f"{asked}, by the guard; factors from now on: {factors}")
                saved = _newest(self.recorder)
                if self.scaling.stopping and not saved.over(self.settings):
                    self.recorder.event("stopped", step=saved.version)
                    self.recorder.display.note(f"stopped, as asked, after step {saved.version}")
                    break
        finally:
            self.scaling.end()
        return saved

    async def _attempt(self, saved: Saved) -> None:
        """Run one learner group and one buffer from a checkpoint until the run ends, or one of them is lost."""
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
        """Start a learner group and a buffer in their placement and restore the checkpoint. `ends` stops the two."""
        settings, recorder = self.settings, self.recorder
        recorder.utilization.doing("start")  # the lost learner's phase is over
        began = time.monotonic()
        self.generators.forget_load()
        # at first others may occupy a part of the cluster, later only this run's own workers do as a rule
        if not actors.holds(settings, self.scaling.desired, at_once=not self.has_run):
            for pool in self._pools():
                pool.give_way()  # a worker that waits for resources would take the learner's
            await asyncio.gather(*(pool.first() for pool in self._pools()))  # one of each before a second of any
        placement = await self._placement_for(self.scaling.desired["learner"])
        learner = learner_group.LearnerGroup(
            settings, self.prepared.models.policy, self.prepared.models.frozen, placement
        )
        ends.callback(learner.stop)
        directory, state = str(self.prepared.directory), saved.state.get("buffer", {})
        buffer = actors.RemoteBuffer(settings, directory, self.scaling.groups_per_batch, state)
        ends.callback(buffer.stop)
        recorder.begin(placement.ranks, saved.version)
        controller = await self._restore(saved, learner, buffer)
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
            self.placement = None  # the request for the next one may fail; this one is not asked again
        last = self.settings.deadlines.placement_seconds
        self.placement = await learner_group.largest_placement(
            self.settings.learners, ranks, patience, max(patience, last), self.recorder
        )
        if self.placement.ranks < ranks:
            self.recorder.event("degraded", role="learner", desired=ranks, actual=self.placement.ranks)
            self.recorder.display.note(
                f"no resources for {ranks} learner ranks: continuing with {self.placement.ranks}"
            )
        return self.placement

    async def _restore(
        self, saved: Saved, learner: learner_group.LearnerGroup, buffer: actors.RemoteBuffer
    ) -> Controller:
        """Wait until all workers are up, restore the checkpoint, load the weights everywhere and test parity."""
        settings, recorder, prepared = self.settings, self.recorder, self.prepared
        guard = Guard(settings, saved.state.get("guard"))
        checkpointer = Checkpointer(prepared, learner, buffer, self.reference, recorder, guard)
        limits = settings.deadlines
        patience = (limits.start_seconds + limits.load_seconds) * (settings.failures.retries + 2)
        try:
            async with asyncio.timeout(patience) as limit:
                await asyncio.gather(learner.ready(), *(pool.ready() for pool in self._pools()))
                version = await checkpointer.restore(saved.path)
                restored = await buffer.restored()
        except TimeoutError:
            if not limit.expired():
                raise
            serving = {pool.role: f"{pool.serving} of {pool.count}" for pool in self._pools()}
            raise LearnerLost(f"not all workers were up after {patience:.0f} s; serving: {serving}") from None
        if restored["groups"] or restored["damaged"]:
            recorder.event("restored", step=version, **restored)
        components = Components(
            generators=self.generators,
            scorers=self.scorers,
            buffer=buffer,
            learner=learner,
            transport=ObjectStoreTransport(),
            checkpoints=checkpointer,
            prompts=prepared.prompts.batch,
            held_out=prepared.prompts.held_out(),
            fetch=actors.fetch,
        )
        controller = Controller(settings, components, prepared.sampling, recorder, version, guard)
        await controller.sync()
        await self._test_parity(controller, learner.placement.ranks)
        return controller

    async def _test_parity(self, controller: Controller, ranks: int) -> None:
        """Hold learner and sampler to the same log-probs on a few held-out prompts. Raises ParityError."""
        self.recorder.doing("parity test")
        held_out, samples = self.prepared.prompts.held_out, self.settings.sampling.samples_per_prompt
        prompts = min(parity.num_prompts(samples, ranks), controller.components.held_out.num_rows)
        samples = max(samples, math.ceil(ranks / prompts))  # every rank needs a row
        probe = held_out(samples).slice(0, prompts * samples)
        parity.judge_start(await controller.compare(await controller.generate(probe)), self.settings, self.recorder)


def _end_on_signals() -> None:
    """Let SIGTERM end the loop as Ctrl-C does, and end the process a while later in any case: all is on disk."""
    sigint = signal.getsignal(signal.SIGINT)  # asyncio's, unless the parent process had it ignored
    interrupt = sigint if callable(sigint) else signal.default_int_handler

    def end(number: int, frame: FrameType | None) -> None:
        last_call = threading.Timer(_END_SECONDS, os._exit, [loader.INTERRUPTED])
        last_call.daemon = True
        last_call.start()
        for ending_signal in ending:
            # a second one would be raised wherever the end has got to, also inside Ray
            signal.signal(ending_signal, signal.SIG_IGN)
        interrupt(number, frame)

    ending = [signal.SIGTERM, *([signal.SIGINT] if callable(sigint) else [])]
    for ending_signal in ending:
        signal.signal(ending_signal, end)
