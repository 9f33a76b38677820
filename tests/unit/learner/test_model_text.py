"""Texts as models meet them: a completion stands behind its prompt, in ids and in text, for every kind of tokenizer."""

import json
from typing import Any

import pytest

from keel.learner import end_tokens
from keel.learner.model_text import ModelText
from keel.protocols import Sampling
from keel.rollout.stored_completions import StoredCompletions
from vocabularies import CLOSES, byte_level, ends_every_text, family, sentence_piece

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
MARK = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ["<s>", "</s>", "<think>", "</think>"]
KINDS = {
    "byte level": lambda: byte_level(SPECIAL, **MARK),
    "pre-tokenizer": lambda: sentence_piece(SPECIAL, **MARK),
    "normalizer": lambda: sentence_piece(SPECIAL, legacy=True, **MARK),
}


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encoded(tokenizer: Any, prompt: str, answer: str, finished: bool = True) -> tuple[list[int], list[int]]:
    text = ModelText(tokenizer)
    end = tokenizer.eos_token_id
    ids = text.answer_ids(prompt, [], answer, finished=finished, stop=(end,), end=end)
    return text.prompt_ids([prompt], rendered=False)[0], ids


def in_chat(tokenizer: Any, answer: Any, messages: Any = ASKED, finished: bool = True, **options: Any) -> Any:
    """Ids of prompt and answer in a conversation, and both as text."""
    text = ModelText(tokenizer, options)
    stop = [n for n in (text.chat.frame.end, tokenizer.eos_token_id) if n is not None]
    end = end_tokens.behind_answers(text, stop, True)
    prompt = text.prompt_ids([text.chat.render(messages)], rendered=True)[0]
    ids = text.answer_ids("", messages, answer, finished=finished, stop=stop, end=end)
    before = text_of(tokenizer, prompt)
    return prompt, ids, before, text_of(tokenizer, prompt + ids)[len(before) :]


# ---- one space, where it is


@pytest.mark.parametrize("prompt", ["2 + 2 =", "def square(x):\n", "Answer: ", "how are y", "the", "Hello"])
@pytest.mark.parametrize("answer", ["4", " 4", "ou?", "  return x", "Hello world", "\n\nParis", " "])
def test_prompt_and_completion_are_one_text(tokenizer: Any, prompt: str, answer: str) -> None:
    """No space is gained in between, none is lost, wherever the border lies; and the prompt's ids stay what they are."""
    before, ids = encoded(tokenizer, prompt, answer)
    assert text_of(tokenizer, before + ids[:-1]) == prompt + answer
    assert before == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]


@pytest.mark.parametrize("answer", ["4", " 4", "Hello world ", "\nParis", "x . y , z", " it ' s"])
def test_ids_become_the_text_they_were(tokenizer: Any, answer: str) -> None:
    """What a reward function sees is what the model wrote, its first space and spaces before punctuation included."""
    _, ids = encoded(tokenizer, "2 + 2 =", answer)
    assert ModelText(tokenizer).texts([ids, ids[:-1]], (tokenizer.eos_token_id,), [False, False]) == [answer] * 2


def test_what_could_be_joined_over_the_border_is_not() -> None:
    """Where prompt and completion together would make one token, both keep theirs: the model saw the border."""
    tokenizer = KINDS["byte level"]()
    whole = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    before, ids = encoded(tokenizer, "Hel", "lo")
    assert before + ids[:-1] != whole and text_of(tokenizer, before + ids[:-1]) == "Hello"


# ---- control tokens and others


def test_special_tokens_that_belong_to_an_answer_are_seen(tokenizer: Any) -> None:
    answer, prompt = "<think>first</think>4", "2 + 2 ="
    before, ids = encoded(tokenizer, prompt, answer)
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    seen = ModelText(tokenizer).texts([ids], (tokenizer.eos_token_id,), [False])[0]
    assert seen == text_of(tokenizer, before + ids[:-1])[len(prompt) :]
    spaced = tokenizer.backend_tokenizer.normalizer is not None  # Llama 2: one behind every special token
    assert seen == ("<think> first</think> 4" if spaced else answer)


@pytest.mark.parametrize("name", [name for name in CLOSES if name not in ("alpaca", "vicuna", "llama 2")])
def test_ends_padding_and_headers_are_not_seen(name: str) -> None:
    """Nor the headers of turns: a policy that writes them would speak to a reward model as its user."""
    tokenizer = family(name)
    text = ModelText(tokenizer)
    asked_again = text.chat.render([*ASKED, {"role": "assistant", "content": "Paris"}, *ASKED])
    frames = [
        n for n in tokenizer(asked_again, add_special_tokens=False)["input_ids"] if n in tokenizer.all_special_ids
    ]
    frames = [n for n in frames if tokenizer.convert_ids_to_tokens(n) not in ("<think>", "</think>")]
    words = tokenizer("Hello world", add_special_tokens=False)["input_ids"]
    row = [*words, *dict.fromkeys([*frames, tokenizer.eos_token_id])]
    assert len(row) > len(words)
    assert text.texts([row], (), [False])[0].strip() == "Hello world"


# ---- a tokenizer's own end token


@pytest.mark.parametrize("front", [None, "<s>"])
def test_an_end_token_behind_every_text_is_behind_what_ended_only(tokenizer: Any, front: str | None) -> None:
    plain = encoded(tokenizer, "2 + 2 =", "4")
    ends_every_text(tokenizer, front)
    end = tokenizer.eos_token_id
    before, ids = encoded(tokenizer, "2 + 2 =", "4")
    _, cut = encoded(tokenizer, "2 + 2 =", "4", finished=False)
    assert (before[1:] if front else before, ids) == plain
    assert end not in before and ids.count(end) == 1 and cut == ids[:-1]


@pytest.mark.parametrize("behind", ["</s>", "</s>\n", " </s>"])
def test_a_completion_that_brings_its_end_token_gets_no_second(tokenizer: Any, behind: str) -> None:
    _, ids = encoded(tokenizer, "2 + 2 =", f"4{behind}")
    _, cut = encoded(tokenizer, "2 + 2 =", f"4{behind}", finished=False)  # it did end
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id and cut == ids
    assert text_of(tokenizer, ids).startswith(text_of(tokenizer, encoded(tokenizer, "2 + 2 =", "4")[1][:-1]))


def test_where_nothing_ends_a_sample_nothing_is_put_behind_an_answer(tokenizer: Any) -> None:
    text = ModelText(tokenizer)
    ids = text.answer_ids("2 + 2 =", [], "4</s>", finished=True, stop=(), end=None)
    assert ids == text.answer_ids("2 + 2 =", [], "4", finished=False, stop=(), end=None)


# ---- conversations


@pytest.mark.parametrize("name", [name for name in CLOSES if name not in ("r1", "vicuna", "alpaca", "glm")])
@pytest.mark.parametrize("answer", ["Paris is it.", " Hello world \n", "<think>\nthe reason\n</think>\n\nParis"])
def test_a_conversation_is_the_text_of_its_template(name: str, answer: str) -> None:
    """Up to the token that closes the turn; where the template keeps the answer and begins with the prompt."""
    tokenizer = family(name)
    _, ids, before, words = in_chat(tokenizer, answer)
    whole = tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": answer}], tokenize=False)
    closing = str(CLOSES[name])
    assert whole.startswith(before.replace("<s> ", "<s>"))
    rendered = whole[len(before.replace("<s> ", "<s>")) :]  # Llama 2's tokenizer, again
    assert words == rendered[: rendered.index(closing) + len(closing)]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(closing) and ids.count(ids[-1]) == 1


@pytest.mark.parametrize("name", list(CLOSES))
def test_a_cut_answer_has_no_end_and_nothing_behind_it(name: str) -> None:
    tokenizer = family(name)
    _, whole, _, _ = in_chat(tokenizer, "Paris is it.")
    _, cut, _, words = in_chat(tokenizer, "Paris is it.", finished=False)
    assert words.endswith("Paris is it.")
    assert whole[: len(cut)] == cut or name == "llama 2"  # whose template writes a space before the end
    assert not set(cut) & {tokenizer.eos_token_id, ModelText(tokenizer).chat.frame.end}


@pytest.mark.parametrize("name", [name for name in CLOSES if CLOSES[name]])
def test_one_end_token_also_where_the_answer_brings_it_or_the_tokenizer_puts_one(name: str) -> None:
    tokenizer, closing = family(name), CLOSES[name]
    expected = in_chat(tokenizer, "Paris is it.")
    for behind in (closing, f"{closing}\n", tokenizer.eos_token):
        assert in_chat(tokenizer, f"Paris is it.{behind}") == expected
        assert in_chat(tokenizer, f"Paris is it.{behind}", finished=False) == expected
    assert in_chat(ends_every_text(tokenizer), "Paris is it.") == expected


@pytest.mark.parametrize(("name", "end"), [("vicuna", "</s>"), ("alpaca", "<|endoftext|>"), ("glm", "<|endoftext|>")])
def test_a_template_that_closes_no_last_turn_ends_with_what_stops_samples(name: str, end: str) -> None:
    """What closes a turn that another follows, else the tokenizer's end token; trained as written in front of it."""
    tokenizer = family(name)
    _, ids, before, words = in_chat(tokenizer, "Paris is it.")
    assert words.strip() == f"Paris is it.{end}" and ids[-1] == tokenizer.convert_tokens_to_ids(end)
    whole = tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": "Paris is it."}], tokenize=False)
    assert whole.strip() == (before.replace("<s> ", "<s>") + words).removesuffix(end).strip()


@pytest.mark.parametrize("name", list(CLOSES))
@pytest.mark.parametrize("answer", ["Paris is it.", "Hello world, how are you?"])
@pytest.mark.parametrize("finished", [True, False])
def test_what_is_sampled_is_read_and_stored_again_as_the_same_ids(name: str, answer: str, finished: bool) -> None:
    """ids -> the text a judge sees -> `keel label` writes it -> the ids that `keel prefer` trains on."""
    tokenizer = family(name)
    _, ids, _, _ = in_chat(tokenizer, answer, finished=finished)
    seen = ModelText(tokenizer).texts([ids], (tokenizer.eos_token_id,), [True])[0]
    assert in_chat(tokenizer, seen, finished=finished)[1] == ids
    assert seen.endswith(answer)


def test_a_system_message_that_moves_leaves_the_prompt_what_was_sampled_from() -> None:
    """Mistral's template writes it into the last message, which in the whole conversation is the answer."""
    tokenizer = family("mistral")
    messages = [{"role": "system", "content": "be kind"}, *ASKED]
    _, _, before, words = in_chat(tokenizer, "Paris", messages)
    assert "be kind" in before and words == " Paris</s>"
    assert "be kind" not in tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "x"}], tokenize=False
    )


@pytest.mark.parametrize("answer", ["<think>\nthe reason\n</think>\n\nParis", "the reason\n</think>\n\nParis"])
def test_thoughts_that_a_template_drops_are_trained_as_they_were_written(answer: str) -> None:
    """The prompt opens them: not a second time."""
    _, _, before, words = in_chat(family("r1"), answer)
    assert before.endswith("<|Assistant|><think>\n") and words == "the reason\n</think>\n\nParis<|end|>"


@pytest.mark.parametrize(
    ("options", "prompt_ends", "words"),
    [
        ({}, "assistant\n", "<think>\n\n</think>\n\nParis<|im_end|>"),
        ({"enable_thinking": True}, "assistant\n", "<think>\n\n</think>\n\nParis<|im_end|>"),
        ({"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n", "Paris<|im_end|>"),
    ],
)
def test_an_option_of_the_template_changes_prompt_and_answer(
    options: dict[str, Any], prompt_ends: str, words: str
) -> None:
    _, _, before, behind = in_chat(family("qwen 3"), "Paris", **options)
    assert before.endswith(prompt_ends) and behind == words


def test_fields_of_a_stored_message_reach_the_template() -> None:
    answer = {"role": "assistant", "content": "Paris", "reasoning_content": "the reason"}
    assert in_chat(family("qwen 3"), answer)[3] == "<think>\nthe reason\n</think>\n\nParis<|im_end|>"
    columns = {"messages": [*ASKED, answer]}
    tokenizer = family("qwen 3")
    sampling = Sampling(1.0, 1.0, 100, (tokenizer.eos_token_id,))
    ids = StoredCompletions(1.0, tokenizer, sampling).encode(columns, "", ASKED)
    assert ids == [in_chat(tokenizer, answer)[1]]


def test_stored_rows_of_both_kinds_end_with_their_own_token() -> None:
    """A base model with a chat template: the template's end behind conversations, the tokenizer's behind plain text."""
    tokenizer = family("chatml of a base model")
    base, turn = (tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>"))
    stored = StoredCompletions(1.0, tokenizer, Sampling(1.0, 1.0, 100, (base, turn)))
    assert stored.encode({"completion": "Paris"}, "What?", [])[0][-1] == base
    assert stored.encode({"completion": "Paris"}, "What?", ASKED)[0][-1] == turn
    none = StoredCompletions(1.0, tokenizer, Sampling(1.0, 1.0, 100, ()))
    assert not {base, turn} & {
        n for messages in ([], ASKED) for n in none.encode({"completion": "Paris"}, "", messages)[0]
    }
    alone = StoredCompletions(1.0, tokenizer, Sampling(1.0, 1.0, 100, (base,)))
    words = alone.encode({"completion": "Paris"}, "What?", ASKED)[0]
    assert words[-1] == base and turn not in words
    assert json.dumps(words)
