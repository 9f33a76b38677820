"""Stages that train a policy on stored completions: `keel sft` (demonstrations) and `keel prefer` (pairs, rankings).

Both run the objectives of online training on the same learner; the rows are stored, and nobody samples. `keel prefer`
first reads every row's log-probs under the reference once and keeps them as Arrow, so training holds one model.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from keel.algorithms import registry
from keel.cluster import learner_group
from keel.config.run import Settings
from keel.config.stages import PreferSettings, SupervisedSettings
from keel.learner import loading
from keel.observability import endpoint, progress, tracking
from keel.observability.metrics import RunMetrics
from keel.online import preflight, text_checks
from keel.online.recorder import Display
from keel.rollout.offline_rows import OfflineRows
from keel.stages import offline_loop
from keel.stages.offline_loop import Course, Recorder
from keel.stages.reference_logprobs import ReferenceLogprobs

PolicyStage = SupervisedSettings | PreferSettings


@dataclass(frozen=True)
class Prepared:
    """A checked stage."""

    settings: PolicyStage
    learning: Settings
    """Of the learner, as of a run whose completions are all stored."""
    directory: Path
    folder: str
    reference_folder: str | None
    others: dict[str, str]
    """Models beside the policy inside the learner."""
    rows: OfflineRows
    notes: tuple[str, ...] = ()
    """What a user should know of the stage before it starts, a line each."""

    @property
    def name(self) -> str:
        return "sft" if isinstance(self.settings, SupervisedSettings) else "prefer"

    @property
    def columns(self) -> progress.Columns:
        return progress.SUPERVISED if self.name == "sft" else progress.PREFERENCE


def prepare(settings: PolicyStage) -> Prepared:
    """Check models, rows, port, memory and run directory. Raises ConfigError, one line."""
    directory = Path(settings.run_directory).resolve()
    preflight.check_directory(directory, settings)
    endpoint.check(settings.metrics)
    tracking.check(settings.tracking)
    preflight.check_memory(settings.cluster)
    draft = settings.learning(steps=1)
    registry.build(draft)
    folder = loading.locate_policy(settings.policy.model, "policy.model")
    preflight.check_context(folder, draft)
    tokenizer = loading.load_tokenizer(folder, "policy.model")
    ends = text_checks.check_text(folder, settings, tokenizer, None)
    rows = OfflineRows(draft, settings.completions, tokenizer, ends.stop)
    text_checks.check_token_ids(folder, max(rows.largest_token, rows.prompts.largest_token), settings)
    reference: str | None = None
    others: dict[str, str] = {}
    if draft.reference:
        name = draft.reference.model
        reference = str(loading.locate_policy(name, "reference.model") if name else folder)
        others = preflight.learner_folders(draft, folder, reference)
    learning = settings.learning(settings.training.steps(rows.num_training))
    notes = (*ends.notes, *preflight.check_passes(learning, folder, others))
    return Prepared(settings, learning, directory, str(folder), reference, others, rows, notes)


def run(prepared: Prepared, display: Display) -> dict[str, Any]:
    """Train to the end; what stage.json says. A finished stage is not run again."""
    for line in prepared.notes:
        display.note(line)
    place = (prepared.settings, prepared.directory, prepared.rows.digest)
    return offline_loop.conduct(*place, prepared.learning, functools.partial(_train, prepared), display)


async def _train(prepared: Prepared, metrics: RunMetrics, display: Display, started: float) -> dict[str, Any]:
    settings, learning, rows = prepared.settings, prepared.learning, prepared.rows
    completed: Callable[[pa.RecordBatch], pa.RecordBatch] = lambda batch: batch  # noqa: E731
    if prepared.reference_folder:
        logprobs = await ReferenceLogprobs.read(learning, prepared.reference_folder, rows, display)
        completed = logprobs.append
    plan = Course(
        settings=settings,
        directory=prepared.directory,
        steps=learning.run.steps,
        rows=rows.num_training,
        batch=lambda version: completed(rows.step(version)),
        held_out=completed(rows.held_out()),
        dropped=rows.dropped,
        digest=rows.digest,
    )
    learner = learner_group.LearnerGroup(learning, prepared.folder, prepared.others)
    await offline_loop.ready(settings, learner)
    recorder = Recorder(plan, metrics, display)
    state = await offline_loop.restore(plan, learner, recorder)
    metrics.add({"rows_dropped_total": {reason: float(count) for reason, count in rows.dropped.items()}})
    state = await offline_loop.run(plan, learner, recorder, state, plan.model)
    done = {
        "trained_steps": state.version,
        "model_step": offline_loop.kept(plan, state),
        "evaluations": state.evaluations,
    }
    return offline_loop.finish(plan, prepared.name, started, **done)
