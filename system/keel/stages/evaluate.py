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
from keel.learner import forward_contract, loading
from keel.observability.console import Display
from keel.online import preflight, text_checks
from keel.protocols import Sampling
from keel.rollout.conversations import turns
from keel.rollout.prompts import Prompts
from keel.rollout.stored_completions import StoredCompletions
from keel.stages import sampling

COLUMN = "column:"
_PARTS = 2**40  # tickets of different answers to one prompt are kept apart while they are scored


@dataclass(frozen=True)
class Prepared:
    """A checked evaluation."""

    settings: Settings
    directory: Path
    folder: str
    other_folder: str | None
    given: pa.RecordBatch | None
    """Answers that the prompt source has."""
    reference_folder: str | None
    prompts: Prompts
    draws: Sampling
    other_draws: Sampling
    """The same with the other model's end tokens."""
    judge: str
    """Column that decides who wins and what passes."""
    notes: tuple[str, ...] = ()
    """What the evaluation says first: where its texts end."""


def prepare(settings: Settings, model: str, directory: Path) -> Prepared:
    """Check models, prompts, rewards and memory. Raises ConfigError, one line."""
    preflight.check_memory(settings.cluster)
    for reward in settings.rewards:
        preflight.check_reward_source(reward, f"rewards.{reward.name}.source")
    folder = loading.locate_policy(model, "MODEL")
    preflight.check_context(folder, settings)
    tokenizer = loading.load_tokenizer(folder, "MODEL")
    by, stop = settings.sampling, settings.sampling.stop_token_ids
    ends = text_checks.check_text(folder, settings, tokenizer, stop, "MODEL")
    prompts = Prompts(settings, tokenizer)
    text_checks.check_token_ids(folder, prompts.largest_token, settings, "MODEL")
    preflight.check_rewards(settings, prompts.batch([0, 1]))
    draws = Sampling(by.temperature, by.top_p, by.max_tokens, ends.stop)
    others, notes = draws, ends.notes
    against = settings.evaluation.against
    other = given = None
    if against and against.startswith(COLUMN):
        given = _given(prompts, against.removeprefix(COLUMN), tokenizer, draws, settings)
    elif against:
        other = str(loading.locate_policy(against, "evaluation.against"))
        preflight.check_context(Path(other), settings)
        _check_tokenizer(loading.load_tokenizer(Path(other), "evaluation.against"), tokenizer, against)
        theirs = text_checks.check_text(Path(other), settings, tokenizer, stop, "evaluation.against")
        text_checks.check_token_ids(Path(other), prompts.largest_token, settings, "evaluation.against")
        others = dataclasses.replace(draws, stop_token_ids=theirs.stop)
        notes += tuple(f"{against}: {line}" for line in theirs.notes if theirs.notes != ends.notes)
    reference = None
    if settings.reference:
        reference = str(loading.locate_policy(settings.reference.model or settings.policy.model, "reference.model"))
        preflight.check_vocabulary(folder, Path(reference), "reference.model")
        notes += tuple(forward_contract.require({"reference.model": reference}, settings.max_model_tokens))
    _check_ensembles(settings)
    judge = f"reward_{settings.evaluation.judge}" if settings.evaluation.judge else "reward"
    place = (settings, directory, str(folder), other, given, reference, prompts, draws, others, judge)
    return Prepared(*place, notes)


def _check_ensembles(settings: Settings) -> None:
    """A greedy or given answer is alone: there are no samples to compare it with. Raises ConfigError."""
    for name, by in {"": settings.ensemble, **{f"rewards.{r.name}.": r.ensemble for r in settings.rewards}}.items():
        if by.center and by.form in ("lower_bound", "worst", "variance"):
            raise ConfigError(
                f"{name}ensemble.center=true: form={by.form} compares samples of one prompt, an evaluation has single"
                " answers; expected false"
            )


def _check_tokenizer(theirs: Any, ours: Any, against: str) -> None:
    """Both models read the same prompt tokens, and the reference the answers of both. Raises ConfigError."""
    if theirs.get_vocab() != ours.get_vocab() or theirs.chat_template != ours.chat_template:
        raise ConfigError(
            f"evaluation.against={against}: its tokenizer or chat template is not MODEL's; expected a model of the same"
            " family, or its answers in a column of the prompts (column:NAME)"
        )


def _given(prompts: Prompts, column: str, tokenizer: Any, draws: Sampling, settings: Settings) -> pa.RecordBatch:
    """Held-out rows with the answers of a column as completions, in the generators' columns. Raises ConfigError."""
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
    whole = dataclasses.replace(draws, max_tokens=_PARTS)  # nobody cuts what was given
    completions = StoredCompletions(1.0, tokenizer, whole, settings.policy.chat_template_options)
    said = zip(texts, *(rows.column(name).to_pylist() for name in ("prompt", "prompt_messages")), strict=True)
    tokens = [completions.encode({"completion": text}, *(p, json.loads(m)))[0] for text, p, m in said]
    return schema.append(rows, schema.given(tokens, [str(text) for text in texts]))


def _is_conversation(answer: Any) -> bool:
    return isinstance(answer, list) and bool(answer) and isinstance(answer[-1], dict)


def run(prepared: Prepared, display: Display) -> dict[str, Any]:
    """Answer, score, report; what evaluation.json says."""
    started = time.monotonic()
    for line in prepared.notes:
        display.note(line)
    display.note(actors.connect(prepared.settings))
    try:
        batch = asyncio.run(_rows(prepared, display))
    finally:
        actors.disconnect()
    by = prepared.settings.evaluation
    found = evaluation_report.report(batch, prepared.judge, by.pass_at, by.pass_threshold)
    found |= {"model": prepared.folder, "against": by.against, "seconds": round(time.monotonic() - started, 1)}
    files.make_folder(prepared.directory)
    files.write(prepared.directory / "evaluation.arrow", schema.to_bytes(batch))
    files.write_json(prepared.directory / "evaluation.json", found)
    return found


async def _rows(prepared: Prepared, display: Display) -> pa.RecordBatch:
    """All answers, scored, with the columns `model` and `decoding`."""
    settings = prepared.settings
    parts: list[tuple[str, str, pa.RecordBatch]] = []
    sides = (("policy", prepared.folder, prepared.draws), ("other", prepared.other_folder, prepared.other_draws))
    for model, folder, draws in sides:
        if folder is not None:
            samplers = sampling.Samplers(settings, folder, settings.generators.max_sequences)
            rows = prepared.prompts.held_out(settings.evaluation.samples_per_prompt)
            parts.append((model, "sampled", await samplers.answer(rows, draws, display, f"{model}, sampled")))
            if settings.evaluation.greedy:
                greedy, rows = dataclasses.replace(draws, temperature=0.0), prepared.prompts.held_out()
                parts.append((model, "greedy", await samplers.answer(rows, greedy, display, f"{model}, greedy")))
            samplers.stop()
    if prepared.given is not None:
        parts.append(("other", "given", prepared.given))
    together = schema.concat([_apart(part, number) for number, (_, _, part) in enumerate(parts)])
    scored = await sampling.score(settings, prepared.reference_folder, together, display)
    sizes = [part.num_rows for _, _, part in parts]
    labels = {
        "model": pa.array(np.repeat([model for model, _, _ in parts], sizes)),
        "decoding": pa.array(np.repeat([decoding for _, decoding, _ in parts], sizes)),
    }
    return schema.append(_apart(scored, 0), pa.RecordBatch.from_pydict(labels))


def _apart(batch: pa.RecordBatch, part: int) -> pa.RecordBatch:
    """The rows with tickets of their own; part 0: as they were."""
    tickets = batch.column("ticket").to_numpy() % _PARTS + part * _PARTS
    index = batch.schema.get_field_index("ticket")
    moved = batch.set_column(index, batch.schema.field(index), pa.array(tickets, pa.int64()))
    return moved.replace_schema_metadata(None)
