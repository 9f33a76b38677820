"""Sources: every kind gives the same rows, every mistake one line that says where."""

import json
import sys
import types
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keel.rollout.prompts import Prompts
from prompt_files import (
    BOS,
    BOT,
    CHAT,
    HELLO,
    HOW,
    KIND,
    PLAIN,
    SYS,
    USER,
    WORDS,
    WORLD,
    YOU,
    every_row,
    jsonl,
    one_line,
    settings_for,
    word_tokenizer,
)

# ---- sources

ROWS = [{"prompt": text, "topic": str(n)} for n, text in enumerate(["hello world", "how are you", "be kind"])]


def write_jsonl(path: Path) -> Path:
    (path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(map(json.dumps, ROWS)).encode())
    return path / "a.jsonl"


def write_json_list(path: Path) -> Path:
    (path / "a.json").write_text(json.dumps(ROWS, indent=2))
    return path / "a.json"


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path / "a.parquet")
    return path / "a.parquet"


def write_saved_dataset(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path / "saved"))
    return path / "saved"


def write_saved_splits(path: Path) -> Path:
    other = datasets.Dataset.from_list(ROWS[:1])
    splits = datasets.DatasetDict({"test": other, "train": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(path / "splits"))
    return path / "splits"


def write_folder_of_files(path: Path) -> Path:
    (path / "folder").mkdir()
    jsonl(path / "folder" / "train.jsonl", ROWS)
    return path / "folder"


def write_module(path: Path) -> str:
    (path / "prompts_for_a_test.py").write_text(f"def rows():\n    return {ROWS!r}\n")
    sys.path.insert(0, str(path))
    return "python:prompts_for_a_test:rows"


FILES = [write_jsonl, write_json_list, write_parquet, write_saved_dataset, write_saved_splits]
OTHERS = [write_folder_of_files, write_module]


@pytest.mark.parametrize("write", [*FILES, *OTHERS], ids=lambda write: write.__name__)
def test_every_kind_of_source_gives_the_same_rows(
    restored_process: None, tmp_path: Path, monkeypatch: Any, write: Any
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    result = every_row(Prompts(settings_for(write(tmp_path)), PLAIN))
    assert [row["prompt"] for row in result] == ["hello world", "how are you", "be kind"]
    assert [json.loads(row["prompt_columns"]) for row in result] == [{"topic": str(n)} for n in range(3)]
    assert [row["prompt_id"] for row in result] == [0, 1, 2]


def test_parquet_messages_and_dates_come_through(tmp_path: Path) -> None:
    """Arrow fills keys that other messages have with nulls: a template must not see them."""
    template = "{% for m in messages %}{% if m.name is defined %}<sys>{% endif %} {{ m.content }}{% endfor %}"
    first = [{"role": "user", "content": "hello", "name": "you"}]
    rows = [{"prompt": first if n == 0 else [{"role": "user", "content": str(n)}]} for n in range(3)]
    for row in rows:
        row["day"] = date(2026, 1, 2)  # type: ignore[assignment]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    result = every_row(Prompts(settings_for(tmp_path / "a.parquet"), word_tokenizer(template, numbers=200)))
    assert [row["prompt_tokens"] for row in result] == [[SYS, HELLO], [len(WORDS) + 1], [len(WORDS) + 2]]
    assert json.loads(result[0]["prompt_columns"]) == {"day": "2026-01-02"}


def test_the_prompt_may_be_in_another_column(tmp_path: Path) -> None:
    rows = [{"question": "hello", "prompt": 5}, {"question": "world"}, {"question": "you"}]
    result = every_row(Prompts(settings_for(jsonl(tmp_path / "a.jsonl", rows), column="question"), PLAIN))
    assert [row["prompt"] for row in result] == ["hello", "world", "you"]
    assert json.loads(result[0]["prompt_columns"]) == {"prompt": 5}


@pytest.mark.parametrize("column", ["messages", "chosen"])
def test_implicit_prompt_ends_before_the_last_assistant_turn(tmp_path: Path, column: str) -> None:
    def conversation(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]

    rows = [conversation("hello", "world", "how", "are"), conversation("you", "be"), conversation("kind")]
    rows[1].append({"role": "assistant", "content": "kind"})  # a turn may be two messages
    prompts = Prompts(settings_for(jsonl(tmp_path / "a.jsonl", [{column: row} for row in rows])), CHAT)
    result = every_row(prompts)
    assert [row["prompt_tokens"] for row in result] == [
        [BOS, USER, HELLO, BOT, WORLD, USER, HOW, BOT],
        [BOS, USER, YOU, BOT],
        [BOS, USER, KIND, BOT],
    ]
    assert json.loads(result[0]["prompt_columns"])[column] == rows[0]  # the reference answer is in it


def test_preference_rows_use_the_prompt_alone(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "chosen": "hello", "rejected": "world"} for n in range(3)]
    result = every_row(Prompts(settings_for(jsonl(tmp_path / "a.jsonl", rows)), PLAIN))
    assert [row["prompt_tokens"] for row in result] == [[BOS, len(WORDS) + n] for n in range(3)]
    assert json.loads(result[0]["prompt_columns"]) == {"chosen": "hello", "rejected": "world"}


def test_further_columns_are_json_with_the_same_keys_in_every_row(tmp_path: Path) -> None:
    rows = [{"answer": 4, "prompt": "0"}, {"prompt": "1", "tags": ["ä", {"b": None}]}, {"prompt": "2"}]
    result = every_row(Prompts(settings_for(jsonl(tmp_path / "a.jsonl", rows)), PLAIN))
    assert [json.loads(row["prompt_columns"]) for row in result] == [
        {"answer": 4, "tags": None},
        {"answer": None, "tags": ["ä", {"b": None}]},
        {"answer": None, "tags": None},
    ]


# ---- mistakes


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    missing = one_line(tmp_path / "no.jsonl")
    assert missing.startswith(f"prompts.source={tmp_path / 'no.jsonl'}: no such file") and "python:" in missing
    assert "no such file or folder" in one_line("./nothing-here")
    (tmp_path / "a.csv").write_text("prompt\nhello\n")
    assert "unknown file type '.csv'; expected a .jsonl, .json or .parquet file" in one_line(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("no parquet")
    assert "cannot be read: " in one_line(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]"])
def test_empty_source(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert one_line(tmp_path / "a.json").endswith("a.json: no rows; expected one prompt a row")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            b'{"prompt": "hello"',
            "line 3 is not JSON: Expecting ',' delimiter at character 19; expected one object",
        ),
        (b'{"prompt": "hell\xff"}', "line 3: 'utf-8' codec can't decode byte 0xff"),
        (b'{"prompt": "hello \\ud83d"}', "line 3: 'utf-8' codec can't encode character '\\ud83d'"),
        (b'["hello"]', "line 3 is list ['hello']; expected an object with prompt"),
        (b"7", "line 3 is int 7; expected an object with prompt"),
        (
            b'{"other": 1}',
            "line 3: column prompt is null; expected a string or a list of {role, content} messages",
        ),
        (b'{"prompt": 5}', "line 3: column prompt is int 5; expected a string or a list of"),
        (
            b'{"prompt": {"role": "user"}}',
            "line 3: column prompt is dict {'role': 'user'}; expected a string or",
        ),
        (b'{"prompt": " \\t"}', "line 3: column prompt is an empty prompt"),
        (b'{"prompt": []}', "line 3: column prompt is an empty prompt"),
        (b'{"prompt": [{"role": "user", "content": " "}]}', "line 3: column prompt is an empty prompt"),
        (
            b'{"prompt": [{"role": "system", "content": "be kind"}]}',
            "line 3: column prompt is an empty prompt",
        ),
        (b'{"prompt": ["hello"]}', "line 3: column prompt has a message str 'hello'; expected text `role`"),
        (
            b'{"prompt": [{"role": "user"}]}',
            "line 3: column prompt has a message dict {'role': 'user'}; expected",
        ),
        (
            b'{"prompt": [{"role": "user", "content": "you"}, {"role": "assistant", "content": "be"}]}',
            "line 3: column prompt ends with an assistant's message; expected a user's last",
        ),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path: Path, line: bytes, expected: str) -> None:
    good = b'{"prompt": "hello"}\n\n'
    (tmp_path / "a.jsonl").write_bytes(good + line + b'\n{"prompt": "world"}\n{"prompt": "be"}\n')
    message = one_line(tmp_path / "a.jsonl", CHAT)
    assert message.startswith(f"prompts.source={tmp_path / 'a.jsonl'}: {expected}")


def test_a_malformed_json_list_names_the_line_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"prompt": "hello"},\n{"prompt" "world"}\n]')
    assert "line 3 is not JSON: Expecting ':' delimiter at character 11" in one_line(tmp_path / "a.json")


def test_an_empty_prompt_with_a_system_prompt_is_still_empty(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "hello"}, {"prompt": " "}, {"prompt": "world"}])
    assert "line 2: column prompt is an empty prompt" in one_line(source, CHAT, system_prompt="be kind")
    pq.write_table(pa.Table.from_pylist([{"prompt": "hello"}, {"prompt": ""}]), tmp_path / "a.parquet")
    assert "a.parquet: row 1: column prompt is an empty prompt" in one_line(tmp_path / "a.parquet")


def test_a_missing_column_names_the_present_and_the_nearest(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"question": "hello", "answer": "world"}] * 4)
    message = one_line(source)
    assert message.startswith("prompts.column=prompt: no such column in ")
    assert message.endswith("expected one of question, answer")  # `question` is not guessed
    assert one_line(source, column="questoin").endswith("question, answer; did you mean question?")


def test_messages_do_not_stand_in_for_a_misspelt_column(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 4)
    assert "prompts.column=promt: no such column" in one_line(source, CHAT, column="promt")


def test_implicit_prompt_as_text_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"chosen": "hello world", "rejected": "hello"}] * 4)
    assert "line 1: column chosen is text; expected a list of messages, or a column prompt" in one_line(source)


def test_python_sources_that_do_not_work(monkeypatch: Any) -> None:
    module = types.ModuleType("prompts_for_a_test")
    module.number, module.text, module.rows = 5, lambda: "hello", lambda: [{"prompt": "hello"}, "world"]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert "cannot be imported: No module named 'no_such_module'" in one_line("python:no_such_module:rows")
    assert "module prompts_for_a_test has no function nothing" in one_line("python:prompts_for_a_test:nothing")
    assert "module prompts_for_a_test has no function number" in one_line("python:prompts_for_a_test:number")
    assert "expected python:module:function" in one_line("python:prompts_for_a_test")
    assert "the function returned str 'hello'; expected a list" in one_line("python:prompts_for_a_test:text")
    assert "row 1 is str 'world'; expected an object" in one_line("python:prompts_for_a_test:rows")


def test_dataset_folders_that_do_not_work(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    message = one_line(write_saved_splits(tmp_path), split="validation")
    assert message.startswith("prompts.split=validation: no such split in ")
    assert message.endswith("expected one of test, train")
    folder = write_folder_of_files(tmp_path)
    message = one_line(folder, split="validation")
    assert "with prompts.split=validation: " in message and "train" in message
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded as a dataset" in one_line(tmp_path / "empty")
    (folder / "train.jsonl").write_text("{not json\n")
    assert "cannot be loaded as a dataset" in one_line(folder)


def test_a_hub_name_without_a_network_is_a_config_error(monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = one_line("keel-tests/no-such-dataset")
    assert message.startswith("prompts.source=keel-tests/no-such-dataset: cannot be loaded as a dataset")
    assert "Hub" in message
