"""The text of a conversation, as a chat template writes it: one text for training, sampling and scoring.

    render(messages)           what the model reads before it answers ("...<|im_start|>assistant\\n")
    turn(messages, answer)     the same, what the template makes of the answer, and what it writes behind it

A template may add to an answer (an empty think block, a space) or trim it: that is part of the text. Where its text of
the whole conversation does not begin with what the model reads when it samples (the generation prompt opens a think
block, a system message moves), or lacks a part of the answer (thoughts dropped as from a history), a policy trains on
what it would have seen: the prompt as it samples behind it, the answer as written, and the end of a turn.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
_ASKED, _SAID, _ASKED_AGAIN = "719271719", "825382825", "936493936"
"""Contents that no template has in itself, and that none changes by its filters."""
_TAG = re.compile(r"<[^<>\s]+>$")


@dataclass(frozen=True)
class AssistantTurn:
    """An assistant's turn behind a conversation."""

    prompt: str
    answer: str
    """What the template makes of it."""
    closing: str
    """What the template writes behind it; only behind an answer that ended."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around every answer."""

    lead: str = ""
    """White space between the prompt and the answer."""
    tail: str | None = None
    """Everything behind the answer that a conversation ends with; None: unknown."""
    closing: str = ""
    """What closes the answer: the tail, or what would stand there if the conversation went on."""
    end: int | None = None
    """The token that closes the turn."""
    markers: frozenset[int] = frozenset()
    """Tokens around the turns of a history."""


class ChatText:
    """A tokenizer's chat template with its options. Rendering raises jinja2's TemplateError where it refuses."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self._last: tuple[list[Message], str] = ([], "")

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation's text up to the start of the assistant's answer."""
        if self._last[0] != list(messages) or not messages:  # several answers to one conversation come in a row
            self._last = list(messages), self._apply(messages, add_generation_prompt=True)
        return self._last[1]

    def _apply(self, messages: Sequence[Message], **further: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **further, **self.options)
        return text

    def turn(self, messages: Sequence[Message], answer: Message) -> AssistantTurn:
        """The answer behind the prompt that a policy samples from."""
        prompt, whole, content = self.render(messages), self._rendered([*messages, answer]), answer["content"]
        if whole is not None and whole.startswith(prompt) and _says(whole[len(prompt) :], content):
            return self._cut(whole, len(prompt), content)
        return AssistantTurn(prompt, self.frame.lead + _continuing(prompt, content), self.frame.closing)

    def scored(self, messages: Sequence[Message], answer: Message) -> AssistantTurn:
        """The whole conversation, as a reward model reads it; where the template does not say all of it: `turn`."""
        prompt, whole, content = self.render(messages), self._rendered([*messages, answer]), answer["content"]
        if whole is None or not _says(whole, content):
            return self.turn(messages, answer)
        if whole.startswith(prompt):
            return self._cut(whole, len(prompt), content)
        return self._cut(whole, max(0, whole.rfind(content.strip())), content)

    def _cut(self, whole: str, start: int, content: str) -> AssistantTurn:
        """The text in three: what stands before `start`, the answer, what is written behind it."""
        rest, frame, stripped = whole[start:], self.frame, content.strip()
        stop = rest.find(stripped) + len(stripped) if stripped in rest else len(rest)
        if frame.tail is not None and rest.endswith(frame.tail):
            stop = len(rest) - len(frame.tail)
        behind = rest[stop:]
        return AssistantTurn(whole[:start], rest[:stop], frame.closing if behind == frame.tail else behind)

    @functools.cached_property
    def frame(self) -> Frame:
        """What stands around an answer, learned from short conversations; empty where the template refuses them."""
        if not getattr(self.tokenizer, "chat_template", None):
            return Frame()
        asked, answer = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}
        prompt, whole = self._rendered([asked], add_generation_prompt=True), self._rendered([asked, answer])
        history = self._rendered([asked, answer, {"role": "user", "content": _ASKED_AGAIN}])
        if whole is None or _SAID not in whole:
            return Frame()
        lead = whole[len(prompt) : whole.index(_SAID)] if prompt is not None and whole.startswith(prompt) else ""
        closing = tail = whole[whole.index(_SAID) + len(_SAID) :]
        markers = self._named(history or whole)
        end = next(iter(self._named(closing)), None)
        if end is None and history is not None and _SAID in history:
            closing, end = self._closed_by_what_follows(history, closing)
        return Frame("" if lead.strip() else lead, tail, closing, end, frozenset(markers))

    def _closed_by_what_follows(self, history: str, closing: str) -> tuple[str, int | None]:
        """End of a turn in a template that closes it only where another follows, or by the next one's header."""
        between = history[history.index(_SAID) + len(_SAID) : history.index(_ASKED_AGAIN)]
        opening = self._named(history[: history.index(_ASKED)])
        first = next(iter(self._named(between)), None)
        if first is None or (first in opening and first != self.tokenizer.eos_token_id):
            return closing, None
        text = self.tokenizer.decode([first])
        return between[: between.index(text) + len(text)] if text in between else text, first

    def _rendered(self, messages: Sequence[Message], **further: Any) -> str | None:
        """The template's text of a whole conversation; None where it refuses it."""
        from jinja2 import TemplateError

        try:
            return self._apply(messages, **further)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # as the template's code fails
            return None

    def _named(self, text: str) -> list[int]:
        """Tokens of a text that the tokenizer has by name, in their order."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        names = named_tokens(self.tokenizer)
        return [number for number in ids if number in names]


def named_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that no merging of characters makes, by id: special ones and others that were added; no white space."""
    added = {number: str(token) for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    special = dict(zip(*(getattr(tokenizer, f"all_special_{what}", ()) for what in ("ids", "tokens")), strict=True))
    return {number: text for number, text in {**added, **special}.items() if text.strip()}


def _says(text: str, content: str) -> bool:
    """Whether the text has all of the content, white space aside: templates trim, and set thoughts apart by lines."""
    return "".join(content.split()) in "".join(text.split())


def _continuing(prompt: str, content: str) -> str:
    """The content behind a prompt that may have begun it: a think block that the prompt opens is not opened twice."""
    tag = _TAG.search(prompt.rstrip())
    begun = tag is not None and content.lstrip().startswith(tag.group())
    return content.lstrip().removeprefix(tag.group()).lstrip("\n") if tag and begun else content
