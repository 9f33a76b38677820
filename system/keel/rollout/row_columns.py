"""Columns of a row that are no prompt, as JSON text and back: what reward functions get, and what rollouts keep.

| in the source | what a reward function gets |
|---|---|
| what JSON can hold | the same |
| NaN, infinities | the same; over HTTP null |
| dates, times, decimals, ids | text |
| arrays and sets | lists |
| bytes, images, other objects | nothing, unless a function names the column as a parameter: then bytes |
"""

import base64
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from keel import user_code
from keel.config.rewards import RewardSettings
from keel.errors import ConfigError

_FLOAT, _BYTES = "keel.float", "keel.bytes"
_DEEPEST = 100
_AS_TEXT = (date, time, timedelta, Decimal, UUID, Path)

Asked = Callable[[], frozenset[str]]
"""Names of the columns that reward functions have as parameters."""


class Unreadable:
    """What stands where a value could not be made an object of Python's."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return self.reason


class _NoJson(Exception):
    """A value that JSON cannot hold in any form; the argument is its type."""


def asked_columns(rewards: Iterable[RewardSettings]) -> frozenset[str]:
    """Parameters of the reward functions; of one that cannot be loaded, which preflight refuses, none."""
    names: set[str] = set()
    for reward in rewards:
        if reward.kind == "rule":
            try:
                names |= set(inspect.signature(user_code.import_symbol(reward.source, reward.name)).parameters)
            except (ConfigError, ValueError, TypeError):  # the latter two: built-in functions without a signature
                continue
    return frozenset(names)


def to_json(rows: Sequence[Mapping[str, Any]], asked: Asked, refused: Callable[[str], ConfigError]) -> list[str]:
    """One JSON object a row, all with the same keys: a column that cannot be held in one row is left out of all.

    Raises what `refused` makes of a message where a reward function asks for such a column.
    """
    trees: list[Mapping[str, Any]] = []
    left_out: dict[str, str] = {}
    texts = []
    for row in rows:
        text = _dumped(row)
        texts.append(text)
        trees.append(row if text is not None else _held(row, asked, left_out))
    for name in sorted(set(left_out) & asked()):
        raise refused(f"column {name} holds {left_out[name]}, which no reward function can be given; expected bytes")
    if left_out:
        trees = [{name: value for name, value in tree.items() if name not in left_out} for tree in trees]
        texts = [None] * len(trees)
    return [text or json.dumps(tree, default=_as_text) for text, tree in zip(texts, trees, strict=True)]


def is_json(value: Any) -> bool:
    """Whether a value of a message is there, and JSON can hold it."""
    return value is not None and _dumped({"": value}) is not None


def _dumped(row: Mapping[str, Any]) -> str | None:
    """The row as plain JSON in UTF-8; None where that cannot hold it."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
        text.encode()
    except (TypeError, ValueError, RecursionError):  # a type, or a NaN, that JSON has not; half a surrogate pair
        return None
    return text


def _held(row: Mapping[str, Any], asked: Asked, left_out: dict[str, str]) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for name, value in row.items():
        try:
            held[name] = _plain(value, name, asked)
        except _NoJson as error:
            left_out.setdefault(name, str(error))
    return held


def _plain(value: Any, column: str, asked: Asked, depth: int = 0) -> Any:
    """The value in types that JSON has, NaN and (of columns that are asked for) bytes marked. Raises _NoJson."""
    if depth > _DEEPEST:
        raise _NoJson("lists in lists without end")
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, column, asked, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner, column, asked, depth + 1) for inner in value]
    if isinstance(value, bytes | bytearray | memoryview) and column in asked():
        return {_BYTES: base64.b64encode(value).decode()}
    if not isinstance(value, memoryview) and callable(getattr(value, "tolist", None)):  # of numpy or torch
        return _plain(value.tolist(), column, asked, depth + 1)
    raise _NoJson(f"a {type(value).__name__}")


def from_json(text: str) -> dict[str, Any]:
    """The columns of a row."""
    return json.loads(text, object_hook=_marked)


def _marked(tree: dict[str, Any]) -> Any:
    if tree.keys() == {_FLOAT}:
        return float(tree[_FLOAT])
    return base64.b64decode(tree[_BYTES]) if tree.keys() == {_BYTES} else tree


def for_http(tree: Any) -> Any:
    """The same in strict JSON: null for what is not finite, base64 text for bytes."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    if isinstance(tree, bytes):
        return base64.b64encode(tree).decode()
    if isinstance(tree, dict):
        return {key: for_http(value) for key, value in tree.items()}
    return [for_http(value) for value in tree] if isinstance(tree, list) else tree


def _as_text(value: Any) -> str:
    if isinstance(value, _AS_TEXT):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
