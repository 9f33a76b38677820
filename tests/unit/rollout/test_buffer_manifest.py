"""What the buffer's files say of every ticket, what it says of damaged ones, resizing, and the tickets it waits for."""

import json
from pathlib import Path
from typing import Any

import pytest

from buffers import admit_all, buffer_in, soon, tickets_of, uniform
from keel import files, schema
from keel.rollout import manifest, segments
from rollouts import rollouts


def lines_of(directory: Path) -> list[dict[str, Any]]:
    """Tickets and drops of every manifest line."""
    text = (directory / "rollouts" / "MANIFEST.jsonl").read_text()
    return [{name: json.loads(line)[name] for name in ("step", "tickets", "dropped")} for line in text.splitlines()]


async def test_a_line_names_every_ticket_up_to_the_steps_last_one_with_its_reason(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=3, batch=1, staleness=1, refills=9)
    assert await admit_all(buffer) == [[0], [1], [2], [3], [4], [5]]
    await buffer.drop([5], "worker_lost")  # known first, yet it belongs to the step whose last ticket is greater
    await buffer.add([0], rollouts([0], failed=[(0, 1)]))
    await buffer.drop([1], "worker_lost")
    await buffer.add([2], uniform([2]))
    await buffer.add([3], rollouts([3]))
    await buffer.add([4], rollouts([4]))
    assert await admit_all(buffer) == [[6], [7], [8], [9]]  # for 0, 1, 2 and 5
    for ticket in (9, 8, 7, 6):
        await buffer.add([ticket], rollouts([ticket]))
    _, first = await soon(buffer.take(3))
    await buffer.advance(1)
    _, second = await soon(buffer.take(3))
    assert lines_of(tmp_path) == [
        {
            "step": 1,
            "tickets": [3, 4, 6],
            "dropped": {"too_few_samples": [0], "uniform_rewards": [2], "worker_lost": [1, 5]},
        },
        {"step": 2, "tickets": [7, 8, 9], "dropped": {}},
    ]
    # counters go with the lines: what is accepted and waits is counted with the step that trains it
    assert first["counts"]["samples_accepted_total"] == {"": 6} == second["counts"]["samples_accepted_total"]
    assert first["counts"]["samples_failed_total"] == {"broken": 1}
    assert first["counts"]["groups_dropped_total"] == {
        "too_few_samples": 1,
        "uniform_rewards": 1,
        "worker_lost": 2,
    }


async def test_a_resumed_buffer_writes_the_lines_and_counts_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Staleness 1, killed in step 2 with drops on both sides of the checkpoint; ticket 3's reason is read from disk."""
    failing = {1, 3}

    async def work(buffer: Any, version: int) -> None:
        for tickets in await admit_all(buffer):
            failed = [(ticket, sample) for ticket in tickets if ticket in failing for sample in (0, 1)]
            await buffer.add(tickets, rollouts(tickets, version=version, failed=failed))

    async def steps(buffer: Any, first: int, last: int) -> list[Any]:
        counts = []
        for version in range(first, last + 1):
            await work(buffer, version - 1)
            await work(buffer, version - 1)  # what was dropped
            counts.append((await soon(buffer.take(2)))[1]["counts"])
            await buffer.advance(version)
        return counts

    whole = buffer_in(tmp_path / "whole", step=2, batch=2, staleness=1)
    counts = await steps(whole, 1, 3)
    killed = buffer_in(tmp_path / "killed", step=2, batch=2, staleness=1)
    assert await steps(killed, 1, 1) == counts[:1]
    state = await killed.state()
    await work(killed, 1)
    await soon(killed.take(2))
    resumed = buffer_in(tmp_path / "killed", step=2, batch=2, staleness=1, **state)
    assert await steps(resumed, 2, 3) == counts[1:]
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    assert [line["dropped"] for line in lines_of(tmp_path / "whole")] == [
        {"too_few_samples": [1]},
        {"too_few_samples": [3]},
        {},
    ]


# ---- damaged files


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rename(path: Path) -> None:
    path.rename(path.with_name("segment.unnamed.arrow"))


def named(path: Path, content: Any) -> None:
    """Other bytes under a name whose digest is right."""
    first = path.name.rsplit(".", 2)[0]
    path.unlink()
    path.with_name(f"{first}.{files.digest_of(content)}.arrow").write_bytes(content)


def not_arrow(path: Path) -> None:
    named(path, b"no Arrow file")


def no_metadata(path: Path) -> None:
    named(path, schema.to_bytes(schema.from_bytes(path.read_bytes()).replace_schema_metadata(None)))


def other_tickets(path: Path) -> None:
    batch = schema.from_bytes(path.read_bytes())
    named(path, schema.to_bytes(batch.replace_schema_metadata({**batch.schema.metadata, b"keel.tickets": b"[0, 7]"})))


DAMAGES = [flip, cut, empty, rename, not_arrow, no_metadata, other_tickets]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_a_damaged_segment_is_named_and_its_tickets_asked_for_again(tmp_path: Path, damage: Any) -> None:
    killed = buffer_in(tmp_path, step=6)
    for tickets in await admit_all(killed):
        await killed.add(tickets, rollouts(tickets, failed=[(5, 0)]))
    sound = {path.name for path in segments.paths(tmp_path)[1:]}
    damage(segments.paths(tmp_path)[0])
    (first,) = {path.name for path in segments.paths(tmp_path)} - sound
    again = buffer_in(tmp_path, step=6)
    assert await again.restored() == {"groups": 3, "damaged": [first]}  # 2, 3 and 4; 5 was dropped
    assert not (tmp_path / "buffer" / first).exists()
    assert await admit_all(again) == [[0, 1]]
    await again.add([0, 1], rollouts([0, 1]))
    assert await admit_all(again) == [[6]]


async def test_a_sound_start_finds_what_was_accepted(tmp_path: Path) -> None:
    killed = buffer_in(tmp_path)
    assert await killed.restored() == {"groups": 0, "damaged": []}
    tickets = await soon(killed.admit())
    await killed.add(tickets, rollouts(tickets))
    assert await buffer_in(tmp_path).restored() == {"groups": 2, "damaged": []}
    assert await buffer_in(tmp_path, version=1, taken=4, next_ticket=4).restored() == {"groups": 0, "damaged": []}


@pytest.mark.parametrize(
    ("end", "named"),
    [
        (b'{"step": 2, "fi', []),
        (b"\0\0\0\0", []),
        (b'{"stop": 2}\n', ["MANIFEST.jsonl line 2"]),
        (b'{"step": 2}\n', []),
        (b"\xff\0garbage\n", ["MANIFEST.jsonl line 2"]),
        (b"[1]\n\n", ["MANIFEST.jsonl line 2", "MANIFEST.jsonl line 3"]),
    ],
)
async def test_a_damaged_manifest_line_breaks_no_restart(tmp_path: Path, end: bytes, named: list[str]) -> None:
    buffer = buffer_in(tmp_path)
    for tickets in await admit_all(buffer):
        await buffer.add(tickets, rollouts(tickets))
    await soon(buffer.take(4))
    path = manifest.path_of(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + end)
    again = buffer_in(tmp_path, version=1, taken=4, next_ticket=4)
    assert (await again.restored())["damaged"] == named
    assert path.read_bytes() == whole


async def test_lines_of_an_earlier_version_outlive_a_restart(tmp_path: Path) -> None:
    old = '{"step": 1, "file": "step-000001.arrow", "rows": 8, "xxh3_128": "0"}\n'
    (tmp_path / "rollouts").mkdir()
    manifest.path_of(tmp_path).write_text(old)
    buffer_in(tmp_path, version=1, taken=4, next_ticket=4)
    assert manifest.path_of(tmp_path).read_text() == old


async def test_of_two_stored_batches_of_a_ticket_the_one_in_time_is_taken(tmp_path: Path) -> None:
    """A resumed run made ticket 2 again for a later step, and is killed before that checkpoint, too."""
    for version in (0, 1):
        batch = rollouts([2, 3], version=version)
        segments.write(tmp_path, segments.Segment([2, 3], batch, {2: {}, 3: {}}, {}))
    for version in (0, 1):
        buffer = buffer_in(tmp_path, step=2, version=version, taken=2 * version, next_ticket=2)
        assert await admit_all(buffer) == []
        rows, _ = await soon(buffer.take(2))
        assert {number for row in rows.column("weight_versions").to_pylist() for number in row} == {version}


async def test_a_batch_that_a_dying_buffer_stores_after_a_roll_back_is_moved_aside(tmp_path: Path) -> None:
    """Its ticket and its version would fit."""
    dying, late = buffer_in(tmp_path), buffer_in(tmp_path, roll_backs=1)
    for buffer in (dying, late):
        tickets = await soon(buffer.admit())
        await buffer.add(tickets, rollouts(tickets))
    assert sorted(segments.read(path).roll_backs for path in segments.paths(tmp_path)) == [0, 1]
    assert await buffer_in(tmp_path, roll_backs=1).restored() == {"groups": 2, "damaged": []}
    assert [segments.read(path).roll_backs for path in segments.paths(tmp_path)] == [1]
    (aside,) = (tmp_path / files.ASIDE / "buffer").iterdir()
    assert segments.read(aside).roll_backs == 0
    assert await buffer_in(tmp_path, roll_backs=2).restored() == {"groups": 0, "damaged": []}


async def test_a_dropped_ticket_is_asked_for_again_when_its_place_has_moved(tmp_path: Path) -> None:
    """Failed under version 0; a run that needs it for version 1's step draws other samples."""
    segment = segments.Segment([2, 3], rollouts([2]), {2: {}, 3: {}}, {3: "too_few_samples"})
    segments.write(tmp_path, segment)
    moved = buffer_in(tmp_path, step=2, version=1, taken=2, next_ticket=2)
    assert await admit_all(moved) == [[2, 3]]
    stayed = buffer_in(tmp_path, step=2, version=0, taken=0, next_ticket=2)
    assert await admit_all(stayed) == [[4]]


# ---- resizing and waiting


async def test_a_new_size_splits_what_opens_from_now_on(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=4, batch=2, staleness=1)
    assert await soon(buffer.admit()) == [0, 1]
    await buffer.resize(3)
    assert await admit_all(buffer) == [[2, 3], [4, 5], [6, 7]]  # open before
    await buffer.drop([0, 1], "worker_lost")
    for tickets in ([2, 3], [4, 5], [6, 7]):
        await buffer.add(tickets, rollouts(tickets))
    assert await admit_all(buffer) == [[8, 9]]
    await buffer.add([8, 9], rollouts([8, 9]))
    batch, _ = await soon(buffer.take(4))
    assert tickets_of(batch) == [2, 3, 4, 5]
    await buffer.advance(1)
    assert await admit_all(buffer) == [[10, 11, 12], [13]]


@pytest.mark.parametrize("size", [0, -1, 9])
async def test_sizes_that_never_fit_are_refused(tmp_path: Path, size: int) -> None:
    buffer = buffer_in(tmp_path, step=4, staleness=1)
    with pytest.raises(AssertionError, match=f"^{size}$"):
        await buffer.resize(size)
    assert buffer.window.groups_per_batch == 2
    await buffer.resize(8)
    assert buffer.window.groups_per_batch == 8


async def test_waiting_names_tickets_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("keel.rollout.buffer.time.monotonic", lambda: now)
    buffer = buffer_in(tmp_path, step=4, batch=1, staleness=1)
    assert await buffer.waiting() == "no ticket in flight; 0 of 4 groups ready and 0 behind them; 0 live, 8 open"
    for _ in range(6):
        await soon(buffer.admit())
        now += 10
    for ticket in (1, 4, 5):
        await buffer.add([ticket], rollouts([ticket]))
    now += 5
    assert await buffer.waiting() == (
        "tickets 0, 2-3 in flight for 65 s; 1 of 4 groups ready and 2 behind them; 6 live, 2 open"
    )
    await buffer.drop([0], "worker_lost")
    assert (await buffer.waiting()).startswith("tickets 2-3 in flight for 45 s; 2 of 4 groups ready and 1 behind")


async def test_rows_of_a_segment_are_those_that_were_accepted(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    tickets = await soon(buffer.admit())
    await buffer.add(tickets, rollouts(tickets, samples=3, failed=[(0, 0), (0, 1)]))
    (path,) = segments.paths(tmp_path)
    segment = segments.read(path)
    assert (segment.tickets, segment.dropped) == ([0, 1], {0: "too_few_samples"})
    assert segment.rows.to_pylist() == rollouts([1], samples=3).to_pylist()
    assert segment.rows.schema.metadata == rollouts([1]).schema.metadata
    assert segment.counts[0]["samples_failed_total"] == {"broken": 2}
