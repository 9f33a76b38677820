"""Reward functions of these tests, importable by the actors through PYTHONPATH."""

import math
import os
import time
from pathlib import Path

import ray

PACE = "KEEL_TEST_PACE"


def not_a_number(completions: list[str], **columns: object) -> list[float]:
    return [math.nan] * len(completions)


def none_for_short(completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float | None]:
    """The length, and no answer for completions of which the last token id is odd."""
    return [None if ids[-1] % 2 else float(len(ids)) for ids in completion_ids]


def share_of_low_ids(completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Share of a completion's tokens with an id below 100: something a random model can learn in a few steps."""
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


def mostly_even(completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    """1 when the last token's id is even: two samples of a prompt often agree."""
    return [float(ids[-1] % 2 == 0) for ids in completion_ids]


def low_ids_or_none(completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float | None]:
    """The share of low ids, and no answer for completions of which the last token id is odd: a judge that fails."""
    shares = share_of_low_ids(completions, completion_ids)
    return [None if ids[-1] % 2 else share for ids, share in zip(completion_ids, shares, strict=True)]


def paced(completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    """The share of low ids, after the seconds that the file named by PACE holds, or when it is gone: a run that lasts
    while something is done to it. Not in the check before a run, which has no Ray yet."""
    began = time.monotonic()
    while (left := began + _pace_seconds() - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))
    return share_of_low_ids(completions, completion_ids)


def _pace_seconds() -> float:
    if not ray.is_initialized():
        return 0.0
    try:
        return float(Path(os.environ[PACE]).read_text() or "inf")  # empty while it is written
    except FileNotFoundError:
        return 0.0
