"""Conversations in the forms that data sets have them, and how a prompt and its answers belong together in one."""

import re
from collections.abc import Sequence
from typing import Any

_NAMES_BY_ROLE = {
    "user": ("human", "user"),
    "assistant": ("gpt", "chatgpt", "assistant", "bot", "model"),
    "system": ("system",),
    "tool": ("tool", "function", "observation"),
}
_ROLES = {name: role for role, names in _NAMES_BY_ROLE.items() for name in names}
SYSTEM = ("system", "developer")
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
        turn = {"role": _ROLES.get(speaker.lower(), speaker), "content": turn["value"], **others}
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
    return heads[0], "several_messages" if heads[0] and _role(heads[0][-1]) == "assistant" else None


def joined(prompt: Any, conversations: Sequence[list[Any]]) -> tuple[Any, str | None]:
    """The prompt of conversations that may hold it themselves, and what is wrong with them."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    head, problem = head_of(conversations)
    if problem or not head or not isinstance(messages, list):
        return messages, problem
    instructions = [turn for turn in messages if _role(turn) in SYSTEM]
    if holds(head, prompt):
        return head if _role(head[0]) in SYSTEM else [*instructions, *head], None
    if all(_role(turn) in SYSTEM for turn in head):
        return [*head, *messages], None
    return messages, "different_prompts"


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def holds(conversation: Any, prompt: Any) -> bool:
    """Whether a conversation has the prompt in it: as what a user says, or as its beginning."""
    if not isinstance(conversation, list):
        return False
    if isinstance(prompt, list):
        whole, beginning = (
            [(turn.get("role"), turn.get("content")) for turn in messages if isinstance(turn, dict)]
            for messages in (conversation, prompt)
        )
        without_system = [turn for turn in beginning if turn[0] not in SYSTEM]
        return whole[: len(beginning)] == beginning or whole[: len(without_system)] == without_system
    contents = [turn.get("content") for turn in conversation if _role(turn) == "user"]
    texts = [content.strip() for content in contents if isinstance(content, str)]
    return isinstance(prompt, str) and prompt.strip() in texts
