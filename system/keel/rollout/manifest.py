"""The manifest of a run: which tickets every step trained, which were given up on the way to them, and why.

rollouts/MANIFEST.jsonl has one line a step:

    {"step": 2, "file": "step-000002.arrow", "rows": 8, "xxh3_128": "...",
     "tickets": [4, 5, 7, 8], "dropped": {"too_few_samples": [6]}}

A dropped ticket belongs to the first step whose last ticket is greater. So a line follows from tickets and what became
of them, never from when that was known, and trained and dropped together are 0, 1, 2, ... without a gap.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from keel import files, reads, schema

Line = dict[str, Any]
FIELDS: Mapping[str, type] = {"step": int, "file": str, "rows": int, "xxh3_128": str, "tickets": list, "dropped": dict}
_FILE = re.compile(r"step-(\d+)\.arrow")


def path_of(run_directory: Path) -> Path:
    return run_directory / "rollouts" / "MANIFEST.jsonl"


def write_step(run_directory: Path, step: int, batch: pa.RecordBatch, dropped: Mapping[int, str]) -> int:
    """The rollout file of a step, then its line; bytes of the file. `dropped`: ticket -> reason."""
    content = schema.to_bytes(batch)
    file = run_directory / "rollouts" / f"step-{step:06d}.arrow"
    files.write(file, content)
    reasons = sorted(set(dropped.values()))
    line = {
        "step": step,
        "file": file.name,
        "rows": batch.num_rows,
        "xxh3_128": files.digest_of(content),
        "tickets": list(dict.fromkeys(batch.column("ticket").to_pylist())),
        "dropped": {why: sorted(ticket for ticket, reason in dropped.items() if reason == why) for why in reasons},
    }
    files.append_json(path_of(run_directory), line)
    return content.size


def undo(run_directory: Path, last_step: int) -> None:
    """Move the rollout files of later steps aside: those steps are made again."""
    for path in reads.entries(run_directory / "rollouts"):
        if (name := _FILE.fullmatch(path.name)) and int(name[1]) > last_step:
            files.move_aside(run_directory, path)


def cut_back(run_directory: Path, last_step: int) -> list[str]:
    """Keep the lines of steps up to `last_step`, also the shorter ones of earlier versions; names of damaged lines."""
    return files.keep_steps(path_of(run_directory), last_step, run_directory / files.ASIDE / "rollouts")
