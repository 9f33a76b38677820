"""What a reward model reads: prompt and completion as one text, in one form for training and scoring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ScoredText:
    """A prompt with one completion, as a reward model reads it."""

    prompt: str
    messages: Sequence[dict[str, Any]]
    """Of a conversational prompt; empty: plain text."""
    completion: str
    finished: bool
    """It ended by itself."""


class RewardText:
    """Text -> tokens of a reward model."""

    def __init__(self, tokenizer: Any, encoder: bool, max_tokens: int) -> None:
        self.tokenizer, self.encoder, self.max_tokens = tokenizer, encoder, max_tokens

    def tokens(self, text: ScoredText, *, cut: bool = True) -> tuple[list[int], int] | None:
        """Token ids, and where the second segment of a pair begins (their number where there is none).

        Too long: the prompt loses its beginning, or None where it may not (`cut`) or that is not enough. None too
        where the chat template refuses the conversation or rewrites the answer.
        """
        found = self._pair(text) if self.encoder else self._one(text)
        if found is None:
            return None
        ids, prompt, second = found
        excess = len(ids) - self.max_tokens
        if excess > 0 and (not cut or excess >= prompt):
            return None
        first = 1 if self.encoder or ids[:1] == [self.tokenizer.bos_token_id] else 0  # it stays in front
        return (ids, second) if excess <= 0 else (ids[:first] + ids[first + excess :], second - excess)

    def _pair(self, text: ScoredText) -> tuple[list[int], int, int]:
        said = "\n".join(message["content"] for message in text.messages) if text.messages else text.prompt
        ids = self.tokenizer(said, text.completion, verbose=False)["input_ids"]
        second = len(self.tokenizer(said, verbose=False)["input_ids"])
        return ids, second - 2, second

    def _one(self, text: ScoredText) -> tuple[list[int], int, int] | None:
        chat = bool(text.messages and self.tokenizer.chat_template)
        found = self._chat(text) if chat else self._plain(text)
        if found is None:
            return None
        before, whole = found
        # a template writes its own special tokens
        encoded = self.tokenizer([whole, before], add_special_tokens=not chat, verbose=False)["input_ids"]
        ids, end = encoded[0], self.tokenizer.eos_token_id
        if not chat and text.finished and end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        return ids, len(encoded[1]), len(ids)

    def _plain(self, text: ScoredText) -> tuple[str, str]:
        said = "\n".join(message["content"] for message in text.messages) + "\n" if text.messages else text.prompt
        return said, said + text.completion

    def _chat(self, text: ScoredText) -> tuple[str, str] | None:
        """None where the template refuses the conversation, or does not say the answer as it is."""
        from jinja2 import TemplateError

        try:
            before, whole = self._rendered(text)
        except TemplateError:
            return None
        said = text.completion.strip()  # some templates strip, too
        start = whole.find(said, len(before)) if whole.startswith(before) else whole.rfind(said)
        if start < 0:
            return None
        return before, whole if text.finished else whole[: start + len(said)]  # without what comes behind an answer

    def _rendered(self, text: ScoredText) -> tuple[str, str]:
        answer = {"role": "assistant", "content": text.completion}
        before = self.tokenizer.apply_chat_template(list(text.messages), add_generation_prompt=True, tokenize=False)
        whole = self.tokenizer.apply_chat_template([*text.messages, answer], tokenize=False)
        return before, whole
