"""Checkpoints of a run's whole state, and the references of its iterations.

save      learner ranks and policy, buffer, objective, guard, counters -> checkpoints/step-N, whole or absent
restore   the learner from a checkpoint, and the reference that was in force when it was written
renew     the current policy -> references/step-N -> reference scorers and learner
"""

import asyncio
import shutil
from pathlib import Path

from keel import checkpoint, files, references
from keel.cluster import actors, learner_group
from keel.config import loader
from keel.online.guard import Guard
from keel.online.preflight import Prepared
from keel.online.recorder import Recorder


class Checkpointer:
    """The checkpoints of one learner group and one buffer."""

    def __init__(
        self,
        prepared: Prepared,
        learner: learner_group.LearnerGroup,
        buffer: actors.RemoteBuffer,
        reference: actors.ReferencePool | None,
        recorder: Recorder,
        guard: Guard,
    ) -> None:
        self.settings, self.directory = prepared.settings, prepared.directory
        self.initial_reference = prepared.models.reference
        self.learner, self.buffer, self.reference, self.recorder = learner, buffer, reference, recorder
        self.guard = guard

    async def save(self, step: int, *, finished: bool) -> None:
        """Write and commit a checkpoint, then delete what it makes obsolete."""
        aside = checkpoint.begin(self.directory, step)
        try:
            with files.naming_a_full_disk(aside / "learner"):
                await self._commit(aside, step, finished)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # only there if something went wrong
        self.recorder.event("checkpoint", step=step)

    async def _commit(self, aside: Path, step: int, finished: bool) -> None:
        metrics = self.recorder.metrics
        await self.learner.save(str(aside))
        buffer = await self.buffer.state() | {"version": step}
        metrics.add({"checkpoints_total": 1.0})
        state = {
            "version": step,
            "finished": finished,
            "buffer": buffer,
            "objective": await self.learner.state(),
            "guard": self.guard.state(),
            "totals": metrics.totals,
            "digest": loader.digest(self.settings),
        }
        await asyncio.to_thread(checkpoint.commit, aside, state)  # it reads every file again
        checkpoint.prune(self.directory, self.settings.checkpoint.keep)
        committed = checkpoint.steps(self.directory)
        oldest = committed[-self.settings.checkpoint.keep :][0]  # an older one is the best: its rows can be made again
        references.prune(self.directory, self.settings.reference_iteration_steps, oldest, committed)
        await self.buffer.forget(checkpoint.state_of(self.directory, oldest)["buffer"]["next_ticket"])

    async def restore(self, saved: Path | None) -> int:
        """Load a checkpoint (None: the start) into the learner, and the reference in force then; return its version."""
        version = await self.learner.restore_checkpoint(str(saved)) if saved else 0
        folder = references.of_version(self.directory, self.settings.reference_iteration_steps, version)
        if folder == references.folder_of(self.directory, version) and not folder.exists():
            await self.renew_reference(version)  # the run ended at this version and now gets further steps
        elif folder is not None:
            if folder == references.folder_of(self.directory, version):
                self.guard.reference_renewed()  # already in the state, but for a run that ended here and was extended
            checkpoint.check(folder)
            await self._load_reference(folder)
        elif self.reference and self.reference.loaded is not None:
            assert self.initial_reference
            await self._load_reference(Path(self.initial_reference))
        await self.learner.set_multipliers(**self.guard.multipliers)
        return version

    async def renew_reference(self, step: int) -> None:
        """Write the current policy into references/ and load it wherever the reference is read, and tell the guard."""
        folder = references.folder_of(self.directory, step)
        await self.learner.export(str(references.begin(folder)))
        await asyncio.to_thread(references.commit, folder)
        await self._load_reference(folder)
        self.guard.reference_renewed()

    async def _load_reference(self, folder: Path) -> None:
        assert self.reference
        await self.reference.load_weights(str(folder))
        await self.learner.renew_reference(str(folder))
