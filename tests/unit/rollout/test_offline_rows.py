"""Rows that offline stages train on: which are used, in which order, and what every step sees of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from keel import schema
from keel.config import loader
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings
from keel.errors import ConfigError
from keel.learner.reward_models import RewardText
from keel.rollout import stored_completions
from keel.rollout.datasets import SourceRow
from keel.rollout.offline_rows import OfflineRows
from keel.stages.reward import PairRows
from prompt_files import CHAT, PLAIN, jsonl, word_tokenizer

END = 4
TOKENS = word_tokenizer(chat_template=None, numbers=300)
ZERO = TOKENS("0")["input_ids"][1]
"""Token of the word "0"; that of "7" is 7 more."""


def tree(path: Path, **blocks: Any) -> dict[str, Any]:
    basic = {
        "run": {"name": "test", "seed": 3},
        "policy": {"model": "tiny"},
        "prompts": {"source": str(path), "held_out": 3, "max_tokens": 8},
        "completions": {"max_tokens": 4},
        "training": {"rows_per_step": 4},
    }
    return {**basic, **{name: {**basic.get(name, {}), **block} for name, block in blocks.items()}}


def demonstrations(path: Path, tokenizer: Any = PLAIN, **blocks: Any) -> OfflineRows:
    settings = loader.parse_as(SupervisedSettings, tree(path, **blocks))
    return OfflineRows(settings.learner_spec(1), settings.completions, tokenizer, (END,))


def preferences(path: Path, tokenizer: Any = PLAIN, **blocks: Any) -> OfflineRows:
    settings = loader.parse_as(PreferSettings, tree(path, **blocks))
    return OfflineRows(settings.learner_spec(1), settings.completions, tokenizer, (END,))


def numbered(path: Path, count: int) -> Path:
    """Prompt "n", completion "n n"."""
    return jsonl(path, [{"prompt": str(n), "completion": f"{n} {n}"} for n in range(count)])


def pairs(path: Path, count: int) -> Path:
    return jsonl(path, [{"prompt": str(n), "chosen": f"{n} {n}", "rejected": f"{n}"} for n in range(count)])


def said(batch: pa.RecordBatch) -> list[int]:
    return [int(text) for text in batch.column("prompt").to_pylist()]


def test_every_training_row_once_an_epoch_and_no_held_out_one(tmp_path: Path) -> None:
    rows = demonstrations(numbered(tmp_path / "d.jsonl", 23))
    held_out = said(rows.held_out())
    assert len(set(held_out)) == 3 and rows.num_training == 20
    epochs = [
        [row for version in range(5 * epoch, 5 * epoch + 5) for row in said(rows.step(version))] for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted([*epoch, *held_out]) == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]


def test_steps_that_do_not_divide_an_epoch_lose_no_row(tmp_path: Path) -> None:
    """Seven training rows, four a step: seven steps are four epochs, whatever lies across a border."""
    rows = demonstrations(numbered(tmp_path / "d.jsonl", 10))
    seen = [row for version in range(7) for row in said(rows.step(version))]
    assert {seen.count(row) for row in set(seen)} == {4} and len(set(seen)) == 7
    assert len(set(seen[:7])) == len(set(seen[7:14])) == 7


def test_a_step_is_a_function_of_seed_and_version(tmp_path: Path) -> None:
    path = pairs(tmp_path / "p.jsonl", 23)
    one, again = preferences(path), preferences(path)
    for version in (6, 0, 3):  # in any order
        assert one.step(version).equals(again.step(version))
    again.step(1)
    assert one.step(2).equals(again.step(2)) and one.held_out().equals(again.held_out())
    other = preferences(path, run={"seed": 4})
    assert said(other.held_out()) != said(one.held_out()) or said(other.step(0)) != said(one.step(0))


def test_everything_is_every_row_once(tmp_path: Path) -> None:
    rows = preferences(pairs(tmp_path / "p.jsonl", 12))
    everything = schema.concat(rows.everything())
    keys = list(zip(*(everything.column(name).to_pylist() for name in ("prompt_id", "sample")), strict=True))
    assert sorted(keys) == [(row, sample) for row in range(12) for sample in (0, 1)]


def test_what_a_row_says(tmp_path: Path) -> None:
    """Tokens of prompt and completion, the end behind those that ended, chosen before rejected."""
    path = jsonl(
        tmp_path / "p.jsonl",
        [
            {"prompt": f"{n} are", "chosen": f"{n} 1", "rejected": "2", "chosen_finished": n % 2 == 0}
            for n in range(10, 18)
        ],
    )
    batch = preferences(path).step(0)
    schema.check(batch)
    assert batch.num_rows == 8
    for number, row in enumerate(batch.to_pylist()):
        n = int(row["prompt"].split()[0])
        tokens = TOKENS(row["completion"])["input_ids"][1:]
        cut = number % 2 == 0 and n % 2 == 1
        assert row["completion"] == (f"{n} 1" if number % 2 == 0 else "2")
        assert row["prompt_tokens"] == PLAIN(f"{n} are")["input_ids"]
        assert row["completion_tokens"] == (tokens if cut else [*tokens, END])
        assert row["finish_reason"] == ("length" if cut else "stop")
        assert (row["reward"], row["sample"]) == (1.0 - number % 2, number % 2)


def test_rankings_have_the_rewards_of_their_source(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "responses": ["1", "2", "3"], "rewards": [n, -n, 0.5]} for n in range(8)]
    settings = loader.parse_as(PreferSettings, {**tree(jsonl(tmp_path / "r.jsonl", rows)), "samples": 3})
    batch = OfflineRows(settings.learner_spec(1), settings.completions, PLAIN, (END,)).step(0)
    expected = [value for n in said(batch)[::3] for value in (n, -n, 0.5)]
    assert batch.column("reward").to_pylist() == expected


UNUSABLE = [
    {"prompt": "1", "chosen": "  ", "rejected": "2"},
    {"prompt": "2", "chosen": "3", "rejected": " 3 "},
    {"prompt": "3", "chosen": "1 2 3 4", "rejected": "2"},  # with its end token five
    {"prompt": "4", "chosen": "1 2 3 4", "rejected": "2", "chosen_finished": False},
    *[{"prompt": str(n), "chosen": "1 2 3", "rejected": "2"} for n in range(10, 16)],
]


def test_unusable_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = preferences(jsonl(tmp_path / "p.jsonl", UNUSABLE))
    assert rows.dropped == {"empty": 1, "equal": 1, "too_long": 1}
    assert {name: rows.counts[name] for name in ("read", "train", "held_out")} == {
        "read": 10,
        "train": 4,
        "held_out": 3,
    }
    assert {n for part in rows.everything() for n in said(part)} == {4, *range(10, 16)}


@pytest.mark.parametrize(("first", "place", "reason"), [(0, 1, "empty"), (1, 1, "equal"), (2, 1, "too_long")])
def test_unusable_rows_are_refused_with_their_place(tmp_path: Path, first: int, place: int, reason: str) -> None:
    path = jsonl(tmp_path / "p.jsonl", UNUSABLE[first:])
    with pytest.raises(ConfigError, match=rf"line {place} is not usable \({reason}\)") as caught:
        preferences(path, completions={"unusable": "refuse"})
    assert str(caught.value) == (
        f"prompts.source={path}: line {place} is not usable ({reason}); expected another row, or completions.unusable=drop"
    )


def test_no_usable_row_is_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", UNUSABLE[:2])
    with pytest.raises(ConfigError, match=r"no usable row \(\{'empty': 1, 'equal': 1\}\); expected at least one"):
        preferences(path)


PLAIN_ROW = {"prompt": "1", "chosen": "2", "rejected": "3"}
CHAT_PROMPT = {"prompt": [{"role": "user", "content": "1"}], "chosen": "2", "rejected": "3"}
CHAT_ROW = {
    "prompt": [{"role": "user", "content": "1"}],
    "chosen": [{"role": "assistant", "content": "2"}],
    "rejected": [{"role": "assistant", "content": "3"}],
}


@pytest.mark.parametrize(("one", "other"), [(PLAIN_ROW, CHAT_ROW), (CHAT_ROW, PLAIN_ROW), (CHAT_ROW, CHAT_PROMPT)])
def test_mixed_forms_are_refused_with_both_places(tmp_path: Path, one: Any, other: Any) -> None:
    path = jsonl(tmp_path / "p.jsonl", [one, one, other])
    with pytest.raises(ConfigError, match=r"line 1 is .*, line 3 is of another form .*; expected one form") as caught:
        preferences(path, CHAT)
    assert "\n" not in str(caught.value)


def test_a_demonstration_is_the_last_message(tmp_path: Path) -> None:
    turns = [[("user", f"{n}"), ("assistant", "1"), ("user", "2"), ("assistant", f"{n} 3")] for n in range(8)]
    rows = [{"messages": [{"role": role, "content": content} for role, content in item]} for item in turns]
    batch = demonstrations(jsonl(tmp_path / "m.jsonl", rows), CHAT, prompts={"max_tokens": 20}).step(0)
    for row in batch.to_pylist():
        n = json.loads(row["prompt_messages"])[0]["content"]
        assert row["completion"] == f"{n} 3" and row["prompt"] == "2"
        assert len(json.loads(row["prompt_messages"])) == 3


def test_a_conversation_that_ends_with_the_user_is_no_demonstration() -> None:
    """No model should learn to say what the user said."""
    row = SourceRow(
        "line 1",
        [{"role": "user", "content": "hello"}],
        json.dumps({"messages": [{"role": "user", "content": "hello"}]}),
        True,
    )
    with pytest.raises(ConfigError, match="line 1"):
        stored_completions.check_shape([row], 1, "d.jsonl")


def test_demonstrations_have_one_completion_and_no_reward() -> None:
    assert (
        stored_completions.completions({"completion": "a"})
        == stored_completions.completions({"messages": [{"content": "q"}, {"content": "a"}]})
        == ["a"]
    )
    assert stored_completions.completions({"completion": [{"role": "assistant", "content": "a"}]}) == ["a"]
    assert stored_completions.rewards({"completion": "a"}) == [0.0] and stored_completions.finished(
        {"completion": "a"}
    ) == [True]


# ---- pairs of a reward model


def reward_pairs(path: Path, limit: int = 20, **blocks: Any) -> PairRows:
    settings = loader.parse_as(RewardModelSettings, {**tree(path), **blocks})
    return PairRows(settings, RewardText(PLAIN, False, limit))


def of_step(rows: PairRows, version: int, member: int = 0) -> list[int]:
    """Numbers of a step's pairs; checks that chosen comes before rejected."""
    tokens = rows.step(version, member).column("tokens").to_pylist()
    numbers = [row[1] - ZERO for row in tokens[0::2]]
    for number, won, lost in zip(numbers, tokens[0::2], tokens[1::2], strict=True):
        assert (
            won == PLAIN(f"{number} {number} {number}")["input_ids"]
            and lost == PLAIN(f"{number} {number}")["input_ids"]
        )
    return numbers


def spaced(path: Path, count: int, **columns: Any) -> Path:
    rows = [{"prompt": f"{n} ", "chosen": f"{n} {n}", "rejected": f"{n}"} for n in range(count)]
    return jsonl(path, [{**row, **{name: value(n) for name, value in columns.items()}} for n, row in enumerate(rows)])


def test_members_have_orders_of_their_own(tmp_path: Path) -> None:
    rows = reward_pairs(spaced(tmp_path / "p.jsonl", 15), members={"count": 2, "bootstrap": False})
    epochs = [[n for version in range(3) for n in of_step(rows, version, member)] for member in (0, 1)]
    train = sorted(rows.train.tolist())
    assert [sorted(epoch) for epoch in epochs] == [train, train] and epochs[0] != epochs[1]
    assert not set(train) & set(rows.held_out.tolist()) and len(train) == 12


def test_a_bootstrap_draws_with_replacement_and_the_same_rows_every_epoch(tmp_path: Path) -> None:
    rows = reward_pairs(spaced(tmp_path / "p.jsonl", 63), members={"count": 2}, training={"rows_per_step": 60})
    epochs = [[sorted(of_step(rows, version, member)) for version in (0, 1)] for member in (0, 1)]
    for first, second in epochs:
        assert first == second and 25 < len(set(first)) < 50  # 1 - 1/e of 60 are 38
        assert set(first) <= set(rows.train.tolist())
    assert epochs[0][0] != epochs[1][0]
    one = reward_pairs(tmp_path / "p.jsonl", members={"count": 1}, training={"rows_per_step": 60})
    assert len(set(of_step(one, 0))) == 60  # a member alone sees every pair


def test_margins_come_from_their_column(tmp_path: Path) -> None:
    path = spaced(tmp_path / "p.jsonl", 8, gap=lambda n: n / 4)
    rows = reward_pairs(path, margin=0.5, margin_column="gap")
    batch = rows.step(0, 0)
    assert batch.column("margin").to_pylist() == [0.5 + n / 4 for n in of_step(rows, 0) for _ in range(2)]
    with pytest.raises(ConfigError, match="margin_column=gip: line 1 has None there; expected a number"):
        reward_pairs(path, margin_column="gip")


def test_a_pair_too_long_for_the_model_is_dropped_not_cut(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [*UNUSABLE[:3], *UNUSABLE[4:]])
    rows = reward_pairs(path, limit=4)
    assert rows.dropped == {"empty": 1, "equal": 1, "too_long": 1}


def test_pairs_of_a_prompt_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n % 6} ", "chosen": f"{n}", "rejected": f"{n} {n}"} for n in range(18)]
    result = reward_pairs(jsonl(tmp_path / "p.jsonl", rows))
    held_out = {place % 6 for place in result.held_out.tolist()}
    assert len(held_out) == 3 and {place % 6 for place in result.train.tolist()} == set(range(6)) - held_out
    assert len(result.train) == 9 and np.array_equal(np.sort(result.train), result.train)


# ---- pairs and demonstrations that come in other forms


def test_a_ranking_of_two_is_a_pair_with_the_better_one_first(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n} ", "responses": [f"{n}", f"{n} {n}"], "rewards": [0.0, 1.0] if n % 2 else [2.0, -1.0]}
        for n in range(8)
    ]
    result = reward_pairs(jsonl(tmp_path / "p.jsonl", rows))
    for n, (better, worse) in enumerate(result.pairs):
        assert (len(better.completion) > len(worse.completion)) == bool(n % 2)


def test_a_tie_is_no_pair(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} ", "responses": [f"{n}", f"{n} {n}"], "rewards": [1.0, n % 5]} for n in range(10)]
    result = reward_pairs(jsonl(tmp_path / "p.jsonl", rows))
    assert result.dropped == {"tie": 2} and len(result.pairs) == 8


def test_a_margin_is_finite(tmp_path: Path) -> None:
    path = spaced(tmp_path / "p.jsonl", 8, gap=lambda n: math.nan if n == 3 else 1.0)
    with pytest.raises(ConfigError, match="margin_column=gap: line 4 has nan there; expected a number"):
        reward_pairs(path, margin_column="gap")


def test_answers_labeled_bad_are_no_demonstrations(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": f"{n} {n}", "label": n % 3 > 0} for n in range(12)]
    result = demonstrations(jsonl(tmp_path / "d.jsonl", rows))
    assert result.dropped == {"label_false": 4}
    assert {n for part in result.everything() for n in said(part)} == {n for n in range(12) if n % 3}


def test_demonstrations_of_ultrafeedback_are_its_messages(tmp_path: Path) -> None:
    """The prompt text beside them is in them, and is read once."""
    rows = []
    for n in range(8):
        asked = [{"role": "user", "content": f"{n}"}]
        chosen, rejected = (
            [*asked, {"role": "assistant", "content": f"{n} {n}"}],
            [*asked, {"role": "assistant", "content": "1"}],
        )
        rows.append({"prompt": f"{n}", "chosen": chosen, "rejected": rejected, "messages": chosen})
    path = jsonl(tmp_path / "u.jsonl", rows)
    for row in demonstrations(path, CHAT, prompts={"max_tokens": 20}).step(0).to_pylist():
        assert json.loads(row["prompt_messages"]) == [{"role": "user", "content": row["prompt"]}]
        assert row["completion"] == f"{row['prompt']} {row['prompt']}"
    for number, row in enumerate(preferences(path, CHAT, prompts={"max_tokens": 20}).step(0).to_pylist()):
        assert row["completion"] == ("1" if number % 2 else f"{row['prompt']} {row['prompt']}")
        assert json.loads(row["prompt_messages"]) == [{"role": "user", "content": row["prompt"]}]


# ---- conversations that a template cannot render


def conversations(tmp_path: Path, role: str = "user") -> Path:
    turns = [{"role": role, "content": "1"}, {"role": "assistant", "content": "2"}]
    return jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 6)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"its tokenizer has no chat template, but line 1 of .* is a list of messages"
    ):
        demonstrations(conversations(tmp_path), PLAIN)


def test_a_conversation_that_the_template_refuses_is_one_line(tmp_path: Path) -> None:
    strict = word_tokenizer(numbers=300, chat_template="{{ raise_exception('Only users speak') }}")
    with pytest.raises(ConfigError, match="line 1: the chat template refuses it: Only users speak; expected other"):
        demonstrations(conversations(tmp_path), strict)
