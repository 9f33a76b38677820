"""Which tokens end a completion: decided here, for every command, from all sources that name one.

The chat template (what it closes an assistant's turn with), the tokenizer (its end token), generation_config.json and
config.json often name different ones. A sample ends with any of them. One of them is trained behind an answer that
ended: the template's in a conversation, else the tokenizer's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel import reads
from keel.errors import ConfigError
from keel.learner.chat_text import named_tokens
from keel.learner.model_text import ModelText

_TEMPLATE, _TOKENIZER = "chat template", "tokenizer"
_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class EndTokens:
    """The decision, and the lines that report it."""

    stop: tuple[int, ...]
    """A sample ends with the first of these."""
    chat: int | None
    """Stands behind an answer to a conversation."""
    plain: int | None
    """Stands behind any other."""
    notes: tuple[str, ...]
    """Lines that a run prints at its start: the choice, then warnings."""


def behind_answers(text: ModelText, stop: Sequence[int], conversational: bool) -> int | None:
    """The end token that stands behind an answer that ended: of those that stop samples; None where none does."""
    closing, eos = text.chat.frame.end, getattr(text.tokenizer, "eos_token_id", None)
    wanted = [closing, eos] if conversational else [eos, closing]
    return next((number for number in [*wanted, *stop] if number in stop), None)


def decide(
    folder: Path, text: ModelText, vocabulary: int, configured: Sequence[int] | None = None, named: str = "policy.model"
) -> EndTokens:
    """End tokens of the model in a folder; `configured`, `sampling.stop_token_ids`, decides alone where it is set.

    Of the files' ids those count that the tokenizer has as special tokens; generation_config.json, where its author
    wrote it (transformers copies defaults), may name any. Raises ConfigError for a token beyond the vocabulary.
    """
    sources = {
        _TEMPLATE: [number for number in [text.chat.frame.end] if number is not None],
        _TOKENIZER: [number for number in [text.tokenizer.eos_token_id] if number is not None],
        **{file: _of_file(folder / file) for file in _FILES},
    }
    names = named_tokens(text.tokenizer)
    known = {*names, *(sources[_FILES[0]] if _is_written(folder / _FILES[0]) else ())}
    usable = {what: [n for n in ids if n in known and n < vocabulary] for what, ids in sources.items()}
    stop = configured if configured is not None else dict.fromkeys(n for ids in usable.values() for n in ids)
    decision = _Decision(text, names, sources, usable, configured, tuple(stop))
    decision.check(vocabulary, f"{named}={folder}")
    notes = [decision.choice(), *(f"warning: {line}" for line in decision.warnings())]
    return EndTokens(decision.stop, decision.chat, decision.plain, tuple(notes))


def _read(path: Path) -> Mapping[str, Any]:
    """The JSON object of a file; {} where there is none. Raises ReadFailed: a failed read is no missing end token."""
    try:
        tree = json.loads(reads.read(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_written(path: Path) -> bool:
    """A person wrote the generation config; transformers marks what it copied from a model's configuration."""
    return not _read(path).get("_from_model_config", False)


def _of_file(path: Path) -> list[int]:
    """eos_token_id of a configuration file, its text_config included: one id, a list, or nothing."""
    tree = _read(path)
    blocks = [tree, tree.get("text_config")]
    values = [block.get("eos_token_id") for block in blocks if isinstance(block, Mapping)]
    ids = [number for value in values for number in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(number for number in ids if type(number) is int and number >= 0))


@dataclass(frozen=True)
class _Decision:
    """The end tokens that each source names, those that end samples, and the lines about them."""

    text: ModelText
    names: Mapping[int, str]
    sources: Mapping[str, list[int]]
    usable: Mapping[str, list[int]]
    configured: Sequence[int] | None
    stop: tuple[int, ...]

    @property
    def chat(self) -> int | None:
        return behind_answers(self.text, self.stop, conversational=True)

    @property
    def plain(self) -> int | None:
        return behind_answers(self.text, self.stop, conversational=False)

    def show(self, ids: Iterable[int | None]) -> str:
        shown = [f"{self.names.get(n) or self.text.tokenizer.decode([n])!r} ({n})" for n in ids if n is not None]
        return ", ".join(shown) or "none"

    def check(self, vocabulary: int, model: str) -> None:
        for number in self.configured or ():
            if not 0 <= number < vocabulary:
                raise ConfigError(
                    f"sampling.stop_token_ids={list(self.configured or ())}: {number} is beyond the model's vocabulary"
                    f" of {vocabulary}; expected ids from 0 to {vocabulary - 1}"
                )
        for what in (_TEMPLATE, _TOKENIZER):
            for number in self.sources[what]:
                if self.configured is None and number >= vocabulary:
                    token = f"{self.names.get(number, '')} ({number})"
                    raise ConfigError(
                        f"{model}: {token}, the end token of its {what}, is beyond the model's vocabulary of"
                        f" {vocabulary}; expected the model's own tokenizer, or sampling.stop_token_ids"
                    )

    def choice(self) -> str:
        if not self.stop:
            why = "sampling.stop_token_ids=[]" if self.configured is not None else "nothing names one"
            return f"end tokens: none ({why}): completions run to their budget, and none is trained behind answers"
        origins = {n: [what for what, ids in self.usable.items() if n in ids] for n in self.stop}
        if self.configured is not None:
            origins = {n: ["sampling.stop_token_ids"] for n in self.stop}
        listed = "; ".join(f"{self.show([n])} of {', '.join(origins[n])}" for n in self.stop)
        template = bool(self.text.tokenizer.chat_template)
        behind = f"trained behind answers: {self.show([self.chat if template else self.plain])}"
        if template and self.plain != self.chat:
            behind += f", without a conversation {self.show([self.plain])}"
        return f"end tokens: {listed}; {behind}"

    def warnings(self) -> Iterable[str]:
        closing, eos, show = self.text.chat.frame.end, self.text.tokenizer.eos_token_id, self.show
        chat = show([self.chat])
        if self.configured is not None:
            if self.stop and closing is not None and closing not in self.stop:
                named = f"{show([closing])}, with which the chat template closes a turn"
                yield f"sampling.stop_token_ids leaves out {named}"
            return
        if not self.stop:
            yield (
                "nothing can end a completion: chat template, tokenizer, generation_config.json and config.json name no"
                " end token; expected sampling.stop_token_ids, or a tokenizer with an end token"
            )
            return
        if closing is not None and eos is not None and closing != eos:
            yield (
                f"the tokenizer's end token is {show([eos])}, the chat template closes a turn with {show([closing])}:"
                f" both end samples, {chat} is trained behind answers to conversations"
            )
        if self.text.tokenizer.chat_template and closing is None:
            yield f"the chat template closes a turn with no end token of its own: {chat} is trained behind answers"
        wanted = list(dict.fromkeys([*self.sources[_TEMPLATE], *self.sources[_TOKENIZER]]))
        for file in _FILES:
            if self.usable[file] and (absent := [n for n in wanted if n not in self.usable[file]]):
                yield f"{file} names {show(self.usable[file])} and not {show(absent)}: all of them end samples"
            if ignored := [n for n in self.sources[file] if n not in self.usable[file]]:
                yield (
                    f"{file} names {ignored} as end tokens, which are no special tokens of the tokenizer: they end"
                    " nothing; expected sampling.stop_token_ids if they should"
                )
