"""`make chaos`: a real run, faults of every kind in an order that a seed decides, and an account of them.

    train -> fault -> recovered -> fault -> ... -> hurry to the end -> keel verify -> the same run without faults: equal?

Nothing may be lost or trained twice, and at max_staleness 0 the run that got through all of it must be the run that
nothing happened to, bit for bit.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arena import GROUPS_PER_STEP, Arena
from faults import FAULTS
from rich.console import Console
from rich.table import Table

from keel import tiny, verify


@dataclass
class Record:
    """One fault."""

    kind: str
    victim: str
    seconds: float
    """Until what was lost served again."""
    regenerated_groups: int
    """Groups of rollouts that had been started, or accepted after the last commit, and were made again."""


@dataclass
class Account:
    """What a chaos run did and how it ended."""

    seed: int
    staleness: int
    steps: int
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    lost: int = 0
    """Tickets neither trained nor dropped with a reason."""
    trained_twice: int = 0
    findings: list[str] = field(default_factory=list)
    """What `keel verify` found."""
    differences: list[str] = field(default_factory=list)
    """From the run without faults."""
    cold_start_seconds: dict[str, float] = field(default_factory=dict)


def order(kinds: list[str], faults: int, choices: random.Random) -> list[str]:
    """Every kind as often as the next, in random order."""
    rounds = [choices.sample(kinds, len(kinds)) for _ in range(-(-faults // len(kinds)))]
    return [kind for each in rounds for kind in each][:faults]


def mistreat(arena: Arena, kinds: list[str], choices: random.Random, console: Console, account: Account) -> None:
    """Start the run and inject one fault after the other."""
    arena.start()
    arena.wait(lambda: arena.last_step()["step"] >= 2, "two steps")
    for number, kind in enumerate(kinds, 1):
        time.sleep(choices.uniform(0.0, 1.0))
        before, hit = arena.last_step()["step"], time.time()
        victim, seconds = FAULTS[kind](arena, choices)
        account.records.append(Record(kind, victim, round(seconds, 2), regenerated(arena, before, hit)))
        console.print(f"{number}/{len(kinds)} {kind}: {victim}, {seconds:.1f} s", highlight=False, markup=False)


def regenerated(arena: Arena, before: int, hit: float) -> int:
    """Groups made again since a fault: those of steps that were rolled back, and one a retried batch."""
    begun = [event["step"] for event in arena.events(hit, "running")]
    kept = sum(event["groups"] for event in arena.events(hit, "restored"))
    rolled_back = sum(max(0, before - step) * GROUPS_PER_STEP for step in begun)
    return max(0, rolled_back - kept) + len(arena.events(hit, "retry"))


def calm(folder: Path, arena: Arena) -> Path:
    """The same run without faults."""
    arena_run = folder / "calm"
    command = [sys.executable, "-m", "keel", "train", str(arena.config), f"run.directory={arena_run}"]
    arena.environment = {}
    subprocess.run(command, check=True, env=arena.variables(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return arena_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=len(FAULTS))
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="default: enough for the faults")
    parser.add_argument("--kinds", nargs="*", choices=list(FAULTS), default=list(FAULTS), metavar="KIND")
    parser.add_argument("--output", type=Path, help="write the account as JSON")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="keel-chaos-") as name:
        account = run(Path(name), arguments, console)
    show(account, console)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(asdict(account), indent=1) + "\n")
    sys.exit(bool(account.findings or account.differences or account.lost or account.trained_twice))
