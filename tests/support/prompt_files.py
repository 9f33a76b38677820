"""Prompt files of a test, tokenizers of a few words, and settings that read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from keel.config import loader
from keel.errors import ConfigError
from keel.rollout.prompts import Prompts

WORDS = ["<unk>", "<s>", "<sys>", "<user>", "<bot>", "hello", "world", "be", "kind", "how", "are", "you"]


UNK, BOS, SYS, USER, BOT, HELLO, WORLD, BE, KIND, HOW, ARE, YOU = range(12)


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}<sys>{% elif message.role == 'user' %}<user>{% else %}<bot>{% endif %}"
    " {{ message.content }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def word_tokenizer(chat_template: str | None = TEMPLATE, numbers: int = 0) -> PreTrainedTokenizerFast:
    """One id a word (see WORDS, then "0", "1", ...); puts <s> in front of plain text, like Llama's."""
    words = [*WORDS, *map(str, range(numbers))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<sys>", "<user>", "<bot>"],
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


PLAIN = word_tokenizer(chat_template=None, numbers=200)


CHAT = word_tokenizer(numbers=200)


def settings_for(
    source: object, seed: int = 0, samples: int = 2, policy: Any = None, evaluation: Any = None, **prompts: Any
) -> Any:
    return loader.parse(
        {
            "run": {"name": "test", "seed": seed},
            "policy": {"model": "tiny", **(policy or {})},
            "prompts": {"source": str(source), "held_out": 2, **prompts},
            "sampling": {"samples_per_prompt": samples},
            "rewards": [{"name": "length", "source": "tests:length"}],
            "evaluation": evaluation or {},
        }
    )


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def numbered(path: Path, count: int) -> Path:
    """Prompts "0", "1", ...: the text tells the row of the source."""
    return jsonl(path / "numbers.jsonl", [{"prompt": str(number)} for number in range(count)])


def one_line(source: object, tokenizer: Any = PLAIN, **options: Any) -> str:
    """The error of a broken source."""
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        Prompts(settings_for(source, **options), tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    return message


def every_row(prompts: Prompts) -> list[dict[str, Any]]:
    """Each row once, in the order of the source."""
    trained = prompts.batch(range(prompts.counts["train"])).to_pylist()
    rows = {row["prompt_id"]: row for row in [*trained, *prompts.held_out().to_pylist()]}
    return [rows[prompt_id] for prompt_id in sorted(rows)]
