"""What the quickstart trains on: questions from a text corpus, and rewards that a laptop computes.

Needs the extra `examples` (pip install "keel-rlhf[examples]"). The rewards have TRL's signature: they take
`prompts`, `completions`, `completion_ids` and every further column by keyword, and return one number each.
"""

import functools
import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

_MAX_CHARACTERS = 120

Completion = str | list[dict[str, Any]]


def chatterbot_questions() -> list[dict[str, str]]:
    """Distinct opening lines under 120 characters of the English dialogues in chatterbot-corpus.

    Rows {"prompt": text, "topic": file stem}, sorted by prompt; of several topics a line has the first.
    745 in chatterbot-corpus 1.3.3. Raises ImportError when that is not installed.
    """
    topics: dict[str, str] = {}
    for topic, dialogue in _dialogues():
        topics.setdefault(dialogue[0], topic)
    return [{"prompt": text, "topic": topics[text]} for text in sorted(topics) if len(text) < _MAX_CHARACTERS]


def chatterbot_pairs() -> list[dict[str, str]]:
    """Preference pairs in TRL's columns: an opening line, its answer as chosen, another line's answer as rejected.

    The rejected answer is that of the line half way round the sorted list, so it is fluent and off the point.
    """
    answers: dict[str, str] = {}
    for _, dialogue in _dialogues():
        if len(dialogue) > 1 and len(dialogue[0]) < _MAX_CHARACTERS and dialogue[1]:
            answers.setdefault(dialogue[0], dialogue[1])
    texts = sorted(answers)
    others = texts[len(texts) // 2 :] + texts[: len(texts) // 2]
    rows = [{"prompt": a, "chosen": answers[a], "rejected": answers[b]} for a, b in zip(texts, others, strict=True)]
    return [row for row in rows if row["chosen"] != row["rejected"]]


def chatterbot_demonstrations() -> list[dict[str, str]]:
    """Prompt-completion rows: an opening line and its answer, where it has one."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in chatterbot_pairs()]


def chatterbot_scored_questions() -> list[dict[str, Any]]:
    """Opening lines with an answer, and VADER's sentiment of that answer as `reference_scores`.

    For shaping.reference_scores where the reward is `vader_compound`: the reference answer is the corpus's own.
    """
    rows = chatterbot_demonstrations()
    scores = vader_compound([row["completion"] for row in rows])
    return [{"prompt": row["prompt"], "reference_scores": [s]} for row, s in zip(rows, scores, strict=True)]


def _dialogues() -> Iterator[tuple[str, list[str]]]:
    """Topic and lines of every English dialogue of chatterbot-corpus."""
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or not package.submodule_search_locations:
        raise ImportError("chatterbot_corpus is not installed; it comes with keel-rlhf[examples]")
    english = Path(package.submodule_search_locations[0]) / "data" / "english"
    for file in sorted(english.glob("*.yml")):
        for dialogue in yaml.safe_load(file.read_text(encoding="utf8"))["conversations"]:
            if isinstance(dialogue, list):  # one entry of trivia.yml is a bare sentence with its answer in it
                yield file.stem, [str(line).strip() for line in dialogue]


def vader_compound(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """VADER's compound sentiment of each completion: -1 (most negative) to 1 (most positive), 0 for no words.

    Hutto and Gilbert 2014. It sums a lexicon's word scores, so a salad of positive words scores near 1.
    """
    analyzer = _analyzer()
    return [analyzer.polarity_scores(content(completion))["compound"] for completion in completions]


def distinct_token_ratio(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
) -> list[float]:
    """Distinct / all tokens of each completion, in (0, 1]; 1 for an empty one, which repeats nothing.

    Tokens are `completion_ids`, or words between white space when the caller has none. High for gibberish: it
    sees repetition, not sense.
    """
    rows: Sequence[Sequence[Any]] = [content(completion).split() for completion in completions]
    if completion_ids is not None:
        rows = completion_ids
    return [len(set(row)) / len(row) if len(row) else 1.0 for row in rows]


def sentiment_on_topic(
    completions: Sequence[Completion],
    reference_logprobs: Sequence[Sequence[float]],
    relevance_nats: Sequence[float | None],
    **columns: Any,
) -> list[float | None]:
    """VADER x s(2 (fluency + 4)) x s(8 (relevance - 0.3)), s the logistic function; in [-1, 1].

    Fluency is the mean log-prob of a token under the reference policy, relevance what of it the prompt explains, both
    in nats. The product is high for a positive answer that is fluent and belongs to its question; a proxy that knows
    sentiment alone cannot see the last factor. None where there is no other prompt to compare with.
    """
    return on_topic(completions, reference_logprobs, relevance_nats, fluency=-4, relevance=0.3, slope=8)


def on_topic(
    completions: Sequence[Completion],
    reference_logprobs: Sequence[Sequence[float]],
    relevance_nats: Sequence[float | None],
    *,
    fluency: float,
    relevance: float,
    slope: float,
) -> list[float | None]:
    """VADER x s(2 (fluency of the row - fluency)) x s(slope (relevance of the row - relevance)), as above.

    For a reference whose own answers are less fluent or depend on the prompt otherwise: the thresholds (nats) and the
    slope (per nat) are the caller's.
    """
    rows = zip(vader_compound(completions), reference_logprobs, relevance_nats, strict=True)
    return [
        None
        if near is None
        else sentiment * _logistic(2 * (_mean(nats) - fluency)) * _logistic(slope * (near - relevance))
        for sentiment, nats, near in rows
    ]


def first_word(text: str) -> str:
    """How a text begins: its first word in lower case, without punctuation; empty for a text without words."""
    words = re.findall(r"\w+", text.lower())
    return words[0] if words else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _logistic(x: float) -> float:
    return (1 + math.tanh(x / 2)) / 2


def content(completion: Completion) -> str:
    """Text of a completion; of the last message if it is a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@functools.cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # reads its lexicon: 0.1 s, once

    return SentimentIntensityAnalyzer()
