"""The rule reward of chaos runs: takes as long as a file says, so that a run lasts while faults are injected."""

import os
import time
from pathlib import Path

PACE = "KEEL_CHAOS_PACE"
"""Environment variable: path of a file with the seconds a call takes; no file: none."""


def paced(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Share of a completion's tokens with an id below 100."""
    file = Path(os.environ.get(PACE, ""))
    if file.is_file():
        time.sleep(float(file.read_text()))
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]
