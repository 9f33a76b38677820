"""Calls of the user's reward functions, and what they return as numbers.

TRL's convention: `function(prompts, completions, completion_ids, **columns)`, a plain function or an async one. All
async functions of a batch are awaited together, while the plain ones run; all of them have one deadline.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

from keel.errors import KeelError
from keel.text import printable

Outcome = list[float | None] | Exception | SystemExit
"""Numbers of one function, or what it raised: `WrongAnswer` where it returned something else."""

LATE = "timeout"
"""The reason of samples whose async function did not end in time."""
_PROBE_SECONDS = 1.0
_NAME_CHARACTERS = 60
_SIGNATURE = "expected a list of one number or None for each"
_log = logging.getLogger("keel.rewards")


class WrongAnswer(KeelError, ValueError):
    """A function returned no numbers; the message says in words what it returned, never the value."""


class Late(KeelError):
    """An async function did not end before the deadline."""


def describe(value: Any) -> str:
    """A value in words: its type and its length or shape, of bounded length whatever the value is."""
    if value is None:
        return "None"
    kind = printable(type(value).__name__, _NAME_CHARACTERS)
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{article} {kind} of shape {printable(str(tuple(shape)), _NAME_CHARACTERS)}"
    if isinstance(value, str | bytes | bytearray):
        return f"{article} {kind} of {len(value)} characters"
    with contextlib.suppress(Exception):  # a class of the user's may raise anything here
        unit = "entries" if isinstance(value, Mapping) else "values"
        return f"{article} {kind} of {len(value)} {unit}"
    return f"{article} {kind}"


def numbers(answer: Any, strict: bool = False) -> list[float | None]:
    """The numbers of a list, a tuple, or an array of numpy's or torch's.

    Raises WrongAnswer, in words, for anything else, and where strict for an int beyond any float: infinite otherwise.
    """
    values = answer if isinstance(answer, list | tuple) else None
    if values is None and not isinstance(answer, type) and callable(getattr(answer, "tolist", None)):
        values = answer.tolist()
    if not isinstance(values, list | tuple):
        raise WrongAnswer(f"{describe(answer)}; {_SIGNATURE} completion")
    return [_number(value, place, answer, strict) for place, value in enumerate(values)]


def _number(value: Any, place: int, answer: Any, strict: bool) -> float | None:
    scalar = value
    if not isinstance(value, Real | Decimal | type(None)) and callable(getattr(value, "item", None)):
        with contextlib.suppress(ValueError, RuntimeError, TypeError):  # more than one element
            scalar = value.item()  # an array without dimensions
    if scalar is None:
        return None
    inside = f"{describe(answer)}, of which number {place} is"
    if not isinstance(scalar, Real | Decimal):
        raise WrongAnswer(f"{inside} {describe(value)}; {_SIGNATURE} completion")
    number: Any = scalar
    try:
        return float(number)
    except (OverflowError, ValueError):  # ValueError: a signaling NaN of Decimal
        if strict:
            raise WrongAnswer(f"{inside} {describe(value)} beyond any float; {_SIGNATURE} completion") from None
        return (math.inf if number > 0 else -math.inf) if isinstance(number, int) else math.nan


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call makes a coroutine: an async function, a partial of one, or an object with an async call."""
    while isinstance(function, functools.partial):
        function = function.func
    call = None if isinstance(function, type) else getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


class EventLoop:
    """An event loop in a thread of its own, for all calls of a process: clients that functions keep belong to it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, awaitable: Awaitable[Any]) -> "concurrent.futures.Future[Any]":
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="keel-rewards", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(_awaited(awaitable), self._loop)

    def give_up(self, futures: Sequence["concurrent.futures.Future[Any]"]) -> None:
        """Cancel what did not end; a loop that a function blocks is left to itself, and the next call has a new one."""
        for future in futures:
            future.cancel()
        turns = threading.Event()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(turns.set)
            if not turns.wait(_PROBE_SECONDS):
                self._loop = self._thread = None

    def close(self) -> None:
        """End the thread."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_PROBE_SECONDS)
            if not self._thread.is_alive() and not self._loop.is_running():
                self._loop.close()
        self._loop = self._thread = None


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except SystemExit as error:  # raised, it would end the loop for all functions
        return error


class Calls:
    """Calls of several functions on one batch: async ones begin at once, `finish` runs the others and waits for all."""

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        arguments: Callable[[], dict[str, Any]],
        loop: EventLoop,
        seconds: float,
        strict: bool = False,
    ) -> None:
        """Call `arguments` for every function, so that none sees another's changes. `strict` as in `numbers`."""
        self._functions, self._arguments, self._loop = functions, arguments, loop
        self._strict = strict
        self._ends = time.monotonic() + seconds
        self._answers: dict[str, Any] = {}
        self._begin([name for name, function in functions.items() if is_async(function)])

    def _begin(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                answer = self._functions[name](**self._arguments())
                self._answers[name] = self._loop.submit(answer) if inspect.isawaitable(answer) else answer
            except (Exception, SystemExit) as error:  # the user's code may raise anything; its samples fail
                self._answers[name] = error

    def finish(self) -> dict[str, Outcome]:
        """Numbers of every function, or why it has none."""
        self._begin([name for name in self._functions if name not in self._answers])
        waiting = [answer for answer in self._answers.values() if isinstance(answer, concurrent.futures.Future)]
        late = concurrent.futures.wait(waiting, max(0.0, self._ends - time.monotonic())).not_done
        if late:
            self._loop.give_up(list(late))
        return {name: _outcome(name, answer, late, self._strict) for name, answer in self._answers.items()}


def _outcome(name: str, answer: Any, late: "set[concurrent.futures.Future[Any]]", strict: bool) -> Outcome:
    try:
        if isinstance(answer, concurrent.futures.Future):
            if answer in late:
                return Late()
            answer = answer.result()
        return answer if isinstance(answer, Exception | SystemExit) else numbers(answer, strict)
    except WrongAnswer as error:
        _log.warning("reward %s returned %s", name, error)
        return error
    except (Exception, SystemExit) as error:  # raised by the user's code
        return error
