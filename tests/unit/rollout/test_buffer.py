"""The rollout buffer: admission, order, whole groups, what is on disk, and starting again from it."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from buffers import admit_all, blocked, buffer_in, soon, tickets_of, uniform
from keel import files, schema
from keel.rollout.buffer import RolloutBuffer
from rollouts import rollouts


def segments(directory: Path) -> list[str]:
    return sorted(path.name.rsplit(".", 2)[0] for path in (directory / "buffer").iterdir())


# ---- admission


@pytest.mark.parametrize(("staleness", "expected"), [(0, 4), (1, 8), (2, 12)])
async def test_admission_ends_at_the_staleness_bound_and_advance_opens_a_step(
    tmp_path: Path, staleness: int, expected: int
) -> None:
    """taken + live < (version + 1 + max_staleness) * groups_per_step."""
    buffer = buffer_in(tmp_path, staleness=staleness)
    batches = await admit_all(buffer)
    assert [ticket for batch in batches for ticket in batch] == list(range(expected))
    for batch in batches:
        await buffer.add(batch, rollouts(batch))
    assert await admit_all(buffer) == []  # rows that arrive open nothing
    await soon(buffer.take(4))
    assert await admit_all(buffer) == []  # nor does taking them
    await buffer.advance(1)
    assert await admit_all(buffer) == [[expected, expected + 1], [expected + 2, expected + 3]]


async def test_a_step_is_split_into_batches_and_a_rest(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=5, batch=2)
    assert await admit_all(buffer) == [[0, 1], [2, 3], [4]]


async def test_take_waits_for_the_head_and_returns_admission_order(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    first, second = await admit_all(buffer)
    await buffer.add(second, rollouts(second))
    taking = asyncio.create_task(buffer.take(4))
    assert await blocked(taking)
    await buffer.add(first, rollouts([1, 0]))  # rows in any order
    batch, numbers = await soon(taking)
    assert tickets_of(batch) == [0, 1, 2, 3]
    assert batch.to_pylist() == rollouts([0, 1, 2, 3]).to_pylist()
    assert numbers["staleness_max_versions"] == 0 and numbers["buffer_groups"] == 0


async def test_staleness_and_waiting_groups_are_counted(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=1, batch=1, staleness=1)
    assert await admit_all(buffer) == [[0], [1]]
    await buffer.add([0], rollouts([0]))
    await buffer.add([1], rollouts([1]))
    _, numbers = await soon(buffer.take(1))
    assert numbers["buffer_groups"] == 1
    assert numbers["buffer_bytes"] > 0 and numbers["buffer_age_seconds"] >= 0
    await buffer.advance(1)
    _, numbers = await soon(buffer.take(1))  # made by version 0, trained by the step that starts from version 1
    assert (numbers["staleness_mean_versions"], numbers["staleness_max_versions"]) == (1, 1)
    assert (numbers["buffer_groups"], numbers["buffer_bytes"]) == (0, 0)


async def test_rows_older_than_the_bound_are_never_handed_out(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=1, batch=1, version=3, taken=3, next_ticket=3)
    assert await soon(buffer.admit()) == [3]
    await buffer.add([3], rollouts([3], version=2))
    with pytest.raises(AssertionError, match=r"\(\S+1\)?, 0\)"):  # one version late, none allowed
        await soon(buffer.take(1))


# ---- groups and failures


async def test_failed_samples_are_counted_and_left_out(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=2)
    tickets = await soon(buffer.admit())
    receipt = await buffer.add(tickets, rollouts(tickets, samples=3, failed=[(1, 0)]))
    assert (receipt.accepted_groups, receipt.accepted_samples) == (2, 5)
    assert (receipt.failed, receipt.dropped) == ({"broken": 1}, {})
    batch, _ = await soon(buffer.take(2))
    rows = list(zip(batch.column("ticket").to_pylist(), batch.column("sample").to_pylist(), strict=True))
    assert rows == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]


async def test_a_group_with_one_scored_sample_is_dropped_and_its_slot_opens_again(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    first, second = await admit_all(buffer)
    receipt = await buffer.add(first, rollouts(first, samples=3, failed=[(1, 0), (1, 2)]))
    assert (receipt.accepted_groups, receipt.accepted_samples) == (1, 3)
    assert (receipt.failed, receipt.dropped) == ({"broken": 2}, {"too_few_samples": 1})
    assert await admit_all(buffer) == []  # not while something is in flight: the refill would depend on timing
    await buffer.add(second, rollouts(second))
    assert await admit_all(buffer) == [[4]]
    await buffer.add([4], rollouts([4]))
    batch, _ = await soon(buffer.take(4))
    assert tickets_of(batch) == [0, 2, 3, 4]


async def test_slots_of_a_lost_batch_are_refilled_together(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    first, second = await admit_all(buffer)
    await buffer.drop(second, "worker_lost")
    await buffer.drop(first, "worker_lost")
    assert await admit_all(buffer) == [[4, 5], [6, 7]]


async def test_dropped_tickets_must_be_in_flight(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    await admit_all(buffer)
    with pytest.raises(AssertionError, match=r"\[7\], 'worker_lost'"):
        await buffer.drop([7], "worker_lost")


@pytest.mark.parametrize(
    ("tickets", "rows"), [([0, 1], [0, 2]), ([0, 9], [0, 9]), ([0], [0, 1])], ids=["rows", "unknown", "part"]
)
async def test_rows_of_other_tickets_are_refused(tmp_path: Path, tickets: Sequence[int], rows: Any) -> None:
    buffer = buffer_in(tmp_path)
    await admit_all(buffer)
    with pytest.raises(ValueError, match="not in flight, or rows of other tickets"):
        await buffer.add(list(tickets), rollouts(rows))
    assert not (tmp_path / "buffer").exists()


async def test_rows_are_accepted_once_and_only_with_sound_columns(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    await admit_all(buffer)
    unsound = rollouts([0, 1]).set_column(2, "prompt_id", pa.array([None, 1, 2, 3], pa.int64()))
    with pytest.raises(ValueError, match="prompt_id"):
        await buffer.add([0, 1], unsound)
    await buffer.add([0, 1], rollouts([0, 1]))
    with pytest.raises(ValueError, match="not in flight"):
        await buffer.add([0, 1], rollouts([0, 1]))


# ---- files


async def test_the_rollout_file_of_a_step_is_what_take_returned(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    for step in (1, 2):
        for tickets in await admit_all(buffer):
            await buffer.add(tickets, rollouts(tickets, version=step - 1))
        batch, numbers = await soon(buffer.take(4))
        content = (tmp_path / "rollouts" / f"step-{step:06d}.arrow").read_bytes()
        assert schema.from_bytes(content).equals(batch, check_metadata=True)
        assert numbers["rollout_bytes"] == len(content)
        line = json.loads((tmp_path / "rollouts" / "MANIFEST.jsonl").read_text().splitlines()[-1])
        assert line == {
            "step": step,
            "file": f"step-{step:06d}.arrow",
            "rows": 8,
            "xxh3_128": files.digest_of(content),
            "tickets": list(range(4 * step - 4, 4 * step)),
            "dropped": {},
        }
        await buffer.advance(step)
    assert len((tmp_path / "rollouts" / "MANIFEST.jsonl").read_text().splitlines()) == 2


async def test_accepted_rows_are_on_disk_when_add_returns(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    tickets = await soon(buffer.admit())
    receipt = await buffer.add(tickets, rollouts(tickets, failed=[(0, 0)]))
    (path,) = (tmp_path / "buffer").iterdir()
    assert path.stat().st_size == receipt.num_bytes
    assert path.name.split(".")[2] == files.digest_of(path.read_bytes())
    assert tickets_of(schema.from_bytes(path.read_bytes())) == [1]  # ticket 0 has one scored sample


async def test_forget_deletes_only_what_lies_before(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    for tickets in await admit_all(buffer):
        await buffer.add(tickets, rollouts(tickets))
    both = ["segment.000000000000-000000000001", "segment.000000000002-000000000003"]
    await buffer.forget(1)
    assert segments(tmp_path) == both  # ticket 1 may still be asked for
    await buffer.forget(2)
    assert segments(tmp_path) == both[1:]


# ---- starting again


async def test_stored_rows_are_absorbed_instead_of_asked_for_again(tmp_path: Path) -> None:
    killed = buffer_in(tmp_path)
    _, second = await admit_all(killed)
    await killed.add(second, rollouts(second))
    again = buffer_in(tmp_path)
    assert await admit_all(again) == [[0, 1]]
    await again.add([0, 1], rollouts([0, 1]))
    batch, _ = await soon(again.take(4))
    assert batch.equals(rollouts([0, 1, 2, 3]))
    assert batch.schema.metadata == rollouts([0]).schema.metadata  # the segment's own key is gone


async def test_a_run_resumed_from_its_checkpoint_takes_the_same_steps_without_asking(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, staleness=1)
    steps = []
    for version in (1, 2, 3):
        for tickets in await admit_all(buffer):
            await buffer.add(tickets, rollouts(tickets, version=version - 1))
        steps.append((await soon(buffer.take(4)))[0])
        if version == 1:
            await buffer.advance(version)
            state = await buffer.state()
        elif version == 2:
            await buffer.advance(version)
    assert state == {"version": 1, "taken": 4, "next_ticket": 4}
    resumed = buffer_in(tmp_path, staleness=1, **state)
    assert await admit_all(resumed) == []
    assert (tmp_path / "rollouts" / "MANIFEST.jsonl").read_text().count("\n") == 1  # steps 2 and 3 are done again
    for version in (2, 3):
        assert (await soon(resumed.take(4)))[0].equals(steps[version - 1])
        await resumed.advance(version)
        assert await admit_all(resumed) == ([] if version == 2 else [[16, 17], [18, 19]])


async def test_tickets_whose_samples_failed_stay_dropped_after_a_restart(tmp_path: Path) -> None:
    killed = buffer_in(tmp_path)
    for tickets in await admit_all(killed):
        await killed.add(tickets, rollouts(tickets, failed=[(1, 0), (1, 1)]))
    assert await admit_all(killed) == [[4]]
    again = buffer_in(tmp_path)
    assert await admit_all(again) == [[4]]


async def test_a_corrupted_segment_is_deleted_and_its_tickets_asked_for_again(tmp_path: Path) -> None:
    killed = buffer_in(tmp_path)
    for tickets in await admit_all(killed):
        await killed.add(tickets, rollouts(tickets))
    path = sorted((tmp_path / "buffer").iterdir())[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = buffer_in(tmp_path)
    assert segments(tmp_path) == ["segment.000000000002-000000000003"]
    assert await admit_all(again) == [[0, 1]]


async def test_a_lost_batch_that_succeeds_after_a_restart_makes_no_stored_row_too_late(tmp_path: Path) -> None:
    """Drops are not on disk. Tickets asked for again push stored ones behind: those must not be trained late."""
    killed = buffer_in(tmp_path, step=2)
    await killed.drop(await soon(killed.admit()), "worker_lost")
    assert await soon(killed.admit()) == [2, 3]
    await killed.add([2, 3], rollouts([2, 3], version=0))
    again = buffer_in(tmp_path, step=2)
    for version in (1, 2):
        for tickets in await admit_all(again):
            await again.add(tickets, rollouts(tickets, version=version - 1))
        _, numbers = await soon(again.take(2))
        assert numbers["staleness_max_versions"] == 0
        await again.advance(version)


# ---- dynamic sampling


async def test_uniform_groups_are_replaced_as_often_as_allowed_and_then_kept(tmp_path: Path) -> None:
    """Two refills a step: the third opening of slots trains on what it gets, so a step always fills up."""
    buffer = buffer_in(tmp_path, step=2, batch=2, refills=2)
    assert await soon(buffer.admit()) == [0, 1]
    first = await soon(buffer.add([0, 1], schema.concat([uniform([0]), rollouts([1])])))
    assert (first.accepted_groups, dict(first.dropped)) == (1, {"uniform_rewards": 1})
    assert await soon(buffer.admit()) == [2]
    assert dict((await soon(buffer.add([2], uniform([2])))).dropped) == {"uniform_rewards": 1}
    assert await soon(buffer.admit()) == [3]
    last = await soon(buffer.add([3], uniform([3])))
    assert (last.accepted_groups, dict(last.dropped)) == (1, {})
    batch, gauges = await soon(buffer.take(2))
    assert tickets_of(batch) == [1, 3]
    assert gauges["counts"]["groups_dropped_total"] == {"uniform_rewards": 2}
    await soon(buffer.advance(1))
    assert await soon(buffer.admit()) == [4, 5]
    assert dict((await soon(buffer.add([4, 5], uniform([4, 5])))).dropped) == {"uniform_rewards": 2}  # a new step


async def test_without_refills_uniform_groups_are_trained_on(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=2, batch=2)
    tickets = await soon(buffer.admit())
    assert (await soon(buffer.add(tickets, uniform(tickets)))).accepted_groups == 2


async def test_objectives_that_compare_nothing_keep_groups_of_one(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path, step=2, batch=2, min_samples=1)
    tickets = await soon(buffer.admit())
    receipt = await soon(buffer.add(tickets, rollouts(tickets, failed=[(0, 0)])))
    assert (receipt.accepted_groups, receipt.accepted_samples) == (2, 3)


async def test_a_checkpoint_taken_while_groups_are_dropped_replays_the_same_round(tmp_path: Path) -> None:
    """The first group of the step was dropped when the state was read: it is asked for, dropped and replaced again."""
    uniforms = {0, 4}

    def made(tickets: list[int]) -> pa.RecordBatch:
        return schema.concat([(uniform if ticket in uniforms else rollouts)([ticket]) for ticket in tickets])

    async def finish(buffer: RolloutBuffer) -> tuple[list[list[int]], list[int], Any]:
        batches = []
        for _ in range(3):
            task = asyncio.create_task(buffer.admit())
            if await blocked(task):
                task.cancel()
                break
            batches.append(task.result())
            await soon(buffer.add(task.result(), made(task.result())))
        batch, gauges = await soon(buffer.take(4))
        return batches, tickets_of(batch), gauges["counts"]

    whole = await finish(buffer_in(tmp_path / "whole", refills=1))
    broken = buffer_in(tmp_path / "broken", refills=1)
    tickets = await soon(broken.admit())
    await soon(broken.add(tickets, made(tickets)))
    state = await broken.state()
    assert state["next_ticket"] == 0
    for path in (tmp_path / "broken" / "buffer").iterdir():
        path.unlink()
    assert await finish(buffer_in(tmp_path / "broken", refills=1, **state)) == whole
    assert whole[:2] == ([[0, 1], [2, 3], [4]], [1, 2, 3, 4])
