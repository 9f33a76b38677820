"""`keel reward`: Bradley-Terry reward models from preference pairs, one or an ensemble.

pairs -> tokens | held out (by prompt) | training order, with replacement for each of several members
member 0, 1, ...   one offline run each on the learner group          -> members/N/
                   -> one model of their mean weights, where members.average_weights
all members        scored as they were written: reference set, held-out pairs
                   -> offsets (the reference set scores 0 on average), report.json, model/
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, schema
from keel.analysis import reward_report
from keel.cluster import learner_group
from keel.config.prompts import PromptSettings
from keel.config.rewards import RewardSettings
from keel.config.stages import RewardModelSettings
from keel.errors import ConfigError
from keel.learner import activation_checkpointing, loading, reward_models, score_contract
from keel.learner.reward_learner import PAIR, RewardModelLearner
from keel.learner.reward_models import RewardText, ScoredText
from keel.observability.console import Display
from keel.observability.metrics import RunMetrics
from keel.online import preflight, text_checks
from keel.rollout import datasets, prompts, stored_completions
from keel.rollout.datasets import SourceRow
from keel.rollout.offline_rows import digest_of, usable_rows
from keel.rollout.reward_functions import describe
from keel.rollout.row_columns import from_json
from keel.stages import offline_loop, sampling
from keel.stages.offline_loop import OfflineRecorder, OfflineRun

_MEMBER_SEEDS = 1000


class PairRows:
    """The usable pairs of the source as texts and tokens, split into held-out and training pairs by prompt."""

    def __init__(self, settings: RewardModelSettings, text: RewardText) -> None:
        """Raises ConfigError, one line, for every mistake in the source."""
        self.settings, self.text = settings, text
        rows = datasets.read_rows(settings.prompts, 2)
        stored_completions.check_shape(rows, 2, settings.prompts.source)
        usable, self.dropped = usable_rows(rows, settings.completions, self._problem, settings.prompts.source)
        self.digest = digest_of(usable)
        self.pairs = [best_first(row) for row in usable]
        self.margins = [self._margin(row) for row in usable]
        identities = [json.dumps(row.prompt) for row in usable]
        self.held_out, self.train = prompts.split(identities, settings.prompts)
        if further := len(usable) - len(self.held_out) - len(self.train):
            self.dropped["of_held_out_prompt"] = further
        self.counts = {"read": len(rows), "held_out": len(self.held_out), "train": len(self.train), **self.dropped}

    def _problem(self, row: SourceRow) -> str | None:
        first, second = stored_completions.rewards(json.loads(row.further))
        if first == second:
            return "tie"
        tokens = [self.text.tokens(text, cut=False) for text in texts(row)]
        return None if all(tokens) else "too_long"

    def _margin(self, row: SourceRow) -> float:
        column = self.settings.margin_column
        if column is None:
            return self.settings.margin
        value = from_json(row.further).get(column)
        if not isinstance(value, int | float) or not math.isfinite(value):
            shown = value if isinstance(value, float | None) else describe(value)
            raise ConfigError(f"margin_column={column}: {row.place} has {shown} there; expected a number")
        return self.settings.margin + value

    def step(self, version: int, member: int) -> pa.RecordBatch:
        """Draw the pairs of a member's step, with replacement if the ensemble is a bootstrap; a pure function."""
        settings, count = self.settings, len(self.train)
        seed = settings.run.seed * _MEMBER_SEEDS + member
        size = settings.training.rows_per_step
        places = np.array([prompts.place_of(t, count, seed) for t in range(version * size, (version + 1) * size)])
        if settings.members.bootstrap and settings.members.count > 1:
            places = np.random.Generator(np.random.PCG64([seed, 7])).integers(0, count, count)[places]
        return self.batch(self.train[places])

    def batch(self, places: np.ndarray) -> pa.RecordBatch:
        """Build the PAIR columns of these pairs."""
        rows = [self.text.tokens(text) for place in places for text in self.pairs[place]]
        columns = {
            "tokens": [row[0] for row in rows if row],
            "second": [row[1] for row in rows if row],
            "margin": np.repeat([self.margins[place] for place in places], 2).astype(np.float32),
        }
        return schema.build(PAIR, columns)


def texts(row: SourceRow) -> list[ScoredText]:
    """Pair every completion of a row with its prompt."""
    columns = json.loads(row.further)
    messages = [] if isinstance(row.prompt, str) else row.prompt
    answered = zip(
        stored_completions.completions(columns),
        stored_completions.answers(columns),
        stored_completions.finished(columns),
        strict=True,
    )
    return [
        ScoredText(row.text, messages, completion, finished, {} if isinstance(answer, str) else dict(answer))
        for completion, answer, finished in answered
    ]


def best_first(row: SourceRow) -> list[ScoredText]:
    """The two completions of a row, ordered by falling reward."""
    pair, values = texts(row), stored_completions.rewards(json.loads(row.further))
    return pair if values[0] > values[1] else pair[::-1]


@dataclass(frozen=True)
class RewardTraining:
    """A checked stage that trains reward models."""

    settings: RewardModelSettings
    directory: Path
    folder: str
    rows: PairRows
    reference: Sequence[ScoredText]
    """Texts that score 0 on average after centering; empty: scores are not centered."""
    steps: int
    notes: tuple[str, ...] = ()
    """Lines that the stage prints at its start."""


def prepare(settings: RewardModelSettings) -> RewardTraining:
    """Check model, rows, port, memory and run directory. Raises ConfigError, one line."""
    from transformers import AutoConfig

    directory = preflight.check_place(settings)
    folder = loading.locate(settings.policy.model, "policy.model")
    tokenizer = loading.load_tokenizer(folder, "policy.model")
    trunk = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    reward_models.check_trunk(trunk, settings.policy.model)
    limit = min(settings.completions.max_tokens, reward_models.limit(trunk))
    reward_models.check_readable(folder, "policy.model")
    activation_checkpointing.check_supported(folder, "policy.model", settings.learners.activation_checkpointing)
    score_contract.check_scores(folder, "policy.model")
    encoder, options = reward_models.is_encoder(trunk), settings.policy.chat_template_options
    text_checks.check_template_options(options, tokenizer, "policy.chat_template_options")
    rows = PairRows(settings, RewardText(tokenizer, encoder, limit, options))
    steps = settings.training.steps(len(rows.train))
    notes = () if encoder else text_checks.check_text(folder, settings, tokenizer, None).notes
    return RewardTraining(settings, directory, str(folder), rows, _reference(settings, rows), steps, notes)


def _reference(settings: RewardModelSettings, rows: PairRows) -> list[ScoredText]:
    """Draw up to `center.max_rows` texts of the reference set, in an order that follows from the seed."""
    center = settings.center
    if center.source is not None:
        source = PromptSettings(source=center.source, system_prompt=settings.prompts.system_prompt)
        reference_rows = datasets.read_rows(source, 1)
        stored_completions.check_shape(reference_rows, 1, center.source)
        candidates = [text for row in reference_rows if rows.text.tokens(text := texts(row)[0])]
        if not candidates:
            raise ConfigError(f"center.source={center.source}: every completion is too long; expected one that fits")
    else:
        sides = {"all": (0, 1), "chosen": (0,), "rejected": (1,), "none": ()}[center.rows]
        candidates = [rows.pairs[place][side] for place in rows.train for side in sides]
    count = len(candidates)
    return [candidates[prompts.place_of(t, count, settings.run.seed)] for t in range(min(center.max_rows, count))]


def run(prepared: RewardTraining, display: Display) -> dict[str, Any]:
    """Train all members to the end, unless the stage is finished; returns the summary in stage.json."""
    for line in prepared.notes:
        display.note(line)
    place = (prepared.settings, prepared.directory, prepared.rows.digest)
    return offline_loop.conduct(*place, functools.partial(_train, prepared), display)


async def _train(prepared: RewardTraining, metrics: RunMetrics, display: Display, started: float) -> dict[str, Any]:
    settings, rows = prepared.settings, prepared.rows
    learner = learner_group.RankGroup(RewardModelLearner, settings.learners, settings, prepared.folder, prepared.steps)
    await offline_loop.ready(settings, learner)
    metrics.add({"rows_dropped_total": {reason: float(count) for reason, count in rows.dropped.items()}})
    plans = [_offline_run(prepared, member) for member in range(settings.members.count)]
    for member, plan in enumerate(plans):
        if offline_loop.finished(plan.directory) is None:
            display.doing(f"member {member}")
            metrics.path = plan.directory / "metrics.jsonl"
            await offline_loop.call(plan, learner, RewardModelLearner.begin, member)
            recorder = OfflineRecorder(plan, metrics, display)
            state = await offline_loop.restore(plan, learner, recorder)
            await offline_loop.run(plan, learner, recorder, state)
            offline_loop.finish(
                plan, "member", started, evaluations=state.evaluations, model_step=offline_loop.kept(plan, state)
            )
    first_member = offline_loop.finished(plans[0].directory) or {}
    folders = [plan.model for plan in plans]
    learner.stop()
    display.doing("scoring held-out pairs")
    target = prepared.directory / "model"
    # copies: finished members are sealed by their digests
    members = _assemble(target, folders, average=settings.members.average_weights)
    report = await _judge(prepared, members, folders, display)
    files.replace_folder(_aside(target), target)
    files.write_json(prepared.directory / "report.json", report)
    first = {name: first_member[name] for name in ("evaluations", "model_step")}
    whole = dataclasses.replace(plans[0], directory=prepared.directory)
    return offline_loop.finish(whole, "reward", started, **first, report=report)


def _offline_run(prepared: RewardTraining, member: int) -> OfflineRun:
    rows = prepared.rows
    directory = prepared.directory / "members" / str(member)
    files.make_folder(directory)
    return OfflineRun(
        settings=prepared.settings,
        directory=directory,
        steps=prepared.steps,
        rows=len(rows.train),
        batch=lambda version: rows.step(version, member),
        held_out=rows.batch(rows.held_out),
        dropped=rows.dropped,
        digest=rows.digest,
        member=member if prepared.settings.members.count > 1 else None,
    )


async def _judge(
    prepared: RewardTraining, folders: Sequence[Path], trained: Sequence[Path], display: Display
) -> dict[str, Any]:
    """Center the models on the reference set and report on the held-out pairs, both as the scorer sees them.

    The `trained` members are scored beside their mean, uncentered: if it is worse than they are, they share no basin.
    """
    averaged = trained if prepared.settings.members.average_weights else []
    rows = prepared.rows
    held_out = [text for place in rows.held_out for text in rows.pairs[place]]
    scored = [*prepared.reference, *held_out]
    scores = await _scores(prepared.settings, [*folders, *averaged], scored, display)
    assert np.isfinite(scores).all()  # all of them fit: they were trained on, or cut
    scores, of_averaged = scores[: len(folders)], scores[len(folders) :, len(prepared.reference) :]
    count = len(prepared.reference)
    offsets = scores[:, :count].mean(1) if count else np.zeros(len(folders))
    for folder, offset in zip(folders, offsets, strict=True):
        reward_models.center(folder, float(offset))
    judged = scores[:, count:] - offsets[:, None]
    lengths = np.array([len(text.completion) for text in held_out], np.float64)
    report = reward_report.report(judged[:, 0::2], judged[:, 1::2], (lengths[0::2], lengths[1::2]))
    if len(of_averaged):
        margins = of_averaged[:, 0::2] - of_averaged[:, 1::2]
        report["member_accuracies"] = [float(reward_report.accuracies(one).mean()) for one in margins]
    return {**report, "offsets": offsets.tolist(), "reference_rows": count}


async def _scores(
    settings: RewardModelSettings, folders: Sequence[Path], scored: Sequence[ScoredText], display: Display
) -> np.ndarray:
    """Score the texts by every member with the scorer of online training: float64 [members, texts]."""
    rewards = [RewardSettings(name=f"m{n}", kind="model", source=str(folder)) for n, folder in enumerate(folders)]
    batch = await sampling.score(settings.scoring_spec(rewards), None, reward_models.as_batch(scored), display)
    return np.stack(
        [batch.column(f"reward_{reward.name}").to_numpy(zero_copy_only=False) for reward in rewards]
    ).astype(float)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _assemble(target: Path, folders: Sequence[Path], *, average: bool) -> list[Path]:
    """Put the one model, the members' mean, or all members and ensemble.json into a temporary folder.

    Returns the folders of the models in it.
    """
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if average:
        reward_models.average_weights(aside, folders)
        return [aside]
    if len(folders) == 1:
        shutil.copytree(folders[0], aside)
        return [aside]
    names = [f"member-{number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        shutil.copytree(folder, aside / name)
    reward_models.write_ensemble(aside, names)
    return [aside / name for name in names]
