"""What a reward model reads: prompt and completion as one text, in one form for training and scoring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.learner.model_text import ModelText


@dataclass(frozen=True)
class ScoredText:
    """A prompt with one completion, as a reward model reads it."""

    prompt: str
    messages: Sequence[dict[str, Any]]
    """Of a conversational prompt; empty: plain text."""
    completion: str
    finished: bool
    """It ended by itself."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the answer's message, beside role and content: thoughts, tool calls."""


class RewardText:
    """Text -> tokens of a reward model."""

    def __init__(
        self, tokenizer: Any, encoder: bool, max_tokens: int, options: Mapping[str, Any] | None = None
    ) -> None:
        """`options`: of the chat template."""
        self.tokenizer, self.encoder, self.max_tokens = tokenizer, encoder, max_tokens
        self.options = dict(options or {})
        self.text = ModelText(tokenizer, options)

    def tokens(self, text: ScoredText, *, cut: bool = True) -> tuple[list[int], int] | None:
        """Token ids, and where the second segment of a pair begins (their number where there is none).

        Too long: the prompt loses its beginning, or None where it may not (`cut`) or that is not enough. None too
        where the chat template refuses the conversation.
        """
        tokens = self._pair(text) if self.encoder else self._one(text)
        if tokens is None:
            return None
        ids, prompt, second = tokens
        excess = len(ids) - self.max_tokens
        if excess > 0 and (not cut or excess >= prompt):
            return None
        first = 1 if self.encoder or ids[:1] == [self.tokenizer.bos_token_id] else 0  # it stays in front
        return (ids, second) if excess <= 0 else (ids[:first] + ids[first + excess :], second - excess)

    def _pair(self, text: ScoredText) -> tuple[list[int], int, int]:
        prompt = "\n".join(message["content"] for message in text.messages) if text.messages else text.prompt
        ids = self.tokenizer(prompt, text.completion, verbose=False)["input_ids"]
        second = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        return ids, second - 2, second

    def _one(self, text: ScoredText) -> tuple[list[int], int, int] | None:
        chat = bool(text.messages and self.tokenizer.chat_template)
        parts = self._chat(text) if chat else self._plain(text)
        if parts is None:
            return None
        before, whole = self.text.prompt_ids(parts, rendered=chat)  # no end token that the tokenizer puts behind
        end = self.tokenizer.eos_token_id
        if not chat and text.finished and end is not None and whole[-1:] != [end]:
            whole = [*whole, end]
        return whole, len(before), len(whole)

    def _plain(self, text: ScoredText) -> tuple[str, str]:
        prompt = "\n".join(message["content"] for message in text.messages) + "\n" if text.messages else text.prompt
        return prompt, prompt + text.completion

    def _chat(self, text: ScoredText) -> tuple[str, str] | None:
        """Prompt, and the whole; behind an answer that was cut nothing. None where the template refuses it."""
        from jinja2 import TemplateError

        content, brought = self.text.without_end(text.completion, ())
        try:
            turn = self.text.chat.scored(text.messages, {**text.fields, "role": "assistant", "content": content})
        except TemplateError:
            return None
        ended = text.finished or brought is not None
        return turn.prompt, turn.prompt + turn.answer + (turn.closing if ended else "")
