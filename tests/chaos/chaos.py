"""`make chaos`: a real run, faults of every kind in an order that a seed decides, and an account of them.

    train -> fault -> recovered -> fault -> ... -> hurry to the end -> keel verify -> the same run without faults: equal?

Nothing may be lost or trained twice, and at max_staleness 0 the run that got through all of it must be the run that
nothing happened to, bit for bit.
"""

import argparse
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from arena import GROUPS_PER_STEP, Arena
from faults import ENDING, FAULTS
from keel import files, schema
from keel.analysis import verify
from keel.learner import tiny


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


def order(kinds: list[str], arguments: argparse.Namespace) -> list[str]:
    """Random order. What takes longest comes less often: a new driver in every eighth round, a hang in every third."""
    choices = random.Random(arguments.seed)
    chosen: list[str] = []
    for turn in itertools.count():
        rare = (ENDING if turn % 8 else set()) | (
            {kind for kind in kinds if kind.endswith("stopped")} if turn % 3 else set()
        )
        some = [kind for kind in kinds if kind not in rare] or kinds
        chosen += choices.sample(some, len(some))
        if len(chosen) >= arguments.faults:
            return chosen[: arguments.faults]
    raise AssertionError("unreachable")


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


def run(folder: Path, seed: int, kinds: list[str], staleness: int, steps: int, console: Console) -> Account:
    """One run through the faults to its end, then its files' own evidence."""
    account = Account(seed, staleness, steps)
    started = time.monotonic()
    arena = Arena(folder, tiny.write(folder / "tiny"), steps, staleness, pace_seconds=1.5)
    try:
        mistreat(arena, kinds, random.Random(seed), console, account)
        arena.hurry()
        while arena.running():
            time.sleep(0.5)
        assert arena.process is not None and arena.process.returncode == 0, arena.tail()
        account.seconds = round(time.monotonic() - started, 1)
        judge(arena, account)
    finally:
        arena.kill_all()
    return account


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system there; False where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def judge(arena: Arena, account: Account) -> None:
    """Fill in what the files say: the ledger, `keel verify`, the run without faults."""
    lines = files.read_json_lines(arena.run / "rollouts" / "MANIFEST.jsonl")
    trained = [ticket for line in lines for ticket in line["tickets"]]
    dropped = {ticket for line in lines for tickets in line["dropped"].values() for ticket in tickets}
    account.trained_twice = len(trained) - len(set(trained))
    account.lost = len(set(range(trained[-1] + 1)) - set(trained) - dropped)
    account.findings = [str(finding) for finding in verify.check(arena.run).findings]
    for role in ("generator", "reference", "scorer"):
        first = arena.events(0.0, "worker_started", role=role)[0]
        account.cold_start_seconds[role] = first["seconds"]
    account.cold_start_seconds["learner"] = arena.events(0.0, "running")[0]["seconds"]
    other = arena.folder / "calm"
    command = [sys.executable, "-m", "keel", "train", str(arena.config), f"run.directory={other}"]
    subprocess.run(command, check=True, env=arena.variables(), capture_output=True)
    if account.staleness == 0:
        account.differences = [str(difference) for difference in verify.compare(arena.run, other)]
    else:
        account.differences = same_tickets(arena.run, other)


def same_tickets(one: Path, other: Path) -> list[str]:
    """With late samples the rows differ; steps, tickets, prompts and counts must not."""
    differences = []
    for name in sorted(path.name for path in (other / "rollouts").glob("step-*.arrow")):
        mine, theirs = (
            schema.from_bytes((run / "rollouts" / name).read_bytes()).select(["ticket", "sample", "prompt_id", "seed"])
            for run in (one, other)
        )
        if not mine.equals(theirs):
            differences.append(name)
    return differences


def show(account: Account, console: Console) -> None:
    by_kind: dict[str, list[Record]] = defaultdict(list)
    for record in account.records:
        by_kind[record.kind].append(record)
    table = Table("fault", "times", "median s", "worst s", "groups made again")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, records in sorted(by_kind.items()):
        seconds = [record.seconds for record in records]
        again = sum(record.regenerated_groups for record in records)
        numbers = f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}", str(again)
        table.add_row(kind, str(len(records)), *numbers)
    console.print(table)
    console.print(
        f"{len(account.records)} faults, all recovered from; {account.steps} steps in {account.seconds:.0f} s;"
        f" tickets lost: {account.lost}, trained twice: {account.trained_twice};"
        f" keel verify: {len(account.findings)} findings; differences from the run without faults:"
        f" {len(account.differences)}",
        soft_wrap=True,
    )
    for role, kind in (("generator", "generator killed"), ("learner", "learner rank killed")):
        seconds = [record.seconds for record in by_kind[kind]]
        cold = account.cold_start_seconds[role]
        if seconds:
            console.print(
                f"{kind}: served again after {statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (worst);"
                f" its cold start took {cold:.1f} s: {statistics.median(seconds) / cold:.2f} of it"
            )
    for line in [*account.findings, *account.differences][:20]:
        console.print(line, markup=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=list(FAULTS), default=list(FAULTS), metavar="KIND")
    parser.add_argument("--output", type=Path, help="write the account as JSON")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="keel-chaos-") as name, small_disk(Path(name)) as small:
        if not small:
            console.print("no file system can be mounted here: the kind 'disk full' is left out")
        kinds = order([kind for kind in arguments.kinds if small or kind != "disk full"], arguments)
        steps = 40 + 20 * len(kinds)
        account = run(Path(name), arguments.seed, kinds, arguments.staleness, steps, console)
    show(account, console)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(asdict(account), indent=1) + "\n")
    sys.exit(bool(account.findings or account.differences or account.lost or account.trained_twice))


if __name__ == "__main__":
    main()
