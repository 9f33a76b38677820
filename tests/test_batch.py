"""Plans cover every row once and tensors say what a naive loop says."""

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel import batch as batching
from keel import schema
from keel.batch import Budget


def batch_of(groups: list[tuple[int, list[int]]]) -> pa.RecordBatch:
    """Rows of (prompt length, completion lengths) groups, token ids that name their place."""
    tickets, prompts, completions = [], [], []
    for ticket, (prompt, lengths) in enumerate(groups):
        for sample, length in enumerate(lengths):
            tickets.append(ticket)
            prompts.append([1000 * ticket + place for place in range(prompt)])
            completions.append([100_000 + 1000 * ticket + 100 * sample + place for place in range(length)])
    return pa.record_batch(
        {
            "ticket": pa.array(tickets, pa.int64()),
            "prompt_tokens": pa.array(prompts, schema.TOKENS),
            "completion_tokens": pa.array(completions, schema.TOKENS),
        }
    )


GROUPS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=2, max_size=4)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 3), st.integers(8, 60), st.sampled_from([0, 12, 40]), st.integers(1, 9))
def test_a_plan_covers_every_row_once_and_alike_on_every_rank(
    groups: list[tuple[int, list[int]]], ranks: int, budget: int, shared: int, head: int
) -> None:
    batch = batch_of(groups)
    if batch.num_rows < ranks:
        return
    plan = batching.plan(batch, ranks, Budget(budget, shared, head))
    assert len({len(micro) for micro in plan.micro_batches}) == 1
    assert len(plan.head_chunks) == len(plan.micro_batches[0])
    seen: list[int] = []
    for units_of_rank, real_of_rank in zip(plan.micro_batches, plan.real, strict=True):
        for index, (units, real) in enumerate(zip(units_of_rank, real_of_rank, strict=True)):
            micro = batching.tensors(batch, units, real=real)
            assert micro.tokens.numel() <= budget or len(units) == 1
            assert plan.head_chunks[index] >= -(-len(micro.items) // head)
            if real:
                seen += micro.rows.tolist()
    assert sorted(seen) == list(range(batch.num_rows))


@settings(deadline=None)
@given(GROUPS, st.sampled_from([0, 15, 100]))
def test_tensors_equal_a_naive_loop(groups: list[tuple[int, list[int]]], shared: int) -> None:
    batch = batch_of(groups)
    prompts, completions = batch.column("prompt_tokens").to_pylist(), batch.column("completion_tokens").to_pylist()
    flat = np.concatenate([np.array(row) for row in completions])
    for units in batching.plan(batch, 1, Budget(64, shared, 8)).micro_batches[0]:
        micro = batching.tensors(batch, units)
        assert flat[micro.items].tolist() == micro.targets.tolist()
        own = [token for row in micro.rows for token in completions[row]]
        assert micro.targets.tolist() == own
        tokens, places = micro.tokens.flatten(), micro.places.flatten()
        cursor = 0
        for number, row in enumerate(micro.rows):
            sequence = prompts[row] + completions[row]
            for place in range(len(completions[row])):
                position = micro.positions[cursor]
                before = len(prompts[row]) + place - 1
                assert tokens[position] == sequence[before]  # the token in front of the target predicts it
                assert places[position] == before
                assert micro.row_of_item[cursor] == number
                cursor += 1
        assert cursor == len(micro.items)


def test_packed_rows_see_their_prompt_and_themselves_only() -> None:
    batch = batch_of([(2, [2, 1])])
    units = batching.plan(batch, 1, Budget(64, 64, 8)).micro_batches[0][0]
    micro = batching.tensors(batch, units)
    assert micro.places.tolist() == [[0, 1, 2, 3, 2]]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert micro.mask is not None
    assert torch.equal(micro.mask[0, 0], torch.tensor(expected, dtype=torch.bool))


def test_rows_on_their_own_need_no_mask() -> None:
    batch = batch_of([(2, [2, 1]), (3, [1, 1])])
    plan = batching.plan(batch, 1, Budget(64, 0, 8))
    assert all(batching.tensors(batch, units).mask is None for units in plan.micro_batches[0])


def test_packing_stops_at_its_limit() -> None:
    batch = batch_of([(4, [3, 3, 3, 3])])
    sizes = [len(unit) for units in batching.plan(batch, 1, Budget(64, 10, 8)).micro_batches[0] for unit in units]
    assert sorted(sizes) == [2, 2]
