"""Reward functions as people write them: plain or async, with lists or arrays; what they return wrongly, in words."""

import asyncio
import functools
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from keel import schema
from keel.config.rewards import EnsembleSettings, RewardSettings
from keel.config.workers import ScorerSettings
from keel.errors import ConfigError
from keel.online import preflight
from keel.rollout import scorers
from keel.rollout.reward_functions import Calls, EventLoop, Late, WrongAnswer, describe, is_async, numbers
from rollouts import generated, prompts
from runs import settings

EVENTS: list[str] = []


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture(autouse=True)
def _no_events() -> None:
    EVENTS.clear()


async def slow(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    EVENTS.append("slow begins")
    await asyncio.sleep(0.2)
    EVENTS.append("slow ends")
    return [float(len(text)) for text in answer]


async def meets_slow(completions: list[str], **columns: Any) -> "torch.Tensor":
    EVENTS.append("other begins")
    while "slow begins" not in EVENTS:
        await asyncio.sleep(0.01)
    return torch.arange(len(completions), dtype=torch.float32)


def plain(completions: list[str], **columns: Any) -> np.ndarray:
    assert "slow ends" not in EVENTS  # the others wait meanwhile
    EVENTS.append("plain")
    return np.full(len(completions), 0.5, np.float32)


async def raises(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    raise LookupError("x" * 800)


async def leaves(completions: list[str], **columns: Any) -> list[float]:
    raise SystemExit(3)


async def cancels(completions: list[str], **columns: Any) -> list[float]:
    raise asyncio.CancelledError


async def never(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.Event().wait()
    return [1.0] * len(completions)


async def deaf(completions: list[str], **columns: Any) -> list[float]:
    for _ in range(200):
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            EVENTS.append("goes on")
    return [1.0] * len(completions)


async def blocks(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(3)
    return [1.0] * len(completions)


class Judge:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return [self.scale] * len(completions)


judge = Judge(2.0)
of_partial = functools.partial(slow)


def wrapped(completions: list[str], **columns: Any) -> Any:
    """A plain function that returns what is to be awaited."""
    return judge(completions=completions)


def reward(name: str, **fields: Any) -> RewardSettings:
    return RewardSettings(name=name, source=f"{__name__}:{name}", **fields)


def scored(*names: str, seconds: float = 60.0) -> tuple[pa.RecordBatch, dict[str, int]]:
    scorer = scorers.RewardScorer([reward(name) for name in names], EnsembleSettings(), ScorerSettings(), "s", seconds)
    answer, receipt = scorer.score(generated(prompts([0, 1])))
    schema.check(answer)
    scorer._loop.close()
    return answer, dict(receipt.failures)


def test_async_functions_are_awaited_together_while_plain_ones_run() -> None:
    answer, failures = scored("plain", "slow", "meets_slow")
    assert failures == {}
    assert answer.column("reward_slow").to_pylist() == [1.0] * 4  # it got the column `answer`
    assert answer.column("reward_meets_slow").to_pylist() == [0.0, 1.0, 2.0, 3.0]
    assert answer.column("reward_plain").to_pylist() == [0.5] * 4
    assert EVENTS.index("plain") < EVENTS.index("slow ends")


@pytest.mark.parametrize(("name", "value"), [("judge", 2.0), ("of_partial", 1.0), ("wrapped", 2.0)])
def test_everything_that_makes_a_coroutine_is_awaited(name: str, value: float) -> None:
    answer, failures = scored(name)
    assert (answer.column("reward").to_pylist(), failures) == ([value] * 4, {})


def test_what_is_async() -> None:
    assert all(is_async(function) for function in (slow, judge, of_partial, functools.partial(judge), judge.__call__))
    assert not any(is_async(function) for function in (plain, wrapped, Judge, len, functools.partial(plain)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("raises", "LookupError"), ("leaves", "SystemExit"), ("cancels", "CancelledError")],
)
def test_what_one_async_function_raises_fails_its_samples_alone(name: str, reason: str) -> None:
    scorer = scorers.RewardScorer(
        [reward("judge"), reward(name, role="monitor"), reward("meets_slow"), reward("slow")],
        EnsembleSettings(),
        ScorerSettings(),
        "s",
    )
    for _ in range(2):  # also after one that ended the loop's thread
        EVENTS.clear()
        answer, receipt = scorer.score(generated(prompts([0, 1])))
        assert dict(receipt.failures) == {f"{name}_{reason}": 4}
        assert answer.column("reward").to_pylist() == [3.0, 4.0, 5.0, 6.0]
        assert answer.column(f"reward_{name}").null_count == 4
    scorer._loop.close()


@pytest.mark.parametrize("name", ["never", "deaf", "blocks"])
def test_an_async_function_has_a_deadline(name: str) -> None:
    scorer = scorers.RewardScorer(
        [reward("judge"), reward(name, role="monitor")], EnsembleSettings(), ScorerSettings(), "s", 0.5
    )
    began = time.monotonic()
    answer, receipt = scorer.score(generated(prompts([0, 1])))
    assert time.monotonic() - began < 2.9
    # one that blocks the loop may keep the others from their turn: they fail, they do not become 0
    assert receipt.failures[f"{name}_timeout"] == 4
    assert set(receipt.failures) <= {f"{name}_timeout", "judge_timeout"}
    assert answer.column("reward").null_count == receipt.failures.get("judge_timeout", 0)
    again = scorers.RewardScorer([reward("judge")], EnsembleSettings(), ScorerSettings(), "s", 60)
    again._loop = scorer._loop
    assert again.score(generated(prompts([0, 1])))[0].column("reward").to_pylist() == [2.0] * 4
    scorer._loop.close()
    again._loop.close()


def test_the_loop_stays_the_same_from_batch_to_batch(loop: EventLoop) -> None:
    """Clients that a function keeps are bound to the loop they were made in."""
    seen: list[Any] = []

    async def own(**columns: Any) -> list[float]:
        seen.append(asyncio.get_running_loop())
        return [1.0]

    for _ in range(3):
        assert Calls({"own": own}, dict, loop, 10).finish() == {"own": [1.0]}
    assert len(set(map(id, seen))) == 1


def test_a_closed_loop_leaves_no_thread() -> None:
    loop, before = EventLoop(), set(threading.enumerate())
    Calls({"judge": functools.partial(judge, completions=["a"])}, dict, loop, 10).finish()
    (thread,) = set(threading.enumerate()) - before
    loop.close()
    assert not thread.is_alive()


def test_no_function_sees_what_another_does_to_its_columns() -> None:
    def spoils(completions: list[str], **columns: Any) -> list[float]:
        completions.clear()
        return [0.0]

    def reads(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    functions: dict[str, Callable[..., Any]] = {"spoils": spoils, "reads": reads}
    result = Calls(functions, lambda: {"completions": ["abc"]}, EventLoop(), 10).finish()
    assert result == {"spoils": [0.0], "reads": [3.0]}


# ---- what they return

GOOD: list[tuple[Any, list[float | None]]] = [
    ([1, 2.5], [1.0, 2.5]),
    ((True, None), [1.0, None]),
    (np.array([1, 2]), [1.0, 2.0]),
    (np.array([True, False]), [1.0, 0.0]),
    (np.array([0.5, 2], np.float16), [0.5, 2.0]),
    (torch.tensor([1, 2]), [1.0, 2.0]),
    (torch.tensor([True, False]), [1.0, 0.0]),
    (torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True), [0.5, 2.0]),
    ([torch.tensor(1.5), np.float32(2.5)], [1.5, 2.5]),
    ([np.array(1.5), torch.tensor([2.5])], [1.5, 2.5]),
    ([np.bool_(True), np.int8(3)], [1.0, 3.0]),
    ([Fraction(1, 2), Decimal("0.25")], [0.5, 0.25]),
]


@pytest.mark.parametrize(("answer", "expected"), GOOD, ids=lambda value: str(type(value).__name__))
def test_numbers_of_every_kind(answer: Any, expected: list[float | None]) -> None:
    result = numbers(answer, strict=True)
    assert result == expected and all(type(value) in (float, type(None)) for value in result)


def test_an_int_beyond_any_float_is_infinite() -> None:
    assert numbers([10**400, -(10**400), 1]) == [math.inf, -math.inf, 1.0]
    with pytest.raises(WrongAnswer, match=r"a list of 1 values, of which number 0 is an int beyond any float"):
        numbers([10**400], strict=True)


class Odd:
    def __len__(self) -> int:
        raise RuntimeError("no length")


Long = type("L" * 10**5, (), {})
BAD: list[tuple[Any, str]] = [
    (None, r"^None; expected a list of one number or None for each completion$"),
    (0.5, r"^a float; expected"),
    (10**800, r"^an int; expected"),
    ("9" * 800, r"^a str of 800 characters; expected"),
    (b"12", r"^a bytes of 2 characters; expected"),
    ({"a": 1}, r"^a dict of 1 entries; expected"),
    ({1.0, 2.0}, r"^a set of 2 values; expected"),
    ((value for value in [1.0]), r"^a generator; expected"),
    (np.float32(1.0), r"^a float32 of shape \(\); expected"),
    (torch.tensor(1.0), r"^a Tensor of shape \(\); expected"),
    (np.ones((2, 3)), r"^a ndarray of shape \(2, 3\), of which number 0 is a list of 3 values; expected"),
    (torch.ones(2, 1), r"^a Tensor of shape \(2, 1\), of which number 0 is a list of 1 values; expected"),
    (["1.0", 2.0], r"^a list of 2 values, of which number 0 is a str of 3 characters; expected"),
    ([1.0, [10**800]], r"^a list of 2 values, of which number 1 is a list of 1 values; expected"),
    ([1.0, np.ones(3)], r"of which number 1 is a ndarray of shape \(3,\); expected"),
    ([1j, 2.0], r"of which number 0 is a complex; expected"),
    ([1.0, Odd()], r"of which number 1 is an Odd; expected"),
    (Long(), r"^a L+ \[\.\.\. \d+ characters \.\.\.\] L+; expected"),
    (Judge, r"^a type; expected"),
]


@pytest.mark.parametrize(("answer", "words"), BAD, ids=lambda value: str(type(value).__name__))
def test_a_wrong_answer_is_described_in_words_of_bounded_length(answer: Any, words: str) -> None:
    with pytest.raises(WrongAnswer, match=words) as caught:
        numbers(answer)
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


class Given:
    value: Any = None


def given(completions: list[str], **columns: Any) -> Any:
    return Given.value


async def given_late(completions: list[str], **columns: Any) -> Any:
    await asyncio.sleep(0)
    return Given.value


@pytest.mark.parametrize("name", ["given", "given_late"])
@pytest.mark.parametrize("answer", [one for one, _ in BAD if not hasattr(one, "__next__")], ids=describe)
def test_a_wrong_answer_fails_the_samples_and_never_pays_zero(name: str, answer: Any) -> None:
    Given.value = answer
    result, failures = scored(name)
    assert failures == {f"{name}_not_numbers": 4} and result.column("reward").null_count == 4


@pytest.mark.parametrize(
    ("answer", "words"),
    [*((one, words.lstrip("^")) for one, words in BAD), ([1.0] * 3, "3 values for 2 completions"), ([10**800] * 2, "an int beyond")],
    ids=lambda value: describe(value) if not isinstance(value, str) else "",
)  # fmt: skip
def test_preflight_says_it_in_one_short_line(answer: Any, words: str) -> None:
    Given.value = answer
    for name in ("given", "given_late"):
        if hasattr(answer, "__next__"):
            continue  # of which only the first call gets anything
        run = settings(rewards=[reward(name)])
        with pytest.raises(
            ConfigError, match=rf"^rewards\.{name}\.source={__name__}:{name}: returned .*{words}"
        ) as caught:
            preflight.check_rewards(run, prompts([0, 1]))
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("name", "words"), [("raises", r"raised LookupError \(x+ \[\.\.\.")])
def test_preflight_bounds_what_a_function_raises(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        preflight.check_rewards(settings(rewards=[reward(name)]), prompts([0, 1]))
    assert len(str(caught.value)) < 600


def test_preflight_does_not_wait_for_ever() -> None:
    run = settings(rewards=[reward("never")], deadlines={"score_seconds": 0.2})
    with pytest.raises(ConfigError, match=r"had not ended after 0\.2 s on a sample; expected an answer within dead"):
        preflight.check_rewards(run, prompts([0, 1]))


def test_preflight_takes_what_the_scorer_takes() -> None:
    run = settings(rewards=[reward(name) for name in ("plain", "meets_slow", "slow", "judge")])
    preflight.check_rewards(run, prompts([0, 1]))
    assert EVENTS[-1] == "slow ends"


def test_late_is_an_outcome_of_its_own(loop: EventLoop) -> None:
    """A TimeoutError that a function raises is the function's."""

    async def own(**columns: Any) -> list[float]:
        raise TimeoutError

    result = Calls({"own": own, "never": functools.partial(never, completions=[])}, dict, loop, 0.2).finish()
    assert isinstance(result["never"], Late) and isinstance(result["own"], TimeoutError)
    assert [scorers.values_or_reason(result[name]) for name in ("own", "never")] == ["TimeoutError", "timeout"]


# ---- the columns they get


def test_columns_arrive_as_they_are(tmp_path: Any) -> None:
    """NaN and bytes too where a function names them; null and text over HTTP."""
    import pyarrow.parquet as pq

    from keel.config.prompts import PromptSettings
    from keel.rollout import datasets, row_columns

    table = pa.table(
        {
            "prompt": ["a", "b"],
            "score": [math.nan, -math.inf],
            "image": [{"bytes": b"\x89PNG\xff"}, {"bytes": b""}],
            "raw": [b"1", b"2"],
            "prompts": ["not", "these"],
            "completions": [1, 2],
            "completion_ids": [[1], [2]],
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")

    def read(*names: str) -> dict[str, Any]:
        rows = datasets.read_rows(PromptSettings(source=str(tmp_path / "d.parquet")), 0, lambda: frozenset(names))
        batch = generated(prompts([0]))
        index = batch.schema.get_field_index("prompt_columns")
        further = pa.array([row.further for row in rows])
        return scorers.arguments(batch.set_column(index, batch.schema.field(index), further))

    given = read("image", "answer")
    assert math.isnan(given["score"][0]) and given["score"][1] == -math.inf
    assert given["image"] == [{"bytes": b"\x89PNG\xff"}, {"bytes": b""}] and "raw" not in given
    assert set(given) == {"score", "image", "prompts", "completions", "completion_ids"}
    assert given["completions"] == generated(prompts([0])).column("completion").to_pylist()  # not the data set's
    assert row_columns.for_http(given)["score"] == [None, None]
    assert row_columns.for_http(given)["image"] == [{"bytes": "iVBOR/8="}, {"bytes": ""}]
    assert "image" not in read()


def test_the_names_functions_ask_for() -> None:
    from keel.rollout.row_columns import asked_columns

    rewards = [reward("slow"), reward("judge"), RewardSettings(name="absent", source="no_such_module:f")]
    assert asked_columns(rewards) == {"completions", "answer", "columns"}
    assert asked_columns([RewardSettings(name="http", kind="http", source="http://x")]) == set()


def test_a_column_that_a_function_asks_for_and_nobody_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from keel.config.prompts import PromptSettings
    from keel.rollout import datasets

    module = types.ModuleType("rows_for_a_test")
    module.rows = lambda: [{"prompt": "a", "image": object()}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ConfigError, match="column image holds a object, which no reward function can be given"):
        datasets.read_rows(PromptSettings(source="python:rows_for_a_test:rows"), 0, lambda: frozenset(["image"]))


def on_topic(completions: list[str], relevance_nats: list[float], **columns: Any) -> list[float]:
    return list(relevance_nats)


def test_a_function_that_reads_what_is_not_measured_is_refused_before_the_start() -> None:
    run = settings(rewards=[reward("on_topic")])
    expected = (
        f"rewards.on_topic.source={__name__}:on_topic: reads relevance_nats, which this run does not compute;"
        " expected a monitor of kind reference with source: relevance"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        preflight.check_rewards(run, prompts([0, 1]))
    monitor = {"name": "tie", "kind": "reference", "source": "relevance", "role": "monitor"}
    preflight.check_rewards(settings(rewards=[reward("on_topic"), monitor]), prompts([0, 1]))
