"""The commits of a run as its other files record them: events, metrics and the manifest of rollouts.

A missing checkpoints/ (a broken link, a disk that is not mounted, a folder that was moved) looks like that of a run
which has not committed yet. These files tell the two apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from keel import files, reads

_KNOWN = ("checkpoint", "resume", "checkpoint_damaged", "roll_back")
"""Events whose step has a commit; the last three give up newer ones."""


def newest_known(run_directory: Path) -> tuple[int, str]:
    """Step of the newest recorded commit, and the file that records it; 0 without one."""
    known = {
        "events.jsonl": _by_events(run_directory / "events.jsonl"),
        "metrics.jsonl": _by_metrics(run_directory / "metrics.jsonl"),
        "rollouts/MANIFEST.jsonl": _by_manifest(run_directory),
    }
    file = max(known, key=lambda name: known[name])
    return known[file], file


def _by_events(path: Path) -> int:
    """The last commit that was made or resumed from; resuming from an older one gives up the newer ones."""
    lines, _ = files.sound_lines(path, {"event": str, "step": int})
    steps = [line["step"] for line in lines if line["event"] in _KNOWN]
    return steps[-1] if steps else 0


def _by_metrics(path: Path) -> int:
    """The step before the first line that counts the last commit."""
    lines, _ = files.sound_lines(path, {"step": int})
    counts = [(line["step"], _count(line)) for line in lines]
    before = [0.0, *(count for _, count in counts)]
    risen = [step for (step, count), earlier in zip(counts, before, strict=False) if count > earlier]
    return risen[-1] - 1 if risen else 0


def _count(line: Mapping[str, Any]) -> float:
    count = line.get("checkpoints_total", 0.0)
    return count if isinstance(count, int | float) else 0.0


def _by_manifest(run_directory: Path) -> int:
    """The last commit that was due when the newest rows were taken: each step waits for the commit before it."""
    lines, _ = files.sound_lines(run_directory / "rollouts" / "MANIFEST.jsonl", {"step": int})
    if not lines or not reads.is_there(run_directory / "config.yaml"):
        return 0
    try:
        settings = yaml.safe_load((run_directory / "config.yaml").read_text(encoding="utf8"))
        every = settings.get("checkpoint", {}).get("every_steps", 0)
    except (OSError, yaml.YAMLError, ValueError, RecursionError, AttributeError):  # the next reader names the damage
        return 0
    return (lines[-1]["step"] - 1) // every * every if isinstance(every, int) and every > 0 else 0
