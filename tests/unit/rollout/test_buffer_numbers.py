"""Every number the buffer gives: receipts, gauges of a step, counters of its tickets, with rows that differ."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from buffers import admit_all, buffer_in, soon
from keel import schema
from keel.rollout import segments
from rollouts import generated, prompts, referenced, rollouts, scored


async def test_a_batch_of_which_nothing_is_kept_writes_nothing(tmp_path: Path) -> None:
    buffer = buffer_in(tmp_path)
    tickets = await soon(buffer.admit())
    failed = [(ticket, sample) for ticket in tickets for sample in (0, 1)]
    receipt = await buffer.add(tickets, rollouts(tickets, failed=failed))
    assert (receipt.accepted_groups, receipt.accepted_samples, receipt.num_bytes) == (0, 0, 0)
    assert (receipt.failed, receipt.dropped) == ({"broken": 4}, {"too_few_samples": 2})
    assert segments.paths(tmp_path) == []


@pytest.mark.parametrize("min_samples", [1, 2, 3])
async def test_a_group_needs_as_many_scored_samples_as_its_objective_compares(tmp_path: Path, min_samples: int) -> None:
    """Tickets 0 and 1 with two and one of three samples scored."""
    buffer = buffer_in(tmp_path, min_samples=min_samples)
    tickets = await soon(buffer.admit())
    receipt = await buffer.add(tickets, rollouts(tickets, samples=3, failed=[(0, 0), (1, 0), (1, 1)]))
    kept = [count for count in (2, 1) if count >= min_samples]
    assert (receipt.accepted_groups, receipt.accepted_samples) == (len(kept), sum(kept))


async def test_gauges_of_a_step_whose_rows_are_of_two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("keel.rollout.buffer.time.monotonic", lambda: now)
    buffer = buffer_in(tmp_path, step=2, batch=1, staleness=1, version=4, taken=8, next_ticket=8)
    assert await admit_all(buffer) == [[8], [9], [10], [11]]
    rows = {ticket: rollouts([ticket], version=version) for ticket, version in ((8, 3), (9, 4), (10, 4), (11, 4))}
    await buffer.add([9], rows[9])
    now = 107.0
    await buffer.add([8], rows[8])
    now = 110.0
    await buffer.add([11], rows[11])
    now = 130.0
    batch, gauges = await soon(buffer.take(2))
    tokens = [int(schema.lengths(rows[ticket], "completion_tokens").sum()) for ticket in (8, 9)]
    assert gauges["buffer_age_seconds"] == 30.0  # of the one that waited longest
    assert gauges["staleness_mean_versions"] == pytest.approx(tokens[0] / sum(tokens)) and tokens[0] != tokens[1]
    assert gauges["staleness_max_versions"] == 1.0
    assert (gauges["buffer_groups"], gauges["buffer_bytes"]) == (1.0, float(buffer._groups[11].rows.nbytes))
    assert (
        batch.num_rows == 4 and gauges["rollout_bytes"] == (tmp_path / "rollouts" / "step-000005.arrow").stat().st_size
    )
    assert await buffer.state() == {"version": 4, "taken": 10, "next_ticket": 10}


async def test_counters_of_a_step_are_those_of_its_tickets(tmp_path: Path) -> None:
    """One of three samples fails in ticket 0, ticket 1 is dropped, a monitor has no number for one sample of ticket 2."""
    buffer = buffer_in(tmp_path, step=2, batch=1, staleness=1)
    assert await admit_all(buffer) == [[0], [1], [2], [3]]

    def made(ticket: int, rewards: list[float | None], gold: list[float | None]) -> pa.RecordBatch:
        return scored(referenced(generated(prompts([ticket], 3))), rewards, {"gold": gold})

    batches = {
        0: made(0, [1.0, None, 2.0], [1.0, 1.0, 1.0]),
        1: made(1, [1.0, None, None], [1.0, 1.0, None]),
        2: made(2, [1.0, 2.0, 3.0], [1.0, None, 1.0]),
    }
    for ticket, batch in batches.items():
        await buffer.add([ticket], batch)
    _, gauges = await soon(buffer.take(2))
    tokens = sum(int(schema.lengths(batch, "completion_tokens").sum()) for batch in batches.values())
    assert gauges["counts"] == {
        "samples_accepted_total": {"": 5},
        "completion_tokens_total": {"": tokens},
        "samples_failed_total": {"broken": 3, "gold_monitor": 1},
        "groups_dropped_total": {"too_few_samples": 1},
    }


@pytest.mark.parametrize(("refills", "dropped"), [(0, 0), (1, 1), (2, 2), (5, 5)])
async def test_equal_rewards_are_replaced_as_often_as_is_allowed(tmp_path: Path, refills: int, dropped: int) -> None:
    buffer = buffer_in(tmp_path, step=1, batch=1, refills=refills)
    reasons: list[Any] = []
    for ticket in range(refills + 1):
        assert await soon(buffer.admit()) == [ticket]
        batch = rollouts([ticket])
        place = batch.schema.get_field_index("reward")
        same = batch.set_column(place, batch.schema.field(place), pa.array([0.25, 0.25], pa.float32()))
        reasons += (await buffer.add([ticket], same)).dropped
    assert reasons == ["uniform_rewards"] * dropped
    batch, _ = await soon(buffer.take(1))
    assert batch.column("ticket").to_pylist() == [refills] * 2


@pytest.mark.parametrize(("first", "forgotten"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)])
async def test_segments_are_forgotten_when_all_their_tickets_lie_before(
    tmp_path: Path, first: int, forgotten: int
) -> None:
    buffer = buffer_in(tmp_path)
    for tickets in await admit_all(buffer):
        await buffer.add(tickets, rollouts(tickets))
    await buffer.forget(first)
    assert len(segments.paths(tmp_path)) == 2 - forgotten


ODD: dict[str, Any] = {
    "no row at all": lambda rows, counts: segments.Segment([0, 1], rows.slice(0, 0), counts, {0: "x", 1: "x"}),
    "rows of a ticket less": lambda rows, counts: segments.Segment([0, 1], rows.slice(0, 2), counts, {}),
    "rows of a ticket that was dropped": lambda rows, counts: segments.Segment([0, 1], rows, counts, {1: "x"}),
    "rows of a ticket more": lambda rows, counts: segments.Segment([0], rows, {0: {}}, {}),
    "counts of a ticket less": lambda rows, counts: segments.Segment([0, 1], rows, {0: {}}, {}),
    "counts of a ticket more": lambda rows, counts: segments.Segment([0, 1], rows, {**counts, 2: {}}, {}),
}


@pytest.mark.parametrize("name", ODD)
def test_a_segment_that_does_not_fit_itself_is_none(tmp_path: Path, name: str) -> None:
    """Its digest is right; what it says of its tickets is not."""
    segments.write(tmp_path, ODD[name](rollouts([0, 1]), {0: {}, 1: {}}))
    (path,) = segments.paths(tmp_path)
    with pytest.raises(segments.SegmentError, match=r"rows of tickets \[.*\]; expected those of|not a segment"):
        segments.read(path)


def test_a_segment_that_fits_is_read_as_it_was_written(tmp_path: Path) -> None:
    counts = {0: {"a": {"": 1}}, 1: {"b": {"x": 2}}}
    num_bytes = segments.write(tmp_path, segments.Segment([0, 1], rollouts([1]), counts, {0: "why"}))
    (path,) = segments.paths(tmp_path)
    result = segments.read(path)
    assert (result.tickets, result.counts, result.dropped) == ([0, 1], counts, {0: "why"})
    assert result.rows.equals(rollouts([1]), check_metadata=True) and path.stat().st_size == num_bytes
    groups = dict(result.groups())
    assert (groups[0].rows, groups[0].reason, groups[1].reason) == (None, "why", "")
    assert groups[1].rows is not None and groups[1].rows.equals(rollouts([1]))
    assert path.name.startswith("segment.000000000000-000000000001.")
    odd = path.with_name("segment.odd.arrow")
    path.rename(odd)
    with pytest.raises(segments.SegmentError, match=r"named segment\.odd\.arrow"):
        segments.read(odd)
