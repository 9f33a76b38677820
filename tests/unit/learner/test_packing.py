"""Plans cover every row once and tensors say what a naive loop says."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel import schema
from keel.learner import loading, packing, tiny
from keel.learner.packing import TokenBudget


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


def places_of(micro: packing.MicroBatch) -> torch.Tensor:
    """[U, T] positions; those of a sequence that is one row are what a model counts by itself."""
    if micro.layout is None:
        return torch.arange(micro.tokens.shape[1]).expand_as(micro.tokens)
    return micro.layout.places


def visible(micro: packing.MicroBatch) -> torch.Tensor:
    """bool [U, T, T]: what a causal mask of places leaves of the layout's rows."""
    assert micro.layout is not None
    sequences, places = torch.arange(len(micro.tokens)), torch.arange(micro.tokens.shape[1])
    indices = (sequences[:, None, None], places[None, :, None], places[None, None, :])
    causal = micro.layout.places[:, None, :] <= micro.layout.places[:, :, None]
    return micro.layout.same_row(*indices) & causal


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
    plan = packing.plan(batch, ranks, TokenBudget(budget, shared, head))
    assert len({len(micro) for micro in plan.micro_batches}) == 1
    assert len(plan.head_chunks) == len(plan.micro_batches[0])
    seen: list[int] = []
    for units_of_rank, real_of_rank in zip(plan.micro_batches, plan.real, strict=True):
        for index, (units, real) in enumerate(zip(units_of_rank, real_of_rank, strict=True)):
            micro = packing.tensors(batch, units, real=real)
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
    for units in packing.plan(batch, 1, TokenBudget(64, shared, 8)).micro_batches[0]:
        micro = packing.tensors(batch, units)
        assert flat[micro.items].tolist() == micro.targets.tolist()
        subject = [token for row in micro.rows for token in completions[row]]
        assert micro.targets.tolist() == subject
        tokens, places = micro.tokens.flatten(), places_of(micro).flatten()
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
    units = packing.plan(batch, 1, TokenBudget(64, 64, 8)).micro_batches[0][0]
    micro = packing.tensors(batch, units)
    assert places_of(micro).tolist() == [[0, 1, 2, 3, 2]]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert torch.equal(visible(micro)[0], torch.tensor(expected, dtype=torch.bool))


def test_rows_on_their_own_need_no_mask() -> None:
    batch = batch_of([(2, [2, 1]), (3, [1, 1])])
    plan = packing.plan(batch, 1, TokenBudget(64, 0, 8))
    assert all(packing.tensors(batch, units).layout is None for units in plan.micro_batches[0])


def test_packing_stops_at_its_limit() -> None:
    batch = batch_of([(4, [3, 3, 3, 3])])
    sizes = [len(unit) for units in packing.plan(batch, 1, TokenBudget(64, 10, 8)).micro_batches[0] for unit in units]
    assert sorted(sizes) == [2, 2]


# ---- units of different prompts in one sequence


@settings(deadline=None)
@given(GROUPS, st.integers(1, 3), st.sampled_from([1, 12, 40]), st.sampled_from([0, 12, 40]))
def test_packed_plans_cover_every_row_once(
    groups: list[tuple[int, list[int]]], ranks: int, packed: int, shared: int
) -> None:
    batch = batch_of(groups)
    if batch.num_rows < ranks:
        return
    plan = packing.plan(batch, ranks, TokenBudget(64, shared, 8, packed))
    assert len({len(micro) for micro in plan.micro_batches}) == 1
    seen: list[int] = []
    for units_of_rank, real_of_rank in zip(plan.micro_batches, plan.real, strict=True):
        assert any(real_of_rank)
        for units, real in zip(units_of_rank, real_of_rank, strict=True):
            micro = packing.tensors(batch, units, real=real)
            one_unit = [len(set(batch.column("ticket").to_numpy()[unit].tolist())) == 1 for unit in units]
            assert micro.tokens.numel() <= 64 or len(units) == 1
            assert micro.tokens.shape[1] <= packed or any(one_unit)  # only a unit alone is longer than the limit
            seen += micro.rows.tolist() if real else []
    assert sorted(seen) == list(range(batch.num_rows))


def origins(batch: pa.RecordBatch, micro: packing.MicroBatch) -> list[list[tuple[int, int | None, int]]]:
    """Of every token of every sequence: its ticket, its row (None: a prompt's), its place; read off the token ids."""
    rows = {tokens[0] // 100: row for row, tokens in enumerate(batch.column("completion_tokens").to_pylist())}
    result = []
    for sequence in micro.tokens.tolist():
        subject: list[tuple[int, int | None, int]] = []
        for token in sequence:
            if token >= 100_000:
                subject.append((token % 100_000 // 1000, rows[token // 100], token % 100))
            else:
                subject.append((token // 1000, None, token % 1000))
        result.append(subject)
    return result


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3)), min_size=2, max_size=5),
    st.sampled_from([0, 9, 40]),
    st.sampled_from([12, 30]),
)
def test_a_packed_token_sees_its_own_prompt_and_completion_alone(
    groups: list[tuple[int, list[int]]], shared: int, packed: int
) -> None:
    """Every pair of tokens of every sequence, by brute force; positions restart with every prompt."""
    batch = batch_of([(1, [1]), *groups])  # ticket 0 is not among those looked at: its ids look like padding
    units = packing.plan(batch.slice(1), 1, TokenBudget(64, shared, 8, packed)).micro_batches[0]
    for sequences in units:
        micro = packing.tensors(batch.slice(1), sequences)
        prompt_lengths = [1, *(length for length, _ in groups)]
        for number, (sequence, unit) in enumerate(zip(origins(batch, micro), sequences, strict=True)):
            real = sum(token != 0 for token in micro.tokens[number].tolist())
            assert all(micro.tokens[number, real:] == 0)
            copies, copy = [], -1  # a prompt may stand in a sequence twice
            for place in range(real):
                ticket, row, within = sequence[place]
                copy += row is None and within == 0
                copies.append(copy)
                expected = within + (prompt_lengths[ticket] if row is not None else 0)
                assert places_of(micro)[number, place] == expected
            if micro.layout is None:
                assert len(unit) == 1
                continue
            mask = visible(micro)[number]
            for query in range(real):
                for key in range(real):
                    own_prompt = copies[query] == copies[key] and sequence[key][1] is None
                    own_completion = sequence[query][1] is not None and sequence[query][1] == sequence[key][1]
                    expected_mask = key <= query and (own_prompt or own_completion)
                    assert bool(mask[query, key]) == expected_mask, (query, key)
            assert not mask[:real, real:].any()  # no token sees the padding
            assert mask.any(-1).all()  # and a row of the mask without any place would be NaN


def test_units_fill_sequences_first_fit() -> None:
    batch = batch_of([(4, [4]), (3, [3]), (2, [2]), (1, [1])])  # 8, 6, 4, 2 tokens
    packed = packing.plan(batch, 1, TokenBudget(100, 0, 8, 10)).micro_batches[0]
    assert [[unit.tolist() for unit in units] for units in packed] == [[[0, 3], [1, 2]]]
    long = packing.plan(batch, 1, TokenBudget(100, 0, 8, 5)).micro_batches[0]
    assert [[unit.tolist() for unit in units] for units in long] == [[[0], [1], [2], [3]]]  # 4 + 2 is more than 5
    many = packing.plan(batch, 3, TokenBudget(100, 0, 8, 100)).micro_batches
    assert [[unit.tolist() for units in rank for unit in units] for rank in many] == [[[0, 3]], [[1]], [[2]]]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("shared", "packed"), [(0, 24), (64, 40)])
def test_packed_rows_have_the_log_probs_and_gradients_of_rows_alone(
    tmp_path: Path, architecture: str, shared: int, packed: int
) -> None:
    """Against one row at a time through the same tiny model, each with a weight of its own."""
    policy = loading.load_policy(tiny.write(tmp_path / "m", architecture, architecture == "llama"), "float32")
    random = np.random.default_rng(0)
    tickets = [0, 0, 1, 2, 2, 2, 3]
    text = [random.integers(3, 300, n).tolist() for n in (3, 6, 1, 4)]
    columns = {
        "ticket": pa.array(tickets, pa.int64()),
        "prompt_tokens": pa.array([text[t] for t in tickets], schema.TOKENS),
        "completion_tokens": pa.array(
            [random.integers(3, 300, n).tolist() for n in (5, 1, 7, 2, 3, 4, 6)], schema.TOKENS
        ),
    }
    batch = pa.record_batch(columns)
    weights = torch.from_numpy(random.normal(size=28))
    expected = torch.zeros(28, dtype=torch.float32)
    start = 0
    for row in batch.to_pylist():
        count, prompt = len(row["completion_tokens"]), len(row["prompt_tokens"])
        logits = policy.model(input_ids=torch.tensor([row["prompt_tokens"] + row["completion_tokens"]])).logits
        subject = logits[0, prompt - 1 : -1].log_softmax(-1)[
            torch.arange(count), torch.tensor(row["completion_tokens"])
        ]
        (subject * weights[start : start + count]).sum().backward()
        expected[start : start + count] = subject.detach()
        start += count
    gradients = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    result = torch.zeros(28, dtype=torch.float32)
    units = packing.plan(batch, 1, TokenBudget(64, shared, 8, packed)).micro_batches[0]
    assert any(len({tickets[row] for row in unit}) > 1 for sequences in units for unit in sequences)
    for sequences in units:
        micro = packing.tensors(batch, sequences)
        values, _ = policy(micro, 1.0, 1, entropy=False)
        (values * weights[torch.from_numpy(micro.items)]).sum().backward()
        result[torch.from_numpy(micro.items)] = values.detach()
    assert torch.allclose(result, expected, atol=1e-5)
    for name, parameter in policy.named_parameters():
        scale = float(gradients[name].abs().max())
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5 * scale + 1e-6), name
