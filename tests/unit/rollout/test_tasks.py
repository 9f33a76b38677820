"""Prompts and rewards of keel.tasks, through the libraries themselves."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from keel import tasks
from keel.config.prompts import PromptSettings
from keel.errors import ConfigError
from keel.rollout import datasets

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def sums(size: int = 20, **options: Any) -> list[dict[str, Any]]:
    """Rows as a reward gets them: through JSON."""
    return json.loads(json.dumps(tasks.reasoning_gym_prompts("chain_sum", size=size, **{**ONE_DIGIT, **options})))


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def call(function: Any, rows: list[dict[str, Any]], completions: list[str]) -> list[float | None]:
    """As Keel calls a reward: `prompts`, everything by keyword."""
    further = columns(rows)
    prompts = further.pop("prompt")
    return function(prompts=prompts, completions=completions, completion_ids=[[1]] * len(rows), **further)


def read(source: str, **options: Any) -> list[datasets.SourceRow]:
    return datasets.read_rows(PromptSettings(source=f"python:keel.tasks:{source}", options=options))


def test_sums_are_distinct_and_their_answers_right() -> None:
    rows = sums(size=300, instruction="")
    problems = [
        row["prompt"].removeprefix("State the final answer to the following arithmetic problem: ") for row in rows
    ]
    assert len(problems) == len(set(problems)) and 100 < len(problems) <= 200  # 10 x 10 pairs, two signs
    for problem, row in zip(problems, rows, strict=True):
        a, sign, b, _ = problem.split()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_rows_are_a_function_of_the_arguments() -> None:
    assert sums(seed=3) == sums(seed=3)
    assert sums(seed=3) != sums(seed=4)
    longer = [row["prompt"] for row in sums(size=40, seed=3)]
    assert longer[: len(sums(seed=3))] == [row["prompt"] for row in sums(seed=3)]
    assert tasks.instruction_prompts(50, seed=1) == tasks.instruction_prompts(50, seed=1)
    assert tasks.instruction_prompts(50, seed=1) != tasks.instruction_prompts(50, seed=2)


@pytest.mark.parametrize(
    ("extract", "form"),
    [
        ("tag", "I think <answer>1</answer> no, <answer> {} </answer>"),
        ("number", "3 and 1,000: {}."),
        ("text", " {}\n"),
    ],
)
def test_the_answer_is_found_in_its_form(extract: str, form: str) -> None:
    rows = sums(extract=extract)
    right = [form.format(row["answer"]) for row in rows]
    wrong = [form.format(int(row["answer"]) + 1) for row in rows]
    assert call(tasks.reasoning_gym_score, rows, right) == [1.0] * len(rows)
    assert call(tasks.reasoning_gym_correct, rows, right) == [1.0] * len(rows)
    assert call(tasks.reasoning_gym_correct, rows, wrong) == [0.0] * len(rows)


@pytest.mark.parametrize("extract", ["tag", "number", "text"])
def test_no_answer_scores_nothing(extract: str) -> None:
    rows = sums(size=2, extract=extract)
    assert call(tasks.reasoning_gym_score, rows, ["", "I do not know"]) == [0.0, 0.0]


def test_the_form_is_asked_for_unless_told_otherwise() -> None:
    assert sums(size=1)[0]["prompt"].endswith("\nGive the final answer between <answer> and </answer>.")
    assert sums(size=1, extract="number", instruction="Be quick.")[0]["prompt"].endswith(" =\nBe quick.")
    assert sums(size=1, extract="number", instruction="")[0]["prompt"].endswith(" =")


def test_a_part_of_the_score_is_not_correct() -> None:
    """Sorting by what a task pays for: an answer that holds the right one among other words earns a part."""
    rows = json.loads(json.dumps(tasks.reasoning_gym_prompts("letter_counting", size=3, extract="text")))
    wordy = [f"It is {row['answer']}" for row in rows]
    scores = call(tasks.reasoning_gym_score, rows, wordy)
    assert scores == [pytest.approx(len(row["answer"]) / len(text)) for row, text in zip(rows, wordy, strict=True)]
    assert call(tasks.reasoning_gym_correct, rows, wordy) == [0.0] * 3


@pytest.mark.parametrize(
    "task", ["gcd", "word_sorting", "syllogism", "countdown", "spell_backward", "calendar_arithmetic"]
)
def test_other_tasks_pay_their_own_answers(task: str) -> None:
    rows = json.loads(json.dumps(tasks.reasoning_gym_prompts(task, size=3, extract="text")))
    tasks._dataset.cache_clear()  # the scorer is another process
    assert call(tasks.reasoning_gym_correct, rows, [row["answer"] for row in rows]) == [1.0] * 3


def test_rows_the_library_does_not_know_fail() -> None:
    rows = sums(size=4)
    rows[0]["answer"] = "77"  # another version made another question of it
    rows[1]["reasoning_gym"] = None
    rows[2]["reasoning_gym"]["task"] = "no_such_task"
    scores = call(tasks.reasoning_gym_score, rows, ["<answer>77</answer>"] * 4)
    assert scores == [None, None, None, 0.0]
    assert call(tasks.reasoning_gym_correct, rows, ["<answer>77</answer>"] * 4) == scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "no_such_task"}, "'no_such_task' not registered"),
        ({"task": "chain_sum", "no_such_option": 1}, "unexpected keyword argument 'no_such_option'"),
        ({"task": "chain_sum", "min_terms": 0}, "min_terms must be positive"),
        ({"task": "chain_sum", "size": 0}, "no rows"),
        ({"task": "chain_sum", "extract": "last"}, "extract=last: expected one of tag, number, text"),
        ({}, "missing a required argument: 'task'"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read("reasoning_gym_prompts", **options)
    assert message in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("prompts.")


def test_sources_read_the_rows() -> None:
    row = read("reasoning_gym_prompts", task="chain_sum", size=1, **ONE_DIGIT)[0]
    assert set(json.loads(row.further)) == {"answer", "reasoning_gym"} and "=" in row.text
    row = read("instruction_prompts", size=1)[0]
    assert set(json.loads(row.further)) == {"instruction_id_list", "kwargs"}


@pytest.mark.parametrize(
    ("truth", "text", "score"),
    [
        ("1/2", "so it is $\\frac{1}{2}$", 1.0),
        ("1/2", "0.5", 1.0),
        ("1/2", "The answer is \\boxed{2}", 0.0),
        ("x^2 + 1", "\\boxed{1 + x^2}", 1.0),
        ("2x+3", "3", 0.0),
        ("$3$", "3", 1.0),
        ("3", "nobody knows", 0.0),
        ("3", "", 0.0),
        (None, "3", None),
        ("", "3", None),
    ],
)
def test_math_is_compared_by_value(truth: str | None, text: str, score: float | None) -> None:
    assert tasks.math_verify_score([text], answer=[truth]) == [score]


def test_math_reads_solutions_and_wants_one_of_its_columns() -> None:
    solutions = ["First $x=2$, then $y=5$. So \\boxed{7}.", "There is none"]
    assert tasks.math_verify_score(["7", "7"], solution=solutions) == [1.0, None]
    assert tasks.math_verify_score(["2", "7"], solution=solutions) == [0.0, None]
    with pytest.raises(ValueError, match="no column answer, no column solution"):
        tasks.math_verify_score(["7"])


def test_readability_follows_the_formula() -> None:
    """6 words, 17 letters, 1 sentence: G = .058 * 283.33 - .296 * 16.67 - 15.8 = -4.30, easier than 0."""
    long = "Institutional heterogeneity predominates notwithstanding multidimensional considerations"
    plain = "Railways carry people and goods between distant places, often faster than cars."
    easy, hard, middle = tasks.readability(["The cat sat on the mat.", long, plain])
    assert (easy, hard) == (1.0, 0.0)
    letters, words = sum(map(str.isalpha, plain)), len(plain.split())
    grade = 0.058 * 100 * letters / words - 0.296 * 100 / words - 15.8
    assert middle == pytest.approx(1 - grade / 20, abs=1e-6)


def test_readability_of_no_words_fails() -> None:
    assert tasks.readability(["", " ...", [{"role": "assistant", "content": "Go on."}]]) == [None, None, 1.0]


@pytest.mark.parametrize(
    ("names", "given", "text", "score"),
    [
        (["punctuation:no_comma"], [{}], "No commas here", 1.0),
        (["punctuation:no_comma"], [{}], "One, two", 0.0),
        (["punctuation:no_comma"], [{"num_words": None}], "", 0.0),
        (["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": ["light"]}], "A light, a lamp", 0.5),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "less than"}], "Two words", 1.0),
        (["change_case:english_lowercase"], [{}], "all of this is written in lower case letters", 1.0),
        (["startend:end_checker"], [{"end_phrase": "That is all."}], "Bees hum. That is all.", 1.0),
        (["length_constraints:number_words"], [{"num_words": 3}], "Two words", None),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], "Two words", None),
        (["no:such"], [{}], "text", None),
        (["punctuation:no_comma"], [], "text", None),
        ([], [], "text", None),
        (None, None, "text", None),
    ],
)
def test_the_share_of_instructions_followed(names: Any, given: Any, text: str, score: float | None) -> None:
    row = {"prompt": "Write.", "instruction_id_list": names, "kwargs": given}
    assert call(tasks.instruction_following_score, [row], [text]) == [score]


def test_an_instruction_without_its_data_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    row = {"prompt": "p", "instruction_id_list": ["change_case:capital_word_frequency"]}
    row["kwargs"] = [{"capital_frequency": 1, "capital_relation": "at least"}]
    assert call(tasks.instruction_following_score, [row], ["ONE word"]) == [None]


def test_each_instruction_of_the_prompts_can_be_followed_and_not() -> None:
    """A text that does as its words say, and one that does not, for every instruction on its own."""
    followed = '"<<Title>> [name] light That is all."'
    broken = (
        "There is much to say, and the sky has more room than the sea, where ships and whales and fishes come and go."
    )
    for name, given, _ in tasks._INSTRUCTIONS:
        text = followed.strip('"') if name == "startend:end_checker" else followed
        rows = [{"prompt": "p", "instruction_id_list": [name], "kwargs": [given]}] * 2
        assert call(tasks.instruction_following_score, rows, [text, broken]) == [1.0, 0.0], name


def test_prompts_say_their_instructions() -> None:
    rows = tasks.instruction_prompts(200)
    words = {name: text for name, _, text in tasks._INSTRUCTIONS}
    assert len({row["prompt"] for row in rows}) == len(rows) > 150
    assert all(words[name] in row["prompt"] for row in rows for name in row["instruction_id_list"])
    assert all(len(row["kwargs"]) == len(set(row["instruction_id_list"])) for row in rows)


def test_without_the_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks._library.cache_clear()
    tasks._dataset.cache_clear()
    for name in ("textstat", "reasoning_gym"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"textstat is not installed; it comes with keel-rlhf\[examples\]"):
        tasks.readability(["text"])
    with pytest.raises(ConfigError, match=r"reasoning_gym is not installed; it comes with keel-rlhf\[examples\]"):
        read("reasoning_gym_prompts", task="chain_sum")


def test_importing_tasks_does_not_import_the_libraries() -> None:
    code = "import sys, keel.tasks; print(sorted({'reasoning_gym', 'textstat', 'math_verify', 'if_verifiable'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
