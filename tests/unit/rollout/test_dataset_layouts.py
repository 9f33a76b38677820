"""Data sets as other projects write them: which layout reads what, and what is refused by the setting's name."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keel.config.prompts import ColumnSettings, PromptSettings
from keel.errors import ConfigError
from keel.rollout import datasets as prompt_datasets
from keel.rollout import stored_completions

USER, BOT, SYSTEM = "user", "assistant", "system"


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def shared(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


ASKED = said((USER, "q"))
YES, NO = said((BOT, "yes")), said((BOT, "no"))
LAYOUTS: dict[str, tuple[dict[str, Any], int, Any, list[str], list[float]]] = {
    # HuggingFaceH4/ultrafeedback_binarized, ultrachat_200k
    "ultrafeedback pair": (
        {"prompt": "q", "prompt_id": "x", "chosen": ASKED + YES, "rejected": ASKED + NO, "messages": ASKED + YES,
         "score_chosen": 8.5, "score_rejected": 3.0}, 2, ASKED, ["yes", "no"], [1.0, 0.0],
    ),
    "ultrafeedback sft": (
        {"prompt": "q", "chosen": ASKED + YES, "rejected": ASKED + NO, "messages": ASKED + YES}, 1, ASKED, ["yes"], [0.0],
    ),
    "ultrachat": (
        {"prompt": "q", "prompt_id": "x", "messages": ASKED + YES + said((USER, "r"), (BOT, "end"))},
        1, ASKED + YES + said((USER, "r")), ["end"], [0.0],
    ),
    # TRL
    "trl prompt completion": ({"prompt": "q", "completion": "yes"}, 1, "q", ["yes"], [0.0]),
    "trl prompt completion chat": ({"prompt": ASKED, "completion": YES}, 1, ASKED, ["yes"], [0.0]),
    "trl messages": ({"messages": ASKED + YES}, 1, ASKED, ["yes"], [0.0]),
    "trl preference": ({"prompt": "q", "chosen": "yes", "rejected": "no"}, 2, "q", ["yes", "no"], [1.0, 0.0]),
    "trl preference chat": ({"prompt": ASKED, "chosen": YES, "rejected": NO}, 2, ASKED, ["yes", "no"], [1.0, 0.0]),
    "trl preference implicit": ({"chosen": ASKED + YES, "rejected": ASKED + NO}, 2, ASKED, ["yes", "no"], [1.0, 0.0]),
    "trl text beside answers alone": ({"prompt": "q", "chosen": YES, "rejected": NO}, 2, ASKED, ["yes", "no"], [1.0, 0.0]),
    "trl unpaired": ({"prompt": "q", "completion": "yes", "label": True}, 1, "q", ["yes"], [1.0]),
    "trl unpaired bad": ({"prompt": "q", "completion": "no", "label": False}, 1, "q", ["no"], [0.0]),
    # a label that is no preference
    "a label of another kind": ({"prompt": "q", "completion": "yes", "label": "sport"}, 1, "q", ["yes"], [0.0]),
    # RLHFlow
    "ranking": ({"prompt": "q", "responses": ["a", "b", "c"], "rewards": [1, 3, 2]}, 3, "q", ["a", "b", "c"], [1, 3, 2]),
    "ranking of two": ({"prompt": "q", "responses": ["a", "b"], "rewards": [1, 3]}, 2, "q", ["a", "b"], [1, 3]),
    # axolotl
    "alpaca": ({"instruction": "q", "input": "", "output": "yes"}, 1, "q", ["yes"], [0.0]),
    "alpaca input": ({"instruction": "q", "input": "of this", "output": "yes"}, 1, "q\n\nof this", ["yes"], [0.0]),
    "alpaca response": ({"instruction": "q", "response": "yes"}, 1, "q", ["yes"], [0.0]),
    "open orca": (
        {"system_prompt": "be kind", "question": "q", "response": "yes"}, 1, said((SYSTEM, "be kind")) + ASKED, ["yes"], [0.0],
    ),
    "sharegpt": (
        {"conversations": shared(("system", "be kind"), ("human", "q"), ("gpt", "yes"))},
        1, said((SYSTEM, "be kind")) + ASKED, ["yes"], [0.0],
    ),
    "chat_template": ({"conversations": ASKED + YES}, 1, ASKED, ["yes"], [0.0]),
    "lmsys": ({"conversation_id": "x", "conversation": ASKED + YES}, 1, ASKED, ["yes"], [0.0]),
    "orca pairs": (
        {"system": "", "question": "q", "chosen": "yes", "rejected": "no"}, 2, ASKED, ["yes", "no"], [1.0, 0.0],
    ),
    "orca pairs with a system": (
        {"system": "be kind", "question": "q", "chosen": "yes", "rejected": "no"},
        2, said((SYSTEM, "be kind")) + ASKED, ["yes", "no"], [1.0, 0.0],
    ),
    "icr": ({"system": "", "input": "q", "chosen": "yes", "rejected": "no"}, 2, ASKED, ["yes", "no"], [1.0, 0.0]),
    "prompt pairs": (
        {"system": "be kind", "prompt": "q", "chosen": "yes", "rejected": "no"},
        2, said((SYSTEM, "be kind")) + ASKED, ["yes", "no"], [1.0, 0.0],
    ),
    "dpo chat_template": (
        {"messages": ASKED, "chosen": YES[0], "rejected": NO[0]}, 2, ASKED, ["yes", "no"], [1.0, 0.0],
    ),
    "dpo conversation": (
        {"conversation": shared(("human", "q")), "chosen": shared(("gpt", "yes")), "rejected": shared(("gpt", "no"))},
        2, ASKED, ["yes", "no"], [1.0, 0.0],
    ),
    "kto argilla": ({"instruction": "q", "completion": "yes", "label": True}, 1, "q", ["yes"], [1.0]),
    # OpenAI
    "openai": ({"messages": said((SYSTEM, "be kind")) + ASKED + YES}, 1, said((SYSTEM, "be kind")) + ASKED, ["yes"], [0.0]),
    "openai parts": (
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in ((USER, "q"), (BOT, "yes"))]},
        1, ASKED, ["yes"], [0.0],
    ),
    "openai preference": (
        {"input": {"messages": ASKED}, "preferred_output": YES, "non_preferred_output": NO},
        2, ASKED, ["yes", "no"], [1.0, 0.0],
    ),
    # Anthropic
    "hh": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant: yes",
         "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant: no"},
        2, said((USER, "hi"), (BOT, "hello"), (USER, "q")), ["yes", "no"], [1.0, 0.0],
    ),
}  # fmt: skip


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path, samples: int, **settings: Any) -> list[prompt_datasets.SourceRow]:
    return prompt_datasets.read_rows(PromptSettings(source=str(path), **settings), samples)


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read(tmp_path: Path, name: str, write: Any) -> None:
    row, samples, prompt, texts, rewards = LAYOUTS[name]
    (result,) = read(write(tmp_path / f"d.{write.__name__}", [row]), samples)
    stored_completions.check_shape([result], samples, "d")
    columns = json.loads(result.further)
    assert result.prompt == prompt
    assert stored_completions.completions(columns) == texts
    assert stored_completions.rewards(columns) == rewards
    assert stored_completions.unusable(columns) is None
    assert stored_completions.is_bad_demonstration(columns) == (name == "trl unpaired bad")


@pytest.mark.parametrize("name", [name for name, case in LAYOUTS.items() if case[2] == ASKED or case[2] == "q"])
def test_online_training_reads_the_same_prompt(tmp_path: Path, name: str) -> None:
    row, _, prompt, _, _ = LAYOUTS[name]
    (result,) = read(jsonl(tmp_path / "d.jsonl", [row]), 0)
    if name in ("trl text beside answers alone",):  # no conversation holds the prompt: it stays text
        prompt = "q"
    assert result.prompt == prompt


def test_reward_functions_get_the_columns_as_they_were(tmp_path: Path) -> None:
    row = {"conversations": shared(("human", "q"), ("gpt", "yes")), "source": "x"}
    (result,) = read(jsonl(tmp_path / "d.jsonl", [row]), 1)
    columns = json.loads(result.further)
    assert {name: columns[name] for name in row} == row


# ---- names of the user's own


def test_every_role_can_be_named(tmp_path: Path) -> None:
    pair = {"frage": "q", "rolle": "be kind", "gut": "yes", "schlecht": "no", "chosen": "not this", "rejected": 5}
    columns = ColumnSettings(prompt="frage", system="rolle", chosen="gut", rejected="schlecht")
    (result,) = read(jsonl(tmp_path / "a.jsonl", [pair]), 2, columns=columns)
    assert result.prompt == said((SYSTEM, "be kind")) + ASKED
    assert stored_completions.completions(json.loads(result.further)) == ["yes", "no"]
    assert json.loads(result.further)["chosen"] == "not this"
    answer = {"frage": "q", "mehr": "of this", "antwort": "yes", "gut": 1}
    columns = ColumnSettings(prompt="frage", input="mehr", completion="antwort", label="gut")
    (result,) = read(jsonl(tmp_path / "b.jsonl", [answer]), 1, columns=columns)
    assert (result.prompt, stored_completions.rewards(json.loads(result.further))) == ("q\n\nof this", [1.0])
    ranking = {"frage": "q", "alle": ["a", "b"], "noten": [1, 2]}
    columns = ColumnSettings(prompt="frage", responses="alle", rewards="noten")
    (result,) = read(jsonl(tmp_path / "c.jsonl", [ranking]), 2, columns=columns)
    assert stored_completions.completions(json.loads(result.further)) == ["a", "b"]
    assert stored_completions.rewards(json.loads(result.further)) == [1.0, 2.0]
    talk = {"verlauf": shared(("human", "q"), ("gpt", "yes")), "messages": "not this"}
    (result,) = read(jsonl(tmp_path / "d.jsonl", [talk]), 1, columns=ColumnSettings(messages="verlauf"))
    assert result.prompt == ASKED and stored_completions.completions(json.loads(result.further)) == ["yes"]


def test_the_preferred_answers_can_be_demonstrations(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": ASKED + YES, "rejected": ASKED + NO}
    (result,) = read(jsonl(tmp_path / "d.jsonl", [row]), 1, columns=ColumnSettings(completion="chosen"))
    assert result.prompt == ASKED and stored_completions.completions(json.loads(result.further)) == ["yes"]


def test_a_prompt_that_is_named_stays_text_online(tmp_path: Path) -> None:
    row = LAYOUTS["ultrafeedback pair"][0]
    (result,) = read(jsonl(tmp_path / "d.jsonl", [row]), 0, columns=ColumnSettings(prompt="prompt"))
    assert result.prompt == "q"


# ---- what is refused, and what is dropped


@pytest.mark.parametrize(
    ("row", "samples", "expected"),
    [
        ({"prompt": "q", "chosen": "a"}, 2, "no column rejected; it has prompt, chosen; expected prompt, chosen and rejected, or"),
        ({"prompt": "q", "score": 1}, 2, "no column chosen and rejected; it has prompt, score; expected"),
        ({"prompt": "q", "answer": "a"}, 1, "no column completion; it has prompt, answer; expected prompt and completion, or"),
        ({"question": "q", "answer": "a"}, 1, "no column prompt and completion; it has question, answer; expected"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, 1, "(columns.completion=chosen trains on the preferred answers)"),
        ({"prompt": "q", "completion": "a", "label": True}, 2, "no column chosen and rejected; it has prompt, completion, label"),
        ({"text": "q a"}, 1, "(where the prompt ends in `text` cannot be told)"),
        ({"prompt": "q", "responses": ["a"] * 3}, 3, "no column rewards; it has prompt, responses; expected prompt, responses and"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, 4, "no column responses and rewards; it has prompt, chosen, rejected"),
    ],
)  # fmt: skip
def test_missing_columns_are_named_with_those_that_are_there(
    tmp_path: Path, row: dict[str, Any], samples: int, expected: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"^prompts\.source=.*d\.jsonl: no column .*prompts\.columns\.\w+=NAME"
    ) as caught:
        read(jsonl(tmp_path / "d.jsonl", [row]), samples)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "samples", "setting"),
    [
        ({"messages": ASKED + YES, "conversations": ASKED + YES}, 0, "prompts.columns.messages=null"),
        ({"messages": ASKED + YES, "conversations": ASKED + YES}, 1, "prompts.columns.messages=null"),
        ({"instruction": "q", "output": "a", "response": "b"}, 1, "prompts.columns.completion=null"),
        ({"instruction": "q", "question": "q", "output": "a"}, 1, "prompts.columns.prompt=null"),
        ({"system": "a", "system_prompt": "b", "question": "q", "chosen": "a", "rejected": "b"}, 2, "prompts.columns.system=null"),
        ({"chosen": "q a", "rejected": "q b"}, 2, "prompts.columns.prompt=NAME"),
        ({"chosen": "q a", "rejected": "q b"}, 0, "prompts.columns.prompt=NAME"),
    ],
)  # fmt: skip
def test_what_may_be_read_in_two_ways_is_refused_with_the_setting(
    tmp_path: Path, row: dict[str, Any], samples: int, setting: str
) -> None:
    with pytest.raises(ConfigError, match="; expected ") as caught:
        read(jsonl(tmp_path / "d.jsonl", [row]), samples)
    assert setting in str(caught.value) and "\n" not in str(caught.value)


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(
        ConfigError, match=r"^prompts\.columns\.chosen=best: no such column in .* one of prompt, chosen, rej"
    ):
        read(path, 2, columns=ColumnSettings(chosen="best"))
    with pytest.raises(ConfigError, match=r"^prompts\.columns\.prompt=chosen: prompts\.column=rejected says another"):
        read(path, 2, column="rejected", columns=ColumnSettings(prompt="chosen"))


@pytest.mark.parametrize(
    ("row", "samples", "reason"),
    [
        ({"prompt": "another", "chosen": ASKED + YES, "rejected": ASKED + NO}, 2, "different_prompts"),
        ({"prompt": said((USER, "another")), "chosen": ASKED + YES, "rejected": ASKED + NO}, 2, "different_prompts"),
        ({"chosen": ASKED + YES, "rejected": said((USER, "another"), (BOT, "no"))}, 2, "different_prompts"),
        ({"messages": ASKED + YES + NO}, 1, "several_messages"),
        ({"prompt": ASKED, "completion": YES + NO}, 1, "several_messages"),
    ],
)
def test_a_row_whose_parts_do_not_belong_together_is_not_trained_on(
    tmp_path: Path, row: dict[str, Any], samples: int, reason: str
) -> None:
    (result,) = read(jsonl(tmp_path / "d.jsonl", [row]), samples)
    assert stored_completions.unusable(json.loads(result.further)) == reason


def test_prompts_that_are_in_some_conversations_alone_are_refused(tmp_path: Path) -> None:
    """Some rows would go through the chat template, others not, without a word."""
    row = LAYOUTS["ultrafeedback pair"][0]
    path = jsonl(tmp_path / "d.jsonl", [row, {**row, "prompt": "another"}])
    with pytest.raises(
        ConfigError, match=r"line 2: column prompt is not in the conversation of messages.*columns\.prompt=p"
    ):
        read(path, 0)


@pytest.mark.parametrize(
    ("row", "samples", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": None}, 2, r"line 1 has no completions \(rejected is null\)"),
        ({"prompt": "q", "completion": None}, 1, r"line 1 has no completions \(completion is null\)|no text"),
        ({"prompt": "q", "responses": ["a", "b"], "rewards": [1, float("nan")]}, 2, "not finite"),
        ({"prompt": "q", "responses": ["a", "b"], "rewards": None}, 2, "no completions"),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, 2, "a completion that is no text"),
    ],
)
def test_answers_that_are_not_there_are_refused_with_their_row(
    tmp_path: Path, row: dict[str, Any], samples: int, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        stored_completions.check_shape(read(jsonl(tmp_path / "d.jsonl", [row]), samples), samples, "d")


# ---- columns that nothing reads


def numbered(**columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": str(n), **{name: values[n] for name, values in columns.items()}} for n in range(2)]


@pytest.mark.parametrize("suffix", ["parquet", "folder", "saved"])
def test_columns_that_nothing_reads_refuse_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Images as Hugging Face stores them, bytes, NaN, dates with nanoseconds, arrays of arrays, text that is none."""
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"], pa.binary()).buffers())
    pairs = pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64()))
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "image": [{"bytes": b"\x89PNG", "path": None}, None],
            "raw": [b"\x00\xff", b""],
            "score": [float("nan"), 1.0],
            "spread": [[float("inf")], []],
            "when": pa.array([1, 2], pa.timestamp("ns")),
            "took": pa.array([1, 10**15], pa.duration("s")),
            "far": pa.array([2**62, 0], pa.timestamp("us")),
            "matrix": [[[1.0]], [[2.0]]],
            **({"text": broken, "pairs": pairs} if suffix == "parquet" else {}),  # which datasets does not take
        }
    )
    path = tmp_path / "d.parquet"
    pq.write_table(table, path)
    if suffix != "parquet":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "folder").mkdir()
        path = path.rename(tmp_path / "folder" / "train.parquet").parent
    if suffix == "saved":
        datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
        path = tmp_path / "saved"
    rows = read(path, 0)
    assert [row.prompt for row in rows] == ["a", "b"]
    assert set(json.loads(rows[0].further)) >= {"score", "matrix"}
    assert not {"image", "raw", "text"} & json.loads(rows[0].further).keys()
    assert json.loads(rows[0].further).keys() == json.loads(rows[1].further).keys()


@pytest.mark.parametrize(
    "columns",
    [
        {"prompts": ["a", "b"], "completions": [1, 2], "completion_ids": [[1], [2]]},
        {"deep": [[[[[[]]]]], None]},
        {"odd": ["\ud800", "x"]},
        {"messages": [None, 5]},
        {"chosen": [float("nan"), None], "rejected": [1, 2], "label": ["x", None]},
        {"completion": [None, {"a": 1}], "responses": [1, 2], "rewards": [None, None]},
    ],
    ids=lambda columns: "+".join(columns),
)
def test_odd_columns_of_known_names_refuse_nothing_online(tmp_path: Path, columns: dict[str, Any]) -> None:
    rows = read(jsonl(tmp_path / "d.jsonl", numbered(**columns)), 0)
    assert [row.prompt for row in rows] == ["0", "1"]
    for row in rows:
        row.further.encode()


def test_a_number_of_thousands_of_digits_is_text(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "n": ' + "9" * 5000 + "}\n")
    assert json.loads(read(tmp_path / "d.jsonl", 0)[0].further) == {"n": "9" * 5000}


def test_objects_of_a_function_refuse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    import numpy as np

    rows = [
        {"prompt": str(n), "array": np.arange(2), "one": np.float32(0.5), "set": {1}, "object": object(), "keys": {1: 2},
         "when": datetime(2026, 1, 2), "itself": []}
        for n in range(2)
    ]  # fmt: skip
    rows[0]["itself"].append(rows[0]["itself"])
    module = types.ModuleType("rows_for_a_test")
    module.rows = lambda: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    result = prompt_datasets.read_rows(PromptSettings(source="python:rows_for_a_test:rows"))
    expected = {"array": [0, 1], "one": 0.5, "set": [1], "keys": {"1": 2}, "when": "2026-01-02 00:00:00"}
    assert [json.loads(row.further) for row in result] == [expected] * 2
