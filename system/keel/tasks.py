"""Tasks with a verifier, from libraries people know: prompts, and rewards with TRL's signature.

reasoning-gym (procedural tasks), math-verify (equal in value), textstat (readability) and IFEval's checkers
(if-verifiable). Needs the extra `examples`; nothing is downloaded. A completion that is wrong or has no answer
scores 0; one of which the library cannot tell scores None, a failed sample.
"""

import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from keel.errors import ConfigError
from keel.examples import Completion, content
from keel.text import one_line

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_HARDEST_GRADE = 20.0

Scores = list[float | None]


def reasoning_gym_prompts(
    task: str, size: int = 500, seed: int = 0, extract: str = "tag", instruction: str | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Distinct questions among the first `size` of a reasoning-gym task (`chain_sum`, ...), for `reasoning_gym_score`.

    Rows {"prompt": question and instruction, "answer": the library's, "reasoning_gym": how to make the entry again},
    a function of the arguments alone; `options` are the task's own (`min_terms`, ...). `extract` says what of a
    completion is its answer: tag (between the last <answer> and </answer>), number (the last one, without thousands
    commas) or text (all of it). `instruction` asks for that form; None: the form's own words, "": nothing.
    Raises ConfigError for an unknown task, extract or option.
    """
    if extract not in _FORMS:
        raise ConfigError(f"prompts.options.extract={extract}: expected one of {', '.join(_FORMS)}")
    place = {"task": task, "size": size, "seed": seed, "options": json.dumps(options, sort_keys=True)}
    asked = _FORMS[extract][1] if instruction is None else instruction
    rows: dict[str, dict[str, Any]] = {}
    for index in range(size):
        entry = _dataset(**place)[index]
        prompt = f"{entry['question']}\n{asked}".strip()
        made = {**place, "index": index, "extract": extract}
        rows.setdefault(prompt, {"prompt": prompt, "answer": entry["answer"], "reasoning_gym": made})
    return list(rows.values())


def reasoning_gym_score(
    completions: Sequence[Completion], reasoning_gym: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> Scores:
    """What the task's own `score_answer` says: 0 to 1; many tasks pay a part for an answer that holds the right one.

    0 for a completion without an answer. None where the library at hand does not make the row's question again
    (another version) or cannot score it.
    """
    rows = zip(completions, reasoning_gym, answer, strict=True)
    return [_verified(content(completion), made, expected) for completion, made, expected in rows]


def reasoning_gym_correct(completions: Sequence[Completion], **columns: Any) -> Scores:
    """1 for a full score of `reasoning_gym_score`, 0 for less: accuracy."""
    scores = reasoning_gym_score(completions, **columns)
    return [None if score is None else float(score >= 1.0) for score in scores]


def _verified(text: str, made: dict[str, Any] | None, expected: Any) -> float | None:
    if made is None:
        return None
    place = {key: made[key] for key in ("task", "size", "seed", "options")}
    try:
        dataset = _dataset(**place)
        entry = dataset[made["index"]]
        if entry["answer"] != expected:
            return None
        return float(dataset.score_answer(_FORMS[made["extract"]][0](text), entry))
    except Exception:  # a hundred tasks parse what a model wrote, each in its own way
        return None


@functools.lru_cache(maxsize=16)
def _dataset(task: str, size: int, seed: int, options: str) -> Any:
    """A reasoning-gym dataset. Raises ConfigError when the library refuses the arguments."""
    gym = _library("reasoning_gym")
    try:
        return gym.create_dataset(task, size=size, seed=seed, **json.loads(options))
    except (ValueError, TypeError, AssertionError) as error:
        reason = one_line(error)
        problem = f"prompts.options: task={task} size={size} {options}: {reason}"
        raise ConfigError(f"{problem}; expected a reasoning-gym task and its options") from None


def _tagged(text: str) -> str | None:
    return _library("reasoning_gym.utils").extract_answer(text)


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else None


_FORMS: dict[str, tuple[Callable[[str], str | None], str]] = {
    "tag": (_tagged, "Give the final answer between <answer> and </answer>."),
    "number": (_last_number, "Give the final answer as one number."),
    "text": (str.strip, "Reply with the answer only."),
}
"""How an answer is taken out of a completion, and what asks for that form."""


def math_verify_score(
    completions: Sequence[Completion],
    answer: Sequence[str | None] | None = None,
    solution: Sequence[str | None] | None = None,
    **columns: Any,
) -> Scores:
    """1 where math-verify finds the completion's last expression equal to the true one, else 0: 1/2 = 0.5 = \\frac12.

    The truth is a bare expression in the column `answer`, or the last expression of the text in `solution`.
    None where there is none, or it cannot be parsed, or comparing takes over 5 s. Raises ValueError without a column.
    """
    truths = [_bare(text) for text in answer] if answer is not None else solution
    if truths is None:
        raise ValueError("math_verify_score: no column answer, no column solution; expected one of them")
    return [_equal(truth, content(completion)) for truth, completion in zip(truths, completions, strict=True)]


def _bare(answer: str | None) -> str | None:
    """An expression as LaTeX, so that all of it is read: of "2x+3" outside of $ the library takes the 3."""
    return answer if not answer or "$" in answer or "\\boxed" in answer else f"${answer}$"


def _equal(truth: str | None, text: str) -> float | None:
    library = _library("math_verify")
    timeout = _library("math_verify.errors").TimeoutException  # no Exception, on purpose
    try:
        gold = library.parse(truth or "", raise_on_error=True)
        if not gold:
            return None
        return float(library.verify(gold, library.parse(text, raise_on_error=True), raise_on_error=True))
    except (Exception, timeout):  # sympy on what a model wrote may raise anything
        return None


def readability(completions: Sequence[Completion], **columns: Any) -> Scores:
    """1 - G / 20 cut to [0, 1], G the school grade of Coleman and Liau 1975 by textstat: 1 easy, 0 beyond a graduate.

    G = 0.058 (letters a 100 words) - 0.296 (sentences a 100 words) - 15.8, as textstat rounds the paper's 0.0588.
    Not Flesch's: textstat looks its syllables up in a dictionary that it downloads. None for no words.
    """
    textstat = _library("textstat")
    texts = [content(completion) for completion in completions]
    grades = [textstat.coleman_liau_index(text) if textstat.lexicon_count(text) else None for text in texts]
    return [None if grade is None else min(max(1 - grade / _HARDEST_GRADE, 0.0), 1.0) for grade in grades]


def instruction_prompts(size: int = 500, seed: int = 0) -> list[dict[str, Any]]:
    """Requests with one or two verifiable instructions, in IFEval's columns: `size` rows, repeats left out.

    Rows {"prompt", "instruction_id_list", "kwargs"}, a function of the arguments. IFEval itself
    (google/IFEval, 541 rows) has the same columns.
    """
    rows: dict[str, dict[str, Any]] = {}
    for index in range(size):
        draw = Random(f"{seed}:{index}")
        chosen = draw.sample(_INSTRUCTIONS, draw.randint(1, 2))
        prompt = " ".join([draw.choice(_REQUESTS).format(draw.choice(_TOPICS)), *(text for _, _, text in chosen)])
        names, arguments = [name for name, _, _ in chosen], [given for _, given, _ in chosen]
        rows.setdefault(prompt, {"prompt": prompt, "instruction_id_list": names, "kwargs": arguments})
    return list(rows.values())


_TOPICS = ("the sea", "a small town", "winter", "bread", "the moon", "a garden", "trains", "music", "a library", "bees")
_REQUESTS = ("Write about {}.", "Tell me something about {}.", "Describe {} to a child.", "Why do people like {}?")
_INSTRUCTIONS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("punctuation:no_comma", {}, "Do not use any commas."),
    ("length_constraints:number_words", {"num_words": 20, "relation": "less than"}, "Use less than 20 words."),
    ("keywords:existence", {"keywords": ["light"]}, "Use the word light."),
    ("keywords:forbidden_words", {"forbidden_words": ["the"]}, "Do not use the word the."),
    ("startend:end_checker", {"end_phrase": "That is all."}, "End with the words: That is all."),
    ("startend:quotation", {}, "Put your whole answer in double quotation marks."),
    ("detectable_format:title", {}, "Give it a title in double angular brackets, such as <<title>>."),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "Use a placeholder such as [name]."),
)
"""IFEval's name of an instruction, its arguments, its words. None needs NLTK's data, any two can hold together."""


def instruction_following_score(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[dict[str, Any]]],
    **columns: Any,
) -> Scores:
    """Share of a row's instructions that the completion follows, IFEval's strict check (2311.07911); 0 if empty.

    None for an instruction that is unknown, lacks an argument (the checker would draw one at random), or needs
    data that is not installed: `number_sentences` and `capital_word_frequency` want NLTK's punkt_tab.
    """
    rows = zip(prompts, completions, instruction_id_list, kwargs, strict=True)
    return [_followed(prompt, content(completion), names, given) for prompt, completion, names, given in rows]


def _followed(prompt: Any, text: str, names: Sequence[str], given: Sequence[dict[str, Any]]) -> float | None:
    evaluator = _library("if_verifiable")
    if not names or len(names) != len(given) or not all(map(_is_complete, names, given)):
        return None
    _library("langdetect").DetectorFactory.seed = 0  # else it may guess another language on every call
    sample = evaluator.IFEvalSample(key=0, prompt=prompt, instruction_id_list=list(names), kwargs=list(given))
    try:
        _, scores = evaluator.evaluate_output_for_sample("ifeval", sample, text)
    except (LookupError, TypeError, ValueError):  # NLTK's data is missing, or an argument makes no sense
        return None
    return float(scores.partial_strict)


def _is_complete(name: str, given: dict[str, Any]) -> bool:
    """Whether the instruction is known and has all its arguments."""
    checker = _library("if_verifiable.ifeval").INSTRUCTION_DICT.get(name)
    return checker is not None and all(given.get(key) is not None for key in checker(name).get_instruction_args_keys())


@functools.cache
def _library(name: str) -> Any:
    """The module of that name, imported when first needed. Raises ImportError that names the extra."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # one of reasoning-gym's dependencies has some
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; it comes with keel-rlhf[examples]") from None
