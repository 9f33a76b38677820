"""Prompts: what becomes of rows of every kind of source, and one line for every mistake."""

from pathlib import Path

import pytest

from keel.config import loader
from keel.rollout.prompts import Prompts
from prompt_files import (
    ARE,
    BE,
    BOS,
    BOT,
    CHAT,
    HELLO,
    HOW,
    KIND,
    PLAIN,
    SYS,
    USER,
    WORLD,
    YOU,
    every_row,
    jsonl,
    numbered,
    one_line,
    settings_for,
    word_tokenizer,
)
from vocabularies import ends_every_text, family

# ---- tokens


def test_plain_text_gets_the_tokenizers_own_special_tokens(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": text} for text in ("hello world", "how are you", "be kind")])
    rows = every_row(Prompts(settings_for(source), CHAT))
    assert [row["prompt_tokens"] for row in rows] == [
        [BOS, HELLO, WORLD],
        [BOS, HOW, ARE, YOU],
        [BOS, BE, KIND],
    ]
    assert [row["prompt"] for row in rows] == ["hello world", "how are you", "be kind"]


def test_a_conversation_has_the_bos_of_its_template_once_and_the_assistants_header(tmp_path: Path) -> None:
    turns = [("user", "hello"), ("assistant", "world"), ("user", "how are you")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": conversation}, {"prompt": "hello"}, {"prompt": "world"}])
    first, second, _ = every_row(Prompts(settings_for(source), CHAT))
    assert first["prompt_tokens"] == [BOS, USER, HELLO, BOT, WORLD, USER, HOW, ARE, YOU, BOT]
    assert first["prompt"] == "how are you"
    assert second["prompt_tokens"] == [BOS, HELLO]  # plain rows beside it stay plain


def test_text_that_brings_its_bos_does_not_get_a_second(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": text} for text in ("<s> hello", "world", "<s> <s> be")])
    rows = every_row(Prompts(settings_for(source), PLAIN))
    assert [row["prompt_tokens"] for row in rows] == [[BOS, HELLO], [BOS, WORLD], [BOS, BOS, BE]]


def test_system_prompt_comes_first_unless_the_row_has_its_own(tmp_path: Path) -> None:
    subject = [{"role": "system", "content": "hello"}, {"role": "user", "content": "you"}]
    rows = [{"prompt": "how are you"}, {"prompt": subject}, {"prompt": [{"role": "user", "content": "world"}]}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    tokens = [row["prompt_tokens"] for row in every_row(Prompts(settings_for(source, system_prompt="be kind"), CHAT))]
    assert tokens == [
        [BOS, SYS, BE, KIND, USER, HOW, ARE, YOU, BOT],
        [BOS, SYS, HELLO, USER, YOU, BOT],
        [BOS, SYS, BE, KIND, USER, WORLD, BOT],
    ]


# ---- too long


def long_and_short(path: Path) -> Path:
    texts = [
        "hello",
        "hello world",
        "be kind how are you",
        "world",
        "how are you hello",
    ]  # +1 for <s>: 2 3 6 2 5
    return jsonl(path / "long.jsonl", [{"prompt": text} for text in texts])


def test_overlong_refuse_counts_them_and_names_the_longest(tmp_path: Path) -> None:
    message = one_line(long_and_short(tmp_path), max_tokens=3)
    assert message.startswith("prompts.max_tokens=3: 2 of 5 prompts")
    assert "the longest has 6 tokens (line 3)" in message and "prompts.overlong=skip or cut_left" in message
    Prompts(settings_for(long_and_short(tmp_path), max_tokens=6), PLAIN)  # exactly the budget is allowed


def test_overlong_skip_leaves_them_out_and_keeps_the_row_numbers(tmp_path: Path) -> None:
    prompts = Prompts(settings_for(long_and_short(tmp_path), max_tokens=3, overlong="skip"), PLAIN)
    assert [(row["prompt_id"], row["prompt"]) for row in every_row(prompts)] == [
        (0, "hello"),
        (1, "hello world"),
        (3, "world"),
    ]
    expected = {"read": 5, "skipped": 2, "cut": 0, "duplicates": 0, "held_out": 2, "train": 1}
    assert prompts.counts == expected


def test_overlong_cut_left_keeps_the_last_tokens(tmp_path: Path) -> None:
    prompts = Prompts(settings_for(long_and_short(tmp_path), max_tokens=4, overlong="cut_left"), PLAIN)
    tokens = [row["prompt_tokens"] for row in every_row(prompts)]
    assert tokens == [
        [BOS, HELLO],
        [BOS, HELLO, WORLD],
        [KIND, HOW, ARE, YOU],
        [BOS, WORLD],
        [HOW, ARE, YOU, HELLO][-4:],
    ]
    expected = {"read": 5, "skipped": 0, "cut": 2, "duplicates": 0, "held_out": 2, "train": 3}
    assert prompts.counts == expected


# ---- mistakes


def test_text_without_tokens_is_an_empty_prompt(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "hello"}]}] * 3)
    assert "line 1 is an empty prompt (no tokens)" in one_line(source, word_tokenizer("{{ '' }}"))


def test_too_few_different_prompts(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": str(number % 5)} for number in range(20)])
    message = one_line(source, held_out=5)
    assert message.startswith("prompts.held_out=5: ") and "has 5 different prompts" in message
    assert message.endswith("expected at least 6")
    assert Prompts(settings_for(source, held_out=4), PLAIN).counts["train"] == 4
    skipped = one_line(long_and_short(tmp_path), max_tokens=2, overlong="skip")
    assert "prompts.held_out=2" in skipped and "has 2 different prompts of at most 2 tokens" in skipped


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    plain = numbered(tmp_path, 5)
    conversation = [{"role": "user", "content": "hello"}]
    chat = jsonl(tmp_path / "chat.jsonl", [{"prompt": "hello"}, {"prompt": conversation}, {"prompt": "you"}])
    message = one_line(plain, PLAIN, system_prompt="be kind")
    assert message.startswith("policy.model=tiny: its tokenizer has no chat template, but prompts.system_prompt")
    message = one_line(chat, PLAIN)
    assert message.startswith("policy.model=tiny: its tokenizer has no chat template, but line 2 of ")
    message = one_line(chat, CHAT, policy={"chat_template": "never"})
    assert message.startswith("policy.chat_template=never: line 2 of ") and "is a list of messages" in message
    message = one_line(plain, CHAT, policy={"chat_template": "never"}, system_prompt="be kind")
    assert message.startswith("policy.chat_template=never: prompts.system_prompt makes conversations")
    Prompts(settings_for(plain, policy={"chat_template": "never"}), CHAT)


def test_a_template_that_refuses_a_role_is_quoted(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    message = one_line(numbered(tmp_path, 5), word_tokenizer(template + "hello"), system_prompt="be kind")
    assert "line 1: the chat template refuses it: System role not supported" in message


@pytest.mark.parametrize("front", [None, "<s>"])
@pytest.mark.parametrize("kind", ["mistral", "llama 2"])
def test_a_tokenizer_that_ends_every_text_ends_no_prompt(kind: str, front: str | None, tmp_path: Path) -> None:
    """Plain or a conversation: a completion follows. What it puts in front stays."""
    asked = [[{"role": "user", "content": f"What is {n}?"}] for n in range(4)]
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": p} for p in [*asked, *(f"What is {n}?" for n in range(4))]])
    plain = [row["prompt_tokens"] for row in every_row(Prompts(settings_for(source), family(kind)))]
    tokenizer = ends_every_text(family(kind), front)
    rows = [row["prompt_tokens"] for row in every_row(Prompts(settings_for(source), tokenizer))]
    assert rows[:4] == plain[:4]
    assert rows[4:] == [([tokenizer.bos_token_id] if front else []) + ids for ids in plain[4:]]


def test_options_of_the_template_from_a_file_or_the_command_line(tmp_path: Path) -> None:
    tokenizer = family("qwen 3")
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": str(n)}]} for n in range(4)])
    path = tmp_path / "run.yaml"
    path.write_text(
        f"policy: {{model: tiny}}\nprompts: {{source: {source}, held_out: 2}}\n"
        "rewards: [{name: length, source: 'tests:length'}]\n"
    )
    result = [
        Prompts(loader.load(path, changes), tokenizer)
        for changes in ([], ["policy.chat_template_options={enable_thinking: false}"])
    ]
    short, long = ([len(row["prompt_tokens"]) for row in every_row(prompts)] for prompts in result)
    thought = len(tokenizer("<think>\n\n</think>\n\n")["input_ids"])
    assert long == [length + thought for length in short]
    names = {prompts.held_out().schema.metadata[b"keel.tokenizer"] for prompts in result}
    assert len(names) == 2  # rows of one are not taken for those of the other
