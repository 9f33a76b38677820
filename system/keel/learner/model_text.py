"""Text to token ids and back, as a model meets it: a completion always stands behind its prompt.

Tokenized alone a completion would gain a space (SentencePiece puts one in front of every text), decoded alone it would
lose one; and a tokenizer's own end token belongs behind what ended, never behind a prompt or an answer that was cut.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from keel.learner.chat_text import ChatText, Message, named_tokens

_ANCHORS = ("\n", "a", ".", "0", ":")
"""Texts to tokenize or decode another one behind."""
_CONTROL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id")


class ModelText:
    """A tokenizer, and the options of its chat template."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatText(tokenizer, options)
        self._last_prompt: tuple[str, list[int]] = ("", [])

    # ---- to ids

    def prompt_ids(self, texts: Sequence[str], *, rendered: bool) -> list[list[int]]:
        """Ids of prompts. Plain ones get what the tokenizer puts in front, once; rendered ones bring everything."""
        if not texts:  # which tokenizers refuse
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"]
        if rendered:
            return ids
        front = self.around[0]
        # a text that was rendered elsewhere brings its own beginning
        brings = len(front) > 0 and front[-1] == getattr(self.tokenizer, "bos_token_id", None)
        return [front[:-1] + row if brings and row[:1] == front[-1:] else front + row for row in ids]

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it."""
        inner = self._ids("a")
        whole = self.tokenizer("a")["input_ids"]
        starts = [n for n in range(len(whole) - len(inner) + 1) if whole[n : n + len(inner)] == inner]
        return (whole[: starts[0]], whole[starts[0] + len(inner) :]) if inner and starts else ([], [])

    def answer_ids(
        self,
        prompt: str,
        messages: Sequence[Message],
        answer: str | Message,
        *,
        finished: bool,
        stop: Collection[int],
        end: int | None,
    ) -> list[int]:
        """Ids of a completion behind its prompt, with one end token where it ended: what the model would have sampled.

        `messages` of a conversational prompt, else empty. The end token of a conversation is the template's where it
        is among `stop`, else `end`; an answer that brings one of `stop` keeps no second one.
        """
        content, brought = self.without_end(answer if isinstance(answer, str) else answer["content"], stop)
        finished = finished or brought is not None
        if not messages:
            ids = self._behind(prompt, content)
            last = brought if brought in stop else end
            return ids if not finished or last is None or (ids and ids[-1] in stop) else [*ids, last]
        message = {"role": "assistant", **(answer if isinstance(answer, Mapping) else {}), "content": content}
        turn = self.chat.turn(messages, message)
        if finished and self.chat.frame.end in stop:
            whole = self._behind(turn.prompt, turn.answer + turn.closing)
            if self.chat.frame.end in whole:
                return whole[: len(whole) - whole[::-1].index(self.chat.frame.end)]
        ids = self._behind(turn.prompt, turn.answer)
        return [*ids, end] if finished and end is not None else ids

    def without_end(self, content: str, stop: Collection[int]) -> tuple[str, int | None]:
        """The text without an end token that it brings, and that token."""
        names = self._names
        ends = [self.chat.frame.end, getattr(self.tokenizer, "eos_token_id", None), *stop]
        for number in ends:
            if number in names and content.rstrip().endswith(names[number]):
                return content.rstrip().removesuffix(names[number]), number
        return content, None

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return named_tokens(self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _behind(self, prompt: str, text: str) -> list[int]:
        """Ids of a text behind a prompt, whose own ids stay what they are."""
        prompt = self._from_last_marker(prompt)
        if self._last_prompt[0] != prompt:
            self._last_prompt = (prompt, self._ids(prompt))
        first = self._last_prompt[1]
        both = self._ids(prompt + text)
        unknown = getattr(self.tokenizer, "unk_token_id", None)  # may stand for more than the border leaves
        if both[: len(first)] == first and first[-1:] != [unknown]:
            return both[len(first) :]
        for anchor in _ANCHORS:  # a token would join both: the border stays
            first, both = self._ids(anchor), self._ids(anchor + text)
            if first and both[: len(first)] == first and unknown not in first:
                return both[len(first) :]
        return self._ids(text)

    def _from_last_marker(self, prompt: str) -> str:
        """The end of a rendered prompt from its last header on: what stands before changes no ids behind."""
        starts = [prompt.rfind(self._names[number]) for number in self.chat.frame.markers]
        return prompt[max([0, *starts]) :]

    # ---- to text

    def texts(self, rows: Iterable[Sequence[int]], stop: Collection[int], chat: Iterable[bool]) -> list[str]:
        """What completions say: all of it but control tokens (ends, beginnings, padding, headers of turns).

        Special tokens that are part of an answer (<think>, tool tags) stay. Of an answer in a conversation (`chat`) the
        space that the template writes around every answer is left out: the text is the message's content.
        """
        rows = list(rows)
        rows_said = [row[:-1] if len(row) and row[-1] in stop else row for row in rows]
        control = self.control_tokens
        first, before = self._anchor
        kept = [[*first, *(number for number in row if number not in control)] for row in rows_said]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        texts = self.tokenizer.batch_decode(kept, **options)
        answers = zip((text[len(before) :] for text in texts), rows, chat, strict=True)
        return [self._content(text, row) if of_chat else text for text, row, of_chat in answers]

    def _content(self, text: str, row: Sequence[int]) -> str:
        """An answer without the white space between its prompt, itself and its end token."""
        frame = self.chat.frame
        text = text.removeprefix(frame.lead)
        if frame.end is None or list(row[-1:]) != [frame.end]:
            return text
        behind = frame.closing.partition(self._names[frame.end])[0]
        return text if behind.strip() else text.removesuffix(behind)

    @functools.cached_property
    def control_tokens(self) -> frozenset[int]:
        """Tokens that frame texts: by their role in the tokenizer, or around the turns of the template's history."""
        frame = self.chat.frame
        named = [frame.end, *(getattr(self.tokenizer, role, None) for role in _CONTROL)]
        return frozenset(number for number in named if number is not None) | frame.markers

    @functools.cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Ids and text that completions are decoded behind."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        for anchor in _ANCHORS:
            ids = self._ids(anchor)
            if ids and unknown not in ids and self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == anchor:
                return ids, anchor
        return [], ""
