"""`keel evaluate`: a trained model on held-out prompts, sampled and greedy, beside another model or given answers.

held-out prompts -> generators (policy), generators (other) | given answers
                 -> reference log-probs, every reward -> evaluation_report.py
                 -> DIR/evaluation.arrow (every row), evaluation.json (the table)
"""

import asyncio
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keel import files, schema
from keel.analysis import evaluation_report
from keel.cluster import actors
from keel.config.run import Settings
from keel.errors import ConfigError
from keel.observability.console import Display
from keel.online import preflight, text_checks
from keel.online.models import Models, resolve, with_reference
from keel.rollout.conversations import turns
from keel.rollout.prompts import Prompts
from keel.rollout.stored_completions import StoredCompletions
from keel.stages import sampling

COLUMN = "column:"
_PARTS = 2**40  # offset between the tickets of different answers to one prompt, which are scored apart


@dataclass(frozen=True)
class ModelEvaluation:
    """A checked evaluation."""

    settings: Settings
    directory: Path
    models: Models
    other: Models | None
    """The model to compare with, where there is one."""
    given: pa.RecordBatch | None
    """Answers of the prompt source to compare with, where there are some."""
    prompts: Prompts
    judge: str
    """Name of the column that decides which answer wins or passes."""
    notes: tuple[str, ...] = ()
    """Lines that the evaluation prints at its start."""


def prepare(settings: Settings, model: str, directory: Path) -> ModelEvaluation:
    """Check models, prompts, rewards and memory. Raises ConfigError, one line."""
    preflight.check_memory(settings.cluster)
    preflight.check_reward_sources(settings.rewards)
    models = resolve(settings, model, "MODEL")
    prompts = preflight.check_prompts(settings, models, "MODEL")
    against, other, given, notes = settings.evaluation.against, None, None, models.notes
    if against and against.startswith(COLUMN):
        given = _given(prompts, against.removeprefix(COLUMN), models, settings)
    elif against:
        setting = "evaluation.against"
        other = resolve(settings, against, setting)
        _check_tokenizer(other.tokenizer, models.tokenizer, against)
        text_checks.check_token_ids(Path(other.policy), prompts.largest_token, settings, setting)
        notes += tuple(f"{against}: {line}" for line in other.notes if other.notes != models.notes)
    scored = with_reference(models, settings)
    _check_ensembles(settings)
    judge = f"reward_{settings.evaluation.judge}" if settings.evaluation.judge else "reward"
    notes += scored.notes[len(models.notes) :]
    return ModelEvaluation(settings, directory, scored, other, given, prompts, judge, notes)


def _check_ensembles(settings: Settings) -> None:
    """Refuse ensembles that compare samples of one prompt: greedy and given answers are single. Raises ConfigError."""
    for name, ensemble in {
        "": settings.ensemble,
        **{f"rewards.{r.name}.": r.ensemble for r in settings.rewards},
    }.items():
        if ensemble.center and ensemble.form in ("lower_bound", "worst", "variance", "kl_dro"):
            raise ConfigError(
                f"{name}ensemble.center=true: form={ensemble.form} compares samples of one prompt, an evaluation has"
                " single answers; expected false"
            )


def _check_tokenizer(other: Any, tokenizer: Any, against: str) -> None:
    """Refuse a model whose tokenizer or template differs from MODEL's. Raises ConfigError."""
    if other.get_vocab() != tokenizer.get_vocab() or other.chat_template != tokenizer.chat_template:
        raise ConfigError(
            f"evaluation.against={against}: its tokenizer or chat template is not MODEL's; expected a model of the same"
            " family, or its answers in a column of the prompts (column:NAME)"
        )


def _given(prompts: Prompts, column: str, models: Models, settings: Settings) -> pa.RecordBatch:
    """Put the answers of a column behind the held-out prompts, in the generators' columns. Raises ConfigError."""
    rows = prompts.held_out()
    further = [json.loads(columns) for columns in rows.column("prompt_columns").to_pylist()]
    answers = [turns(columns.get(column)) for columns in further]
    answers = [answer[-1].get("content") if _is_conversation(answer) else answer for answer in answers]
    texts = [answer if isinstance(answer, str) else None for answer in answers]
    if not all(texts):
        missing = sum(not text for text in texts)
        raise ConfigError(
            f"evaluation.against={COLUMN}{column}: {missing} of {len(texts)} held-out prompts have no answer there;"
            " expected a text in every row"
        )
    uncut = dataclasses.replace(models.sampling(settings.sampling), max_tokens=_PARTS)
    completions = StoredCompletions(1.0, models.tokenizer, uncut, settings.policy.chat_template_options)
    answered = zip(texts, *(rows.column(name).to_pylist() for name in ("prompt", "prompt_messages")), strict=True)
    tokens = [completions.encode({"completion": text}, *(p, json.loads(m)))[0] for text, p, m in answered]
    return schema.append(rows, schema.given(tokens, [str(text) for text in texts]))


def _is_conversation(answer: Any) -> bool:
    return isinstance(answer, list) and bool(answer) and isinstance(answer[-1], dict)


def run(prepared: ModelEvaluation, display: Display) -> dict[str, Any]:
    """Sample, score and report; returns the content of evaluation.json."""
    started = time.monotonic()
    for line in prepared.notes:
        display.note(line)
    display.note(actors.connect(prepared.settings))
    try:
        batch = asyncio.run(_rows(prepared, display))
    finally:
        actors.disconnect()
    config = prepared.settings.evaluation
    report = evaluation_report.report(batch, prepared.judge, config.pass_at, config.pass_threshold)
    report |= {
        "model": prepared.models.policy,
        "against": config.against,
        "seconds": round(time.monotonic() - started, 1),
    }
    files.make_folder(prepared.directory)
    files.write(prepared.directory / "evaluation.arrow", schema.to_bytes(batch))
    files.write_json(prepared.directory / "evaluation.json", report)
    return report


async def _rows(prepared: ModelEvaluation, display: Display) -> pa.RecordBatch:
    """Sample and score all answers, with the columns `model` and `decoding`."""
    settings = prepared.settings
    parts: list[tuple[str, str, pa.RecordBatch]] = []
    for model, models in (("policy", prepared.models), ("other", prepared.other)):
        if models is not None:
            draws = models.sampling(settings.sampling)
            samplers = sampling.Samplers(settings, models.policy, settings.generators.max_sequences)
            rows = prepared.prompts.held_out(settings.evaluation.samples_per_prompt)
            parts.append((model, "sampled", await samplers.answer(rows, draws, display, f"{model}, sampled")))
            if settings.evaluation.greedy:
                greedy, rows = dataclasses.replace(draws, temperature=0.0), prepared.prompts.held_out()
                parts.append((model, "greedy", await samplers.answer(rows, greedy, display, f"{model}, greedy")))
            samplers.stop()
    if prepared.given is not None:
        parts.append(("other", "given", prepared.given))
    together = schema.concat([_apart(part, number) for number, (_, _, part) in enumerate(parts)])
    scored = await sampling.score(settings, prepared.models.reference, together, display)
    sizes = [part.num_rows for _, _, part in parts]
    labels = {
        "model": pa.array(np.repeat([model for model, _, _ in parts], sizes)),
        "decoding": pa.array(np.repeat([decoding for _, decoding, _ in parts], sizes)),
    }
    return schema.append(_apart(scored, 0), pa.RecordBatch.from_pydict(labels))


def _apart(batch: pa.RecordBatch, part: int) -> pa.RecordBatch:
    """The rows with tickets that no other part has; part 0 gets the original ones."""
    tickets = batch.column("ticket").to_numpy() % _PARTS + part * _PARTS
    index = batch.schema.get_field_index("ticket")
    moved = batch.set_column(index, batch.schema.field(index), pa.array(tickets, pa.int64()))
    return moved.replace_schema_metadata(None)
