"""Completions that come with the prompts: demonstrations, preference data, scored samples, as rollouts like any other.

A row of the prompt source holds `chosen` and `rejected` (TRL), `responses` and `rewards` (two lists, RLHFlow), or one
demonstration: `completion`, or the last message of `messages`; under other names dataset_layouts.py puts them in place.
Texts, or conversations of which the last message counts. In an online run the generators compute
the current policy's log-probs of these tokens, so staleness and the parity gap mean what they mean online. KL and
entropy do not: see diagnostics.py.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from keel.errors import ConfigError
from keel.learner import end_tokens
from keel.learner.model_text import ModelText
from keel.protocols import Sampling
from keel.rollout.dataset_layouts import ANSWERS
from keel.rollout.datasets import SourceRow
from keel.rollout.row_columns import from_json

_PROBLEMS = {
    "empty": "an empty completion",
    "equal": "equal completions",
    "different_prompts": "completions of different conversations",
    "several_messages": "several messages of the assistant in its last turn",
}
_COLUMNS = ("chosen", "rejected", "responses", "rewards", "completion", "messages")


def completions(columns: Mapping[str, Any]) -> list[str]:
    """Texts of one row, chosen before rejected. Raises KeyError or TypeError when the columns are not there."""
    return [text if isinstance(text, str) else _last(text) for text in _stored(columns)["given"]]


def answers(columns: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    """Texts of one row, or the whole last messages (thoughts, tool calls): what a chat template is given."""
    return [answer if isinstance(answer, str) else answer[-1] for answer in _stored(columns)["given"]]


def _last(conversation: Sequence[Mapping[str, Any]]) -> str:
    """The content of the last message. Raises ValueError where it is not the assistant's."""
    if conversation[-1].get("role", "assistant") != "assistant":
        raise ValueError(f"the last message is the {conversation[-1]['role']}'s")
    return conversation[-1]["content"]


def _stored(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answers of one row as dataset_layouts.py packs them; `given` has them as the source does."""
    if packed := columns.get(ANSWERS):
        return packed
    values: Any
    if "chosen" in columns:
        given, values = [columns["chosen"], columns["rejected"]], [1.0, 0.0]
        ended = [columns.get(f"{side}_finished") is not False for side in ("chosen", "rejected")]
    elif "responses" in columns:
        given, values = columns["responses"], columns.get("rewards")
        ended = [True] * len(given)
    else:
        given, values, ended = [columns["completion" if "completion" in columns else "messages"]], [0.0], [True]
    return {"given": given, "rewards": values, "finished": ended, "problem": None, "labeled": False}


def finished(columns: Mapping[str, Any]) -> list[bool]:
    """Whether each completion of a row ended by itself: all but those that `keel label` marked as cut."""
    return _stored(columns)["finished"]


def rewards(columns: Mapping[str, Any]) -> list[float]:
    """Rewards of one row: its own, or 1 for chosen and 0 for rejected."""
    return [float(value) for value in _stored(columns)["rewards"]]


def is_bad_demonstration(columns: Mapping[str, Any]) -> bool:
    """Whether the row is an answer that its label calls bad (an unpaired preference)."""
    answer = _stored(columns)
    return answer["labeled"] and answer["rewards"] == [0.0]


def is_stored(ticket: int, ratio: float) -> bool:
    """Whether a ticket's completions are those of the source: `ratio` of all tickets, spread evenly."""
    return int((ticket + 1) * ratio) > int(ticket * ratio)


class StoredCompletions:
    """Prompt rows -> tokens of the completions they come with; nothing for rows that are to be sampled."""

    def __init__(
        self, ratio: float, tokenizer: Any, sampling: Sampling, options: Mapping[str, Any] | None = None
    ) -> None:
        """`options`: of the chat template."""
        self.ratio, self.sampling, self.text = ratio, sampling, ModelText(tokenizer, options)

    def __call__(self, prompts: pa.RecordBatch) -> list[list[int]] | None:
        """Tokens of each row with its end token, cut at the budget; [] for rows to sample, None for held-out rows."""
        if (prompts.schema.metadata or {}).get(b"keel.held_out"):
            return None
        is_stored_row = [is_stored(ticket, self.ratio) for ticket in prompts.column("ticket").to_pylist()]
        return [tokens if stored else [] for tokens, stored in zip(self.tokens(prompts), is_stored_row, strict=True)]

    def tokens(self, prompts: pa.RecordBatch) -> list[list[int]]:
        """Tokens of each row's completion, cut at the budget; an end token behind those that ended."""
        names = ("prompt", "prompt_messages", "prompt_columns", "sample")
        rows = list(zip(*(prompts.column(name).to_pylist() for name in names), strict=True))
        encoded = {
            (prompt, messages, columns): self.encode(json.loads(columns), prompt, json.loads(messages))
            for prompt, messages, columns in dict.fromkeys(row[:3] for row in rows)
        }
        return [encoded[row[:3]][row[3]] for row in rows]

    def encode(
        self, columns: Mapping[str, Any], prompt: str = "", messages: Sequence[Mapping[str, Any]] = ()
    ) -> list[list[int]]:
        """Tokens of every completion of one row behind its prompt (`messages` of a conversation), cut at the budget."""
        stop, budget = self.sampling.stop_token_ids, self.sampling.max_tokens
        end = end_tokens.behind_answers(self.text, stop, bool(messages))
        return [
            self.text.answer_ids(prompt, messages, answer, finished=ended, stop=stop, end=end)[:budget]
            for answer, ended in zip(answers(columns), finished(columns), strict=True)
        ]


def check(rows: Sequence[SourceRow], samples: int, source: str) -> None:
    """Raise ConfigError for the first row without as many different scored completions as a prompt has samples."""
    check_shape(rows, samples, source)
    for row in rows:
        if problem := unusable(json.loads(row.further)):
            what = _PROBLEMS[problem]
            raise ConfigError(f"prompts.source={source}: {row.place} has {what}; expected different texts")


def check_shape(rows: Sequence[SourceRow], samples: int, source: str) -> None:
    """Completions are there, as many as wanted, and all of one form. Raises ConfigError."""
    forms: dict[tuple[bool, ...], str] = {}
    for row in rows:
        columns = from_json(row.further)
        try:
            texts, values = completions(columns), rewards(columns)
            conversations = {not isinstance(text, str) for text in _stored(columns)["given"]}
        except (KeyError, TypeError, IndexError, ValueError, AttributeError):
            nulls = [name for name in _COLUMNS if name in columns and columns[name] is None]
            which = f" ({' and '.join(nulls)} is null)" if nulls else ""
            raise ConfigError(
                f"prompts.source={source}: {row.place} has no completions{which}; expected columns chosen and rejected,"
                " responses and rewards, completion, or messages that end with an assistant's"
            ) from None
        problem = ""
        if len(texts) != samples or len(values) != samples:
            counts = f"has {len(texts)} completions and {len(values)} rewards"
            problem = f"{counts}; expected {samples} of each (sampling.samples_per_prompt)"
        elif not all(isinstance(text, str) and _is_utf8(text) for text in texts):
            problem = "has a completion that is no text; expected text"
        elif not all(map(math.isfinite, values)):
            problem = "has a reward that is not finite; expected numbers"
        elif len(conversations) > 1 or (True in conversations and not row.conversational):
            problem = "mixes text and messages; expected messages in prompt and completions, text in both,"
            problem += " or conversations alone (without the column prompt)"
        if problem:
            raise ConfigError(f"prompts.source={source}: {row.place} {problem}")
        forms.setdefault((row.conversational, *conversations), row.place)
    if len(forms) > 1:
        (one, first), (_, second) = list(forms.items())[:2]
        kinds = ["messages" if any(one) else "plain text", "plain text" if any(one) else "messages"]
        raise ConfigError(
            f"prompts.source={source}: {first} is {kinds[0]}, {second} is of another form ({kinds[1]} in prompt or"
            " completion); expected one form in all rows"
        )


def _is_utf8(text: str) -> bool:
    """Whether the text can be written: JSON and Python also have half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unusable(columns: Mapping[str, Any]) -> str | None:
    """Why not to train on this row: empty or equal completions, different conversations; None: it is fine."""
    stored = _stored(columns)
    if stored["problem"]:
        return stored["problem"]
    given = [text for text in stored["given"] if not isinstance(text, str)]
    if any(text[:-1] != given[0][:-1] for text in given):
        return "different_prompts"
    texts = [text.strip() for text in completions(columns)]
    further = [_further(answer) for answer in answers(columns)]
    if not all(text or fields for text, fields in zip(texts, further, strict=True)):
        return "empty"
    return "equal" if len(set(zip(texts, further, strict=True))) < len(texts) else None


def _further(answer: str | Mapping[str, Any]) -> str:
    """What a message says beside its content: thoughts, tool calls."""
    fields = {} if isinstance(answer, str) else {k: v for k, v in answer.items() if k not in ("role", "content") and v}
    return json.dumps(fields, sort_keys=True) if fields else ""
