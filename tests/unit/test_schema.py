"""Record batches: they own their memory, slices are honoured, and broken rows are refused at the borders."""

import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel import files, schema
from rollouts import METADATA, generated, prompts, referenced, rollouts, scored

ROWS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), min_size=1, max_size=8)


def test_build_keeps_the_values_and_types_of_the_schema() -> None:
    batch = rollouts([3, 4])
    assert batch.schema.field("prompt_tokens").type == pa.list_(pa.field("item", pa.int32(), nullable=False))
    assert batch.schema.field("sample").type == pa.int16() and batch.schema.field("reward").type == pa.float32()
    assert batch.column("ticket").to_pylist() == [3, 3, 4, 4]
    assert batch.column("prompt_tokens").to_pylist() == [[3], [3], [4, 4], [4, 4]]
    assert batch.schema.metadata == {key.encode(): value.encode() for key, value in METADATA.items()}


def test_build_does_not_change_with_the_arrays_it_was_given() -> None:
    tokens, lengths = np.array([1, 2, 3, 4], np.int32), np.array([3, 1])
    column = schema.from_ragged(tokens.copy(), lengths, schema.TOKENS)
    values = np.array([0.5, 1.5], np.float32)
    batch = schema.build(
        pa.schema([pa.field("a", schema.TOKENS), pa.field("b", pa.float32())]), {"a": column, "b": values.tolist()}
    )
    tokens[:], lengths[:], values[:] = 9, 2, 9.0
    assert batch.to_pydict() == {"a": [[1, 2, 3], [4]], "b": [0.5, 1.5]}


def test_build_wants_every_column_and_no_other() -> None:
    with pytest.raises(AssertionError, match="reference_logprobs"):
        schema.build(schema.REFERENCE, {})
    with pytest.raises(AssertionError, match="more"):
        schema.build(schema.REFERENCE, {"reference_logprobs": [[-1.0]], "more": [1]})


def test_append_grows_to_the_right_and_leaves_its_input_alone() -> None:
    before = generated(prompts([0, 1]))
    names = before.schema.names
    after = referenced(before)
    assert after.schema.names == [*names, "reference_logprobs"] and before.schema.names == names
    assert after.select(names).equals(before)
    assert after.schema.metadata == before.schema.metadata
    with pytest.raises(AssertionError, match="reference_logprobs"):
        schema.append(after, schema.build(schema.REFERENCE, {"reference_logprobs": [[-1.0]] * 4}))
    with pytest.raises(AssertionError, match=r"\(4, 3\)"):
        schema.append(before, schema.build(schema.REFERENCE, {"reference_logprobs": [[-1.0]] * 3}))


def test_concat_owns_its_memory(tmp_path: Path) -> None:
    """The source is a read-only map of a file that is overwritten afterwards."""
    source = rollouts(range(20))
    expected = source.slice(10, 4).to_pylist()
    path = tmp_path / "rows.arrow"
    path.write_bytes(schema.to_bytes(source))
    with pa.memory_map(str(path), "r+") as mapped:
        kept = schema.concat([pa.ipc.open_file(mapped).get_batch(0).slice(10, 4)])
        mapped.seek(0)
        mapped.write(b"\xff" * path.stat().st_size)
    gc.collect()
    assert kept.to_pylist() == expected


def test_concat_of_a_slice_does_not_drag_its_parent_along() -> None:
    parent = rollouts(range(2000))
    few = schema.concat([parent.slice(7, 2)])
    alone = schema.to_bytes(few).size
    assert alone < schema.to_bytes(parent).size / 50
    assert len(pickle.dumps(few)) < 2 * alone
    assert sum(buffer.size for column in few.columns for buffer in column.buffers() if buffer) < alone


def test_concat_is_one_batch_in_order_also_when_dictionaries_differ() -> None:
    reasons = schema.GENERATE.field("finish_reason").type
    parts = [pa.record_batch({"r": pa.array(row).cast(reasons)}) for row in (["stop"], ["length", "stop"], ["abort"])]
    assert schema.concat(parts).column("r").to_pylist() == ["stop", "length", "stop", "abort"]
    parts = [rollouts([2]), rollouts([0, 1]).slice(1, 2), rollouts([5])]
    assert schema.concat(parts).to_pylist() == [row for part in parts for row in part.to_pylist()]


def test_concat_of_no_rows_has_the_columns() -> None:
    empty = schema.concat([rollouts([0]).slice(0, 0)])
    assert empty.num_rows == 0 and empty.schema.equals(rollouts([0]).schema)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, bounds=st.tuples(st.integers(0, 8), st.integers(0, 8)))
def test_ragged_and_back_also_on_slices(rows: list[list[int]], bounds: tuple[int, int]) -> None:
    start, stop = min(*bounds, len(rows)), min(max(bounds), len(rows))
    whole = pa.record_batch({"x": pa.array(rows, schema.TOKENS)})
    values, lengths = schema.ragged(whole.slice(start, stop - start), "x")
    assert values.tolist() == [x for row in rows[start:stop] for x in row]
    assert lengths.tolist() == [len(row) for row in rows[start:stop]]
    assert schema.from_ragged(values, lengths, schema.TOKENS).to_pylist() == rows[start:stop]
    assert schema.row_sums(values, lengths).tolist() == [float(sum(row)) for row in rows[start:stop]]


def test_row_sums_are_as_exact_as_float64() -> None:
    """The first row is large: a running float32 sum would lose all of the second."""
    values = np.array([1e8, *[0.01] * 10], np.float32)
    assert schema.row_sums(values, np.array([1, 10]))[1] == pytest.approx(0.1, abs=1e-6)


def replaced(name: str, values: Any) -> Callable[[], pa.RecordBatch]:
    def make() -> pa.RecordBatch:
        batch = rollouts([0, 1])
        place = batch.schema.get_field_index(name)
        return batch.set_column(place, batch.schema.field(place), pa.array(values, batch.schema.field(place).type))

    return make


def changed(name: str, row: int, change: Callable[[list[Any]], list[Any]]) -> Callable[[], pa.RecordBatch]:
    values = rollouts([0, 1]).column(name).to_pylist()
    values[row] = change(values[row])
    return replaced(name, values)


BROKEN = {
    "null ticket": (replaced("ticket", [0, None, 1, 1]), "column ticket: 1 nulls"),
    "null list": (changed("completion_logprobs", 1, lambda _: None), "column completion_logprobs: 1 nulls"),  # type: ignore[arg-type, return-value]
    "short log-probs": (changed("completion_logprobs", 0, lambda x: x[1:]), "completion_logprobs: not as long"),
    "long versions": (changed("weight_versions", 2, lambda x: [*x, 0]), "weight_versions: not as long"),
    "short reference": (changed("reference_logprobs", 3, lambda x: x[1:]), "reference_logprobs: not as long"),
    "nan": (changed("completion_logprobs", 0, lambda x: [float("nan"), *x[1:]]), "finite and at most 0"),
    "minus infinity": (changed("reference_logprobs", 0, lambda x: [-float("inf"), *x[1:]]), "finite and at most 0"),
    "positive": (changed("completion_logprobs", 0, lambda x: [0.01, *x[1:]]), "finite and at most 0"),
    "negative id": (changed("completion_tokens", 0, lambda x: [-1, *x[1:]]), "id outside"),
    "reward nan": (replaced("reward", [0.0, float("nan"), 0.0, 0.0]), "column reward: not finite"),
    "reward without failure": (replaced("reward", [0.0, None, 0.0, 0.0]), "null without a failure"),
    "failure with reward": (replaced("failure", ["x", None, None, None]), "null without a failure, or a failure"),
    "seconds": (replaced("score_seconds", [0.0, float("inf"), 0.0, 0.0]), "column score_seconds: not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_refuses(name: str) -> None:
    make, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        schema.check(make())


def test_check_refuses_empty_completions_and_ids_outside_the_vocabulary() -> None:
    empty = scored(referenced(generated(prompts([0]), logprobs=[[-0.5], []])))
    with pytest.raises(ValueError, match="completion_tokens: empty completion"):
        schema.check(empty)
    batch = rollouts([0, 1])
    highest = max(max(row) for row in batch.column("completion_tokens").to_pylist())
    schema.check(batch, vocabulary=highest + 1)
    with pytest.raises(ValueError, match=f"id outside 0..{highest}"):
        schema.check(batch, vocabulary=highest)


def test_check_accepts_every_stage_slices_and_failed_samples() -> None:
    first = prompts([0, 1, 2])
    for batch in (first, generated(first), referenced(generated(first)), rollouts([0, 1, 2], failed=[(1, 0)])):
        for rows in (batch, batch.slice(1, 3)):
            before = rows.to_pylist()
            schema.check(rows)
            assert rows.num_rows > 0 and rows.to_pylist() == before
    monitored = scored(referenced(generated(first)), extra={"gold": [None, 1.0, 2.0, 3.0, 4.0, 5.0]})
    schema.check(monitored)
    assert monitored.column("reward_gold").null_count == 1


def test_bytes_round_trip_and_every_flipped_bit_changes_the_digest() -> None:
    batch = rollouts([0, 1])
    content = bytes(schema.to_bytes(batch))
    assert schema.from_bytes(content).equals(batch, check_metadata=True)
    digests = {files.digest_of(content)}
    places = np.random.default_rng(0).choice(len(content) * 8, 200, replace=False).tolist()
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        digests.add(files.digest_of(damaged))
    assert len(digests) == 201


# ---- durable files


def test_a_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    files.write(path, b"a long first version")
    with path.open("rb") as reader:  # a reader that has it open still reads the old one
        files.write(path, b"second")
        assert reader.read() == b"a long first version"
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file"]
