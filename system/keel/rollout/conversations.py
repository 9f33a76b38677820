"""Conversations in the forms that data sets have them, and how a prompt and its answers belong together in one."""

import re
from collections.abc import Sequence
from typing import Any

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_SYSTEM = ("system", "developer")
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def turns(value: Any, transcripts: bool = False) -> Any:
    """A conversation as {role, content} messages, in whatever form it comes; anything else as it is."""
    if isinstance(value, str):
        anthropic = transcripts and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value
        return _of_transcript(value) if anthropic else value
    if isinstance(value, dict) and isinstance(value.get("messages"), list):  # OpenAI's preference format
        value = value["messages"]
    if isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message(turn) for turn in value]


def _message(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    if turn.get("role") is None and isinstance(turn.get("from"), str) and "value" in turn:
        others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
        speaker = turn["from"]
        turn = {"role": _SPEAKERS.get(speaker.lower(), speaker), "content": turn["value"], **others}
    if turn.get("content") is None and turn.get("tool_calls"):  # OpenAI: a call alone says nothing
        turn = {**turn, "content": ""}
    parts = turn.get("content")
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        turn = {**turn, "content": "".join(str(part.get("text")) for part in parts)}
    return turn


def _of_transcript(text: str) -> list[dict[str, str]]:
    """Messages of Anthropic's "Human: ... Assistant: ..."."""
    pieces = _TRANSCRIPT.split(text.strip("\n"))[1:]
    speakers = ["user" if name == "Human" else "assistant" for name in pieces[0::2]]
    return [{"role": role, "content": content.strip()} for role, content in zip(speakers, pieces[1::2], strict=True)]


def head_of(conversations: Sequence[list[Any]]) -> tuple[Any, str | None]:
    """What comes before the answers, and what is wrong with it."""
    heads = [conversation[:-1] for conversation in conversations]
    if any(head != heads[0] for head in heads):
        return heads[0], "different_prompts"
    ends = bool(heads[0]) and isinstance(heads[0][-1], dict) and heads[0][-1].get("role") == "assistant"
    return heads[0], "several_messages" if ends else None


def joined(prompt: Any, conversations: Sequence[list[Any]]) -> tuple[Any, str | None]:
    """The prompt of conversations that may hold it themselves, and what is wrong with them."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    head, problem = head_of(conversations)
    if problem or not head or not isinstance(messages, list):
        return messages, problem
    instructions = [turn for turn in messages if isinstance(turn, dict) and turn.get("role") in _SYSTEM]
    if holds(head, prompt):
        return head if _begins_with_system(head) else [*instructions, *head], None
    if all(isinstance(turn, dict) and turn.get("role") in _SYSTEM for turn in head):
        return [*head, *messages], None
    return messages, "different_prompts"


def _begins_with_system(messages: Sequence[Any]) -> bool:
    return isinstance(messages[0], dict) and messages[0].get("role") in _SYSTEM


def holds(conversation: Any, prompt: Any) -> bool:
    """Whether a conversation has the prompt in it: as what a user says, or as its beginning."""
    if not isinstance(conversation, list):
        return False
    if isinstance(prompt, list):
        whole, beginning = (
            [(turn.get("role"), turn.get("content")) for turn in messages if isinstance(turn, dict)]
            for messages in (conversation, prompt)
        )
        without_system = [turn for turn in beginning if turn[0] not in _SYSTEM]
        return whole[: len(beginning)] == beginning or whole[: len(without_system)] == without_system
    return isinstance(prompt, str) and any(
        isinstance(turn, dict)
        and turn.get("role") == "user"
        and isinstance(turn.get("content"), str)
        and turn["content"].strip() == prompt.strip()
        for turn in conversation
    )
