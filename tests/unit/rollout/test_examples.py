"""The quickstart's corpus and rewards."""

import sys
from typing import Any

import numpy as np
import pytest

from keel import examples


def test_questions_are_distinct_sorted_opening_lines() -> None:
    rows = examples.chatterbot_questions()
    texts = [row["prompt"] for row in rows]
    assert len(rows) == 745  # chatterbot-corpus 1.3.3: 748 opening lines, 3 of them 120 characters or longer
    assert texts == sorted(set(texts))
    assert all(0 < len(text) < 120 and text == text.strip() for text in texts)
    assert {"prompt": "What is AI?", "topic": "ai"} in rows
    assert {"prompt": "EACH YEAR IN PRO BASEBALL THE", "topic": "sports"} in rows
    assert len({row["topic"] for row in rows}) == 21


def test_pairs_hold_the_answer_of_their_line_and_of_another() -> None:
    rows = examples.chatterbot_pairs()
    answers = {row["prompt"]: row["chosen"] for row in rows}
    assert len(rows) > 700 and len(answers) == len(rows)
    assert answers["What is AI?"].startswith("Artificial Intelligence is")
    assert all(row["rejected"] != row["chosen"] and row["rejected"] in answers.values() for row in rows[:50])


def test_the_malformed_entry_of_the_corpus_is_not_a_prompt() -> None:
    texts = {row["prompt"] for row in examples.chatterbot_questions()}
    assert "I" not in texts and not any("two little ducks" in text for text in texts)


def test_questions_without_the_corpus_name_the_extra(monkeypatch: Any) -> None:
    monkeypatch.setattr(examples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"chatterbot_corpus is not installed.*keel-rlhf\[examples\]"):
        examples.chatterbot_questions()


def test_importing_examples_does_not_import_what_the_extra_brings() -> None:
    assert not {"SentimentIntensityAnalyzer", "chatterbot_corpus"} & set(vars(examples))
    assert "chatterbot_corpus" not in sys.modules


def test_vader_compound_matches_the_formula_on_single_words() -> None:
    """compound = s / sqrt(s^2 + 15) of the lexicon's valence s: good 1.9, bad -2.5."""
    expected = [1.9 / (1.9**2 + 15) ** 0.5, -2.5 / (2.5**2 + 15) ** 0.5, 0.0, 0.0]
    assert examples.vader_compound(["good", "bad", "table", ""]) == pytest.approx(expected, abs=5e-5)


def test_vader_compound_reads_the_last_message_of_a_conversation() -> None:
    conversations = [
        [{"role": "assistant", "content": "bad"}, {"role": "assistant", "content": "good"}],
        [{"role": "assistant", "content": "bad"}],
    ]
    call = {"prompts": ["a", "b"], "completion_ids": [[1], [2]], "topic": ["x", "y"]}
    assert examples.vader_compound(completions=conversations, **call) == examples.vader_compound(["good", "bad"])


def test_distinct_token_ratio_counts_ids_and_without_them_words() -> None:
    completions = ["a a b", "c"]
    assert examples.distinct_token_ratio(completions) == [2 / 3, 1.0]
    ids = [[5, 5, 5, 5], [1, 2, 1]]
    result = examples.distinct_token_ratio(prompts=["", ""], completions=completions, completion_ids=ids, topic=[1, 2])
    assert result == [1 / 4, 2 / 3]


def test_distinct_token_ratio_of_nothing_is_1() -> None:
    assert examples.distinct_token_ratio(["", " "]) == [1.0, 1.0]
    assert examples.distinct_token_ratio(["x x"], completion_ids=[[]]) == [1.0]


def test_distinct_token_ratio_reads_conversations() -> None:
    conversation = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c c"}]
    assert examples.distinct_token_ratio([conversation]) == [0.5]


def test_the_gold_of_the_quickstart_is_a_product_of_three_factors() -> None:
    """Beside the same formula with scipy's logistic function; a missing factor is a missing gold."""
    from scipy.special import expit

    texts = ["What a great day!", "Terrible.", "Great, great, great."]
    nats = [[-1.0, -2.0], [-3.0], [-0.5, -0.25, -6.0]]
    gold = examples.sentiment_on_topic(completions=texts, reference_logprobs=nats, relevance_nats=[0.8, 0.3, None])
    sentiment = examples.vader_compound(completions=texts)
    fluency, relevance = np.array([-1.5, -3.0]), np.array([0.8, 0.3])
    expected = np.array(sentiment[:2]) * expit(2 * (fluency + 4)) * expit(8 * (relevance - 0.3))
    assert gold[:2] == pytest.approx(expected.tolist(), abs=1e-12) and gold[2] is None


@pytest.mark.parametrize(
    ("text", "word"),
    [("  No, not 7.", "no"), ("\u201c42\u201d is it", "42"), ("\n\u00c4pfel!", "\u00e4pfel"), ("?!", ""), ("", "")],
)
def test_the_first_word_of_a_text(text: str, word: str) -> None:
    assert examples.first_word(text) == word
