"""Where prompts come from: JSONL, Parquet, Hugging Face datasets or a Python function, all to checked rows.

TRL's dataset conventions: a prompt is a string or a list of {role, content} messages; preference and
prompt-completion rows work, their answers are further columns. Where the column `prompt` is missing it is the
conversation in `messages` or `chosen` up to its last assistant turn. No other name is guessed.

Every mistake becomes a ConfigError of one line that names the source and the line or row.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from keel import extension
from keel.config import ConfigError
from keel.prompt_settings import PromptSettings

_FORMS = "a .jsonl, .json or .parquet file, a Hugging Face dataset folder or hub name, or python:module:function"
_SUFFIXES = (".jsonl", ".json", ".parquet")
_MESSAGES = "a string or a list of {role, content} messages"
_SYSTEM = ("system", "developer")
_IMPLICIT = ("messages", "chosen")
_RESERVED = {"prompts", "completions", "completion_ids"}  # what a reward function is called with anyway

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row of the source, checked."""

    place: str
    """Where the user finds it: `line 7` (from 1) of a JSONL file, `row 6` (from 0) of anything else."""
    prompt: Prompt
    """Text, or messages with the system message in front."""
    further: str
    """All columns but `prompts.column` as a JSON object, the same keys in every row."""
    conversational: bool = False
    """The source gives messages, not text."""

    @property
    def text(self) -> str:
        """What people and rule rewards read: the text, or the last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        said = [message["content"] for message in self.prompt if message["role"] == "user"]
        return said[-1] if said else self.prompt[-1]["content"]


def read(prompts: PromptSettings) -> list[Row]:
    """All rows of `prompts.source`, at least one. Raises ConfigError."""
    raw = _open(prompts)
    if not raw:
        raise wrong(prompts, "no rows; expected one prompt a row")
    for place, columns in raw:
        if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns):
            raise wrong(prompts, f"{place} is {_describe(columns)}; expected an object with {prompts.column}")
    names = list(dict.fromkeys(name for _, columns in raw for name in columns))
    column = _prompt_column(names, prompts)
    further = [name for name in names if name != prompts.column]
    rows = [
        Row(
            place,
            _prompt(columns.get(column), f"{place}: column {column}", column == prompts.column, prompts),
            _as_json({name: columns.get(name) for name in further}, place, "further columns", prompts),
            isinstance(columns.get(column), list),
        )
        for place, columns in raw
    ]
    for row in rows:
        _check_text(row, prompts)
    return rows


def _check_text(row: Row, prompts: PromptSettings) -> None:
    """All of a row can be written as UTF-8; JSON and Python also have half surrogate pairs, which cannot."""
    try:
        (_as_json(row.prompt, row.place, "messages", prompts) + row.further).encode()
    except UnicodeEncodeError as error:
        raise wrong(prompts, f"{row.place}: {error}; expected text in UTF-8") from None


def wrong(prompts: PromptSettings, message: str) -> ConfigError:
    """The error for a mistake inside the source."""
    return ConfigError(f"prompts.source={prompts.source}: {message}")


def _describe(value: Any) -> str:
    """Type and the value's beginning, on one line."""
    if value is None:
        return "null"
    shown = _one_line(repr(value))
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _open(prompts: PromptSettings) -> list[tuple[str, Any]]:
    """(place, columns) of every row."""
    path = Path(prompts.source).expanduser()
    if prompts.source.startswith("python:"):
        return _number(_call(prompts))
    if path.is_file():
        return _read_file(path, prompts)
    looks_like_path = path.suffix in _SUFFIXES or prompts.source.startswith((".", "/", "~"))
    if looks_like_path and not path.is_dir():
        raise wrong(prompts, f"no such file or folder; expected {_FORMS}")
    return _number(_load_dataset(path if path.is_dir() else None, prompts))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _number(rows: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"row {number}", columns) for number, columns in enumerate(rows)]


def _read_file(path: Path, prompts: PromptSettings) -> list[tuple[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return _number(pq.read_table(path).to_pylist())
        content = path.read_bytes()
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:  # not UTF-8; a date that Python has not
        raise wrong(prompts, f"cannot be read: {_one_line(error)}; expected {_FORMS}") from None
    if path.suffix == ".json" and content.lstrip()[:1] == b"[":
        return _number(_parse(content, None, prompts))
    if path.suffix not in (".jsonl", ".json"):
        raise wrong(prompts, f"unknown file type {path.suffix!r}; expected {_FORMS}")
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    return [(f"line {number}", _parse(line, number, prompts)) for number, line in lines]


def _parse(content: bytes, line: int | None, prompts: PromptSettings) -> Any:
    """The JSON value of one line of the file, or (no line number) of the whole file."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        problem = f"line {line or error.lineno} is not JSON: {error.msg} at character {error.colno}"
        raise wrong(prompts, f"{problem}; expected one object a line, or a list of objects in .json") from None
    except UnicodeError as error:
        raise wrong(prompts, f"line {line or 1}: {error}; expected text in UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        raise wrong(prompts, f"line {line or 1} cannot be read: {error}; expected an object of texts") from None
    return value


def _call(prompts: PromptSettings) -> list[Any]:
    """What `python:module:function` returns for `prompts.options`."""
    module, _, name = prompts.source.removeprefix("python:").partition(":")
    if not module or not name.isidentifier():
        raise wrong(prompts, "expected python:module:function")
    try:
        function = extension.import_module(module).__dict__.get(name)
        if not callable(function):
            raise wrong(prompts, f"module {module} has no function {name}; expected python:module:function")
        _check_options(function, prompts)
        rows = function(**prompts.options)
    except ImportError as error:
        raise wrong(prompts, f"cannot be imported: {_one_line(error)}; expected installed code") from None
    if not isinstance(rows, list):
        raise wrong(prompts, f"the function returned {_describe(rows)}; expected a list of row dicts")
    return rows


def _check_options(function: Callable[..., Any], prompts: PromptSettings) -> None:
    try:
        inspect.signature(function).bind(**prompts.options)
    except TypeError as error:
        raise ConfigError(
            f"prompts.options={prompts.options}: {_one_line(error)}; expected arguments of {prompts.source}"
        ) from None


def _load_dataset(folder: Path | None, prompts: PromptSettings) -> list[Any]:
    """Rows of one split of a saved dataset, a folder of data files, or (no folder) a hub name."""
    import datasets  # a second to import, and not needed for files
    from datasets.exceptions import DatasetsError
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    saved = folder and any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if not saved:
            builder = datasets.load_dataset_builder(str(folder or prompts.source))
            if isinstance(builder, WebDataset):  # torch.load reads what is called .pth in an archive
                raise wrong(prompts, f"an archive (.tar), which may hold pickles; expected {_FORMS}")
            builder.download_and_prepare()
            return builder.as_dataset(split=prompts.split).to_list()
        found = datasets.load_from_disk(str(folder))
    except ConfigError:
        raise
    # offline, unknown name or split, broken data files; RuntimeError: a loading script; the rest: a damaged folder
    except (DatasetsError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        where = f"cannot be loaded as a dataset with prompts.split={prompts.split}"
        raise wrong(prompts, f"{where}: {_one_line(error)}; expected {_FORMS}") from None
    if isinstance(found, datasets.Dataset):
        return found.to_list()
    if prompts.split not in found:
        problem = f"no such split in {prompts.source}; expected one of {', '.join(found)}"
        raise ConfigError(f"prompts.split={prompts.split}: {problem}")
    return found[prompts.split].to_list()


def _prompt_column(names: list[str], prompts: PromptSettings) -> str:
    """The column the prompt is read from; refuses a missing one and names a reward function cannot take."""
    if taken := _RESERVED.intersection(names):
        raise wrong(prompts, f"column {min(taken)}: reward functions use that name; expected another")
    if prompts.column in names:
        return prompts.column
    implicit = [name for name in _IMPLICIT if name in names]
    if prompts.column == "prompt" and implicit:
        return implicit[0]
    near = difflib.get_close_matches(prompts.column, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    present = ", ".join(names) or "(it has no columns)"
    problem = f"no such column in {prompts.source}; expected one of {present}{hint}"
    raise ConfigError(f"prompts.column={prompts.column}: {problem}")


def _prompt(value: Any, where: str, explicit: bool, prompts: PromptSettings) -> Prompt:
    """The checked prompt of a row; one that is not explicit ends before the last assistant turn."""
    if not isinstance(value, str | list):
        raise wrong(prompts, f"{where} is {_describe(value)}; expected {_MESSAGES}")
    if isinstance(value, str) and not explicit:
        raise wrong(prompts, f"{where} is text; expected a list of messages, or a column {prompts.column}")
    if isinstance(value, str) and prompts.system_prompt is None:
        messages: list[dict[str, Any]] = []
        empty = not value.strip()
    else:
        turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
        messages = _messages(turns, where, explicit, prompts)
        empty = not any(each["content"].strip() for each in messages if each["role"] not in _SYSTEM)
    if empty:
        raise wrong(prompts, f"{where} is an empty prompt; expected {_MESSAGES}")
    if messages and messages[-1]["role"] == "assistant":
        raise wrong(prompts, f"{where} ends with an assistant's message; expected a user's last")
    return messages or value


def _messages(turns: list[Any], where: str, explicit: bool, prompts: PromptSettings) -> list[dict[str, Any]]:
    """Checked messages, the system message in front; an own one stays."""
    messages = []
    for turn in turns:
        parts = [turn.get(key) if isinstance(turn, dict) else None for key in ("role", "content")]
        if not all(isinstance(part, str) for part in parts):
            raise wrong(prompts, f"{where} has a message {_describe(turn)}; expected text `role` and `content`")
        # Arrow puts nulls where other rows have more keys; templates would take them for given
        messages.append({key: value for key, value in turn.items() if value is not None})
    while not explicit and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    own = bool(messages) and messages[0]["role"] in _SYSTEM
    if not own and prompts.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": prompts.system_prompt})
    return messages


def _as_json(tree: Any, place: str, what: str, prompts: PromptSettings) -> str:
    try:
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, default=_as_text)
    except (TypeError, ValueError, RecursionError) as error:  # a type, or a NaN, that JSON has not
        raise wrong(prompts, f"{place}: {what}: {error}; expected what JSON can hold") from None


def _as_text(value: Any) -> str:
    if isinstance(value, date | time | Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
