"""The faults: each does its harm to an arena, waits until the run has got over it, and tells how long that took.

A fault returns (what was hit, seconds until it was made good). "Made good" is read from the run's own files: a worker
serves again, a learner group runs again, a step is recorded. `assert` is what a fault demands of the run beyond that.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from arena import RECOVERY_SECONDS, Arena
from keel import checkpoint
from reward_server import WAYS

Outcome = tuple[str, float]
Fault = Callable[[Arena, random.Random], Outcome]
KILL, STOP = psutil.Process.kill, psutil.Process.suspend
PAUSE_SECONDS = 3


def struck(role: str, blow: Callable[[psutil.Process], None], over: Callable[[Arena, str, float], float]) -> Fault:
    """A process of a role is killed (SIGKILL) or stopped for ever (SIGSTOP: its deadline finds it out)."""

    def fault(arena: Arena, choices: random.Random) -> Outcome:
        victim = choices.choice(arena.victims(role))
        hit = time.time()
        blow(victim)
        return f"pid {victim.pid}", over(arena, role, hit)

    return fault


def serves_again(arena: Arena, role: str, hit: float) -> float:
    """Seconds until another generator, reference or scorer serves."""
    started = arena.wait(lambda: arena.events(hit, "worker_started", role=role), f"another {role}")
    assert arena.events(hit, "worker_lost", role=role)
    arena.wait_for_step(started[0]["time"])
    return started[0]["time"] - hit


def runs_again(arena: Arena, role: str, hit: float) -> float:
    """Seconds until learner group and buffer, both built again from the newest commit, run."""
    running = arena.wait(lambda: arena.events(hit, "running"), "a new learner group")
    assert arena.events(hit, "rebuild")
    arena.wait_for_step(running[0]["time"])
    return running[0]["time"] - hit


def killed_control(arena: Arena, choices: random.Random) -> Outcome:
    """kill -9 of the control actor: no call waits for it, and another one is started."""
    victim = choices.choice(arena.victims("control"))
    hit = time.time()
    victim.kill()
    arena.wait(lambda: [item for item in arena.victims("control") if item.pid != victim.pid], "another control actor")
    again = time.time()
    arena.wait_for_step(again)
    return f"pid {victim.pid}", again - hit


def paused(arena: Arena, choices: random.Random) -> Outcome:
    """SIGSTOP, and SIGCONT well before the deadline: only slower, nothing is replaced."""
    role = choices.choice(["generator", "reference", "scorer", "learner", "buffer"])
    victim = choices.choice(arena.victims(role))
    hit = time.time()
    victim.suspend()
    time.sleep(PAUSE_SECONDS)
    victim.resume()
    resumed = time.time()
    arena.wait_for_step(resumed)
    assert not arena.events(hit, "worker_lost", "rebuild"), "a short pause was taken for a death"
    return f"{role} pid {victim.pid}", arena.last_step()["time"] - resumed


def ended_driver(*signals: signal.Signals) -> Fault:
    """The driver gets signals; `keel resume` continues."""

    def fault(arena: Arena, choices: random.Random) -> Outcome:
        arena.end(*signals)
        return _resumed(arena, "driver")

    return fault


def _resumed(arena: Arena, victim: str) -> Outcome:
    hit = time.time()
    arena.start()
    running = arena.wait(lambda: arena.events(hit, "running"), "the resumed run")
    arena.wait_for_step(running[0]["time"])
    return victim, running[0]["time"] - hit


def damaged_checkpoint(arena: Arena, choices: random.Random) -> Outcome:
    """A flipped bit, or a file cut short, in the newest checkpoint: the one before it is used, and that is said."""
    arena.wait(lambda: len(checkpoint.committed(arena.run)) >= 2, "two checkpoints")
    arena.end(signal.SIGKILL)
    newest = checkpoint.committed(arena.run)[-1]
    path = choices.choice([item for item in sorted(newest.rglob("*")) if item.is_file() and item.stat().st_size])
    what = damage(path, choices)
    hit = time.time()
    outcome = _resumed(arena, f"{path.relative_to(arena.run)} {what}")
    assert arena.events(hit, "checkpoint_damaged"), "a damaged checkpoint was not noticed"
    return outcome


def damaged_segment(arena: Arena, choices: random.Random) -> Outcome:
    """A flipped bit, or a file cut short, in an accepted batch: its tickets are generated again."""
    for _ in range(20):  # there is none between a commit and the next accepted batch
        arena.end(signal.SIGKILL)
        if segments := sorted((arena.run / "buffer").glob("segment.*.arrow")):
            break
        _resumed(arena, "")
    path = choices.choice(segments)
    what = damage(path, choices)
    hit = time.time()
    outcome = _resumed(arena, f"{path.relative_to(arena.run)} {what}")
    assert any(path.name in event["damaged"] for event in arena.events(hit, "restored")), "damage was not noticed"
    return outcome


def torn_lines(arena: Arena, choices: random.Random) -> Outcome:
    """The last line of a JSON-lines file is cut in the middle, as by a power failure."""
    arena.end(signal.SIGKILL)
    path = choices.choice(
        [arena.run / "metrics.jsonl", arena.run / "events.jsonl", arena.run / "rollouts/MANIFEST.jsonl"]
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - choices.randrange(2, 20)])
    return _resumed(arena, f"{path.relative_to(arena.run)} cut short")


def damage(path: Path, choices: random.Random) -> str:
    """Flip one bit, or cut the file."""
    content = bytearray(path.read_bytes())
    where = choices.randrange(len(content))
    if choices.random() < 0.3:
        path.write_bytes(content[:where])
        return f"cut to {where} bytes"
    content[where] ^= 1 << choices.randrange(8)
    path.write_bytes(content)
    return f"bit flipped at {where}"


def failing_server(way: str) -> Fault:
    """The reward server fails the next two requests: the retries of the reward cover it."""

    def fault(arena: Arena, choices: random.Random) -> Outcome:
        hit = time.time()
        arena.server.fail(way, requests=2)
        arena.wait(lambda: not arena.server.failing, "the server's failures")
        over = time.time()
        arena.wait_for_step(over)
        return "reward server", arena.last_step()["time"] - hit

    return fault


def full_disk(arena: Arena, choices: random.Random) -> Outcome:
    """No space left: the run ends with an error that says so, and resumes when there is room."""
    filler = arena.folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass  # full, as it should be
    deadline = time.monotonic() + RECOVERY_SECONDS
    while arena.running():
        assert time.monotonic() < deadline, "a run on a full disk went on"
        time.sleep(0.1)
    filler.unlink()
    assert "no space left" in arena.tail(), arena.tail()
    return _resumed(arena, str(arena.folder))


def failing_calls(arena: Arena, choices: random.Random) -> Outcome:
    """Ray's own fault injection: for a while requests and replies between its processes fail or come late."""
    arena.end(signal.SIGKILL)
    arena.environment = {
        "RAY_testing_rpc_failure": json.dumps(
            {"*": {"num_failures": 60, "req_failure_prob": 4, "resp_failure_prob": 4}}
        ),
        "RAY_testing_rpc_failure_avoid_intra_node_failures": "0",
        "RAY_testing_asio_delay_us": "CoreWorkerService.grpc_server.PushTask=0:20000",
    }
    outcome = _resumed(arena, "calls between Ray's processes")
    arena.wait(lambda: arena.last_step()["step"] % 10 == 9, "ten steps")
    arena.end(signal.SIGKILL)
    arena.environment = {}
    _resumed(arena, "")
    return outcome


FAULTS: dict[str, Fault] = {
    "generator killed": struck("generator", KILL, serves_again),
    "reference killed": struck("reference", KILL, serves_again),
    "scorer killed": struck("scorer", KILL, serves_again),
    "learner rank killed": struck("learner", KILL, runs_again),
    "buffer killed": struck("buffer", KILL, runs_again),
    "control actor killed": killed_control,
    "generator stopped": struck("generator", STOP, serves_again),
    "scorer stopped": struck("scorer", STOP, serves_again),
    "learner rank stopped": struck("learner", STOP, runs_again),
    "worker paused": paused,
    "calls fail": failing_calls,
    "driver killed": ended_driver(signal.SIGKILL),
    "driver terminated": ended_driver(signal.SIGTERM),
    "driver interrupted twice": ended_driver(signal.SIGINT, signal.SIGINT),
    "checkpoint damaged": damaged_checkpoint,
    "accepted batch damaged": damaged_segment,
    "line cut short": torn_lines,
    "disk full": full_disk,
    **{way.replace("_", " "): failing_server(way) for way in WAYS},
}
ENDING = {kind for kind in FAULTS if kind.startswith("driver")} | {
    "checkpoint damaged",
    "accepted batch damaged",
    "line cut short",
    "disk full",
    "calls fail",
}
"""Kinds that end the driver, or are found only by one that starts."""
