"""Where prompts come from: JSONL, Parquet, Hugging Face datasets or a Python function, all to checked rows.

A prompt is a string or a list of {role, content} messages. dataset_layouts.py decides which column holds it, and
which the answers; all other columns are for reward functions (row_columns.py).

Every mistake becomes a ConfigError of one line that names the source and the line or row.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from keel import user_code
from keel.config.prompts import PromptSettings
from keel.errors import ConfigError
from keel.rollout import dataset_layouts
from keel.rollout.conversations import SYSTEM, holds, turns
from keel.rollout.dataset_layouts import ANSWERS, DatasetLayout
from keel.rollout.row_columns import Asked, Unreadable, is_json, to_json
from keel.text import one_line

_FORMS = "a .jsonl, .json or .parquet file, a Hugging Face dataset folder or hub name, or python:module:function"
_SUFFIXES = (".jsonl", ".json", ".parquet")
_MESSAGES = "a string or a list of {role, content} messages"
_TURN = ("role", "content")
_MOST_DIGITS = 4000
_NAMED = " (prompts.columns.prompt=NAME)"

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class SourceRow:
    """One row of the source, checked."""

    place: str
    """Where the user finds it: `line 7` (from 1) of a JSONL file, `row 6` (from 0) of anything else."""
    prompt: Prompt
    """Text, or messages with the system message in front."""
    further: str
    """All columns but the prompt's as a JSON object, the same keys in every row; row_columns.py reads it."""
    conversational: bool = False
    """The source gives messages, not text."""

    @property
    def text(self) -> str:
        """What people and rule rewards read: the text, or the last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        contents = [message["content"] for message in self.prompt if message["role"] == "user"]
        return contents[-1] if contents else self.prompt[-1]["content"]


def read_rows(prompts: PromptSettings, samples: int = 0, asked: Asked = frozenset) -> list[SourceRow]:
    """All rows of `prompts.source`, at least one, with `samples` answers each. Raises ConfigError."""
    raw = _open(prompts)
    if not raw:
        raise wrong(prompts, "no rows; expected one prompt a row")
    for place, columns in raw:
        if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns):
            raise wrong(prompts, f"{place} is {_describe(columns)}; expected an object with {prompts.column}")
    layout = _layout(raw, prompts, samples)
    readings = [layout.read(columns) for _, columns in raw]
    prompt_column = layout.roles.get("prompt") if "prompt" in layout.named else prompts.column
    further = [name for name in layout.names if name != prompt_column]
    trees = [{name: columns.get(name) for name in further} for _, columns in raw]
    if any(reading.answers for reading in readings):
        trees = [{**tree, ANSWERS: reading.answers} for tree, reading in zip(trees, readings, strict=True)]
    texts = to_json(trees, asked, lambda message: wrong(prompts, message))
    rows = []
    for (place, _), reading, text in zip(raw, readings, texts, strict=True):
        prompt = _prompt(reading.prompt, f"{place}: column {reading.column}", reading.explicit, prompts)
        rows.append(SourceRow(place, prompt, text, reading.conversational))
    for row in rows:
        _check_text(row, prompts)
    return rows


def _layout(raw: Sequence[tuple[str, dict[str, Any]]], prompts: PromptSettings, samples: int) -> DatasetLayout:
    """The layout of all rows. Raises ConfigError."""
    names = list(dict.fromkeys(name for _, columns in raw for name in columns))
    layout = dataset_layouts.recognize(names, prompts, samples)
    if label := dataset_layouts.label_column([columns for _, columns in raw], layout):
        layout = dataclasses.replace(layout, roles={**layout.roles, "label": label})
    beside = {"messages", "chosen"} & layout.roles.keys()
    if samples or "prompt" not in layout.roles or "prompt" in layout.named or not beside:
        return layout
    column = layout.roles["prompt"]
    held = [holds(turns(row.get(layout.conversation(row))), row.get(column)) for _, row in raw]
    texts = [isinstance(row.get(column), str) for _, row in raw]
    if any(held) and all(texts):
        if not all(held):
            other = layout.conversation(raw[0][1])
            raise wrong(
                prompts,
                f"{raw[held.index(False)][0]}: column {column} is not in the conversation of {other}, elsewhere it is;"
                f" expected prompts.columns.prompt={column} (the text alone), or rows of one form",
            )
        return dataclasses.replace(layout, within=True)
    return layout


def _check_text(row: SourceRow, prompts: PromptSettings) -> None:
    """The prompt can be written as UTF-8; JSON and Python also have half surrogate pairs, which cannot."""
    try:
        json.dumps(row.prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise wrong(prompts, f"{row.place}: {error}; expected text in UTF-8") from None


def wrong(prompts: PromptSettings, message: str) -> ConfigError:
    """The error for a mistake inside the source."""
    return ConfigError(f"{prompts.source_setting}={prompts.source}: {message}")


def _describe(value: Any) -> str:
    """Type and the value's beginning, on one line."""
    if value is None:
        return "null"
    shown = one_line(repr(value))
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


def _number(rows: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"row {number}", columns) for number, columns in enumerate(rows)]


def _read_file(path: Path, prompts: PromptSettings) -> list[tuple[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return _number(_rows_of(pq.read_table(path)))
        content = path.read_bytes()
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:  # not UTF-8; a date that Python has not
        raise wrong(prompts, f"cannot be read: {one_line(error)}; expected {_FORMS}") from None
    if path.suffix == ".json" and content.lstrip()[:1] == b"[":
        return _number(_parse(content, None, prompts))
    if path.suffix not in (".jsonl", ".json"):
        raise wrong(prompts, f"unknown file type {path.suffix!r}; expected {_FORMS}")
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    return [(f"line {number}", _parse(line, number, prompts)) for number, line in lines]


def _parse(content: bytes, line: int | None, prompts: PromptSettings) -> Any:
    """The JSON value of one line of the file, or (no line number) of the whole file."""
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_int=_integer)
    except json.JSONDecodeError as error:
        problem = f"line {line or error.lineno} is not JSON: {error.msg} at character {error.colno}"
        raise wrong(prompts, f"{problem}; expected one object a line, or a list of objects in .json") from None
    except UnicodeError as error:
        raise wrong(prompts, f"line {line or 1}: {error}; expected text in UTF-8") from None
    except RecursionError as error:  # brackets without end
        raise wrong(prompts, f"line {line or 1} cannot be read: {error}; expected an object of texts") from None
    return value


def _integer(digits: str) -> int | str:
    """A number of thousands of digits, which Python does not read, stays text."""
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


def _call(prompts: PromptSettings) -> list[Any]:
    """What `python:module:function` returns for `prompts.options`."""
    module, _, name = prompts.source.removeprefix("python:").partition(":")
    if not module or not name.isidentifier():
        raise wrong(prompts, "expected python:module:function")
    try:
        function = user_code.import_module(module).__dict__.get(name)
        if not callable(function):
            raise wrong(prompts, f"module {module} has no function {name}; expected python:module:function")
        _check_options(function, prompts)
        rows = function(**prompts.options)
    except ImportError as error:
        raise wrong(prompts, f"cannot be imported: {one_line(error)}; expected installed code") from None
    if not isinstance(rows, list):
        raise wrong(prompts, f"the function returned {_describe(rows)}; expected a list of row dicts")
    return rows


def _check_options(function: Callable[..., Any], prompts: PromptSettings) -> None:
    try:
        inspect.signature(function).bind(**prompts.options)
    except TypeError as error:
        raise ConfigError(
            f"prompts.options={prompts.options}: {one_line(error)}; expected arguments of {prompts.source}"
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
            return _rows_of(builder.as_dataset(split=prompts.split).with_format("arrow")[:])
        loaded = datasets.load_from_disk(str(folder))
    except ConfigError:
        raise
    # offline, unknown name or split, broken data files; RuntimeError: a loading script; the rest: a damaged folder
    except (DatasetsError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        where = f"cannot be loaded as a dataset with {prompts.split_setting}={prompts.split}"
        raise wrong(prompts, f"{where}: {one_line(error)}; expected {_FORMS}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if prompts.split not in loaded:
            problem = f"no such split in {prompts.source}; expected one of {', '.join(loaded)}"
            raise ConfigError(f"{prompts.split_setting}={prompts.split}: {problem}")
        loaded = loaded[prompts.split]
    return _rows_of(loaded.with_format("arrow")[:])


def _rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of a table; a column that Python has no values for holds Unreadable, an error only where it is read."""
    columns = [_values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> Sequence[Any]:
    try:
        return column.to_pylist()
    # not UTF-8; a date that Python has not; nanoseconds; a type that only another library knows
    except (pa.ArrowException, ValueError, OverflowError, ImportError, TypeError) as error:
        return [Unreadable(one_line(error))] * len(column)


def _prompt(value: Any, where: str, explicit: bool, prompts: PromptSettings) -> Prompt:
    """The checked prompt of a row; one that is not explicit ends before the last assistant turn."""
    if not isinstance(value, str | list):
        raise wrong(prompts, f"{where} is {_describe(value)}; expected {_MESSAGES}")
    if isinstance(value, str) and not explicit:
        raise wrong(prompts, f"{where} is text; expected a list of messages, or a column {prompts.column}" + _NAMED)
    if isinstance(value, str) and prompts.system_prompt is None:
        messages: list[dict[str, Any]] = []
        empty = not value.strip()
    else:
        turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
        messages = _messages(turns, where, explicit, prompts)
        empty = not any(message["content"].strip() for message in messages if message["role"] not in SYSTEM)
    if empty:
        raise wrong(prompts, f"{where} is an empty prompt; expected {_MESSAGES}")
    if messages and messages[-1]["role"] == "assistant":
        raise wrong(prompts, f"{where} ends with an assistant's message; expected a user's last")
    return messages or value


def _messages(turns: list[Any], where: str, explicit: bool, prompts: PromptSettings) -> list[dict[str, Any]]:
    """Checked messages, the system message in front; one that the row has stays."""
    messages = []
    for turn in turns:
        parts = [turn.get(key) if isinstance(turn, dict) else None for key in ("role", "content")]
        if not all(isinstance(part, str) for part in parts):
            raise wrong(prompts, f"{where} has a message {_describe(turn)}; expected text `role` and `content`")
        # Arrow puts nulls where other rows have more keys; templates would take them for given
        messages.append({key: value for key, value in turn.items() if key in _TURN or is_json(value)})
    while not explicit and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    has_system = bool(messages) and messages[0]["role"] in SYSTEM
    if not has_system and prompts.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": prompts.system_prompt})
    return messages
