"""The rollout columns by stage, and what a record batch must hold at the borders.

One row is one completion. A stage returns its input with its own columns appended; nothing is changed in place.
Arrow enforces neither lengths, finiteness, nulls nor checksums [`validate(full=True)` included], so `check` does at
the borders (generator out, buffer in) and `files.digest_of` covers bytes on disk.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keel.errors import KeelError

SCHEMA_VERSION = "2"

TOKENS = pa.list_(pa.field("item", pa.int32(), nullable=False))
NATS = pa.list_(pa.field("item", pa.float32(), nullable=False))
STORED, GIVEN = "stored", "given"
"""Values of the column `generator` for completions that came with the prompts: scored by a generator, or by none."""


def described(**columns: tuple[pa.DataType, str]) -> pa.Schema:
    """Schema of columns by name, each with its type and what it means."""
    return pa.schema([pa.field(name, type_, metadata={"meaning": text}) for name, (type_, text) in columns.items()])


PROMPT = described(
    ticket=(pa.int64(), "group number; all samples of a prompt in a step share it"),
    sample=(pa.int16(), "0..n-1 inside the group"),
    prompt_id=(pa.int64(), "row of the prompt source"),
    prompt_tokens=(TOKENS, "as fed to the model"),
    prompt=(pa.string(), "text of the prompt, the last user message if conversational"),
    prompt_messages=(pa.string(), "its messages as JSON; [] where it is plain text"),
    prompt_columns=(pa.string(), "further columns of the prompt source, as JSON"),
    seed=(pa.int64(), "hash(run seed or seed of the held-out rows, ticket, sample)"),
)
GENERATE = described(
    completion_tokens=(TOKENS, "including the end token when it was sampled"),
    completion_logprobs=(NATS, "nats, at the sampling temperature and filter"),
    weight_versions=(TOKENS, "policy version that sampled each token"),
    completion=(pa.string(), "text without special tokens"),
    finish_reason=(pa.dictionary(pa.int8(), pa.string()), "stop, length or abort"),
    generator=(pa.string(), "which generator"),
    generate_seconds=(pa.float32(), "of the whole generator batch"),
)
REFERENCE = described(reference_logprobs=(NATS, "nats, same temperature as completion_logprobs"))
RELEVANCE = described(
    relevance_nats=(pa.float32(), "mean log-prob a token under the reference, given the prompt minus given another")
)
SCORE = described(
    reward=(pa.float32(), "weighted sum of the training rewards; null: failed"),
    failure=(pa.string(), "why the sample has no reward; null: it was scored"),
    score_seconds=(pa.float32(), "all scorers of this batch"),
    scorer=(pa.string(), "names of the scorers, joined by +"),
)
_PER_COMPLETION_TOKEN = ("completion_logprobs", "weight_versions", "reference_logprobs")
_NULLABLE = {"failure", "relevance_nats"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class ContractError(KeelError, ValueError):
    """A batch breaks the contract of its columns: which one, and how."""


SPREAD = ("mean", "std", "worst")
"""Statistics of an ensemble's members beside its reward, in columns reward_NAME_mean and so on."""


def reward_columns(name: str) -> list[str]:
    """The columns a reward may have: its own, and those of its members' spread."""
    return [f"reward_{name}", *(f"reward_{name}_{what}" for what in SPREAD)]


def reward_field(name: str) -> pa.Field:
    """Column of one reward component; null where that scorer failed."""
    return described(**{f"reward_{name}": (pa.float32(), "reward component, gold and monitors included")}).field(0)


def build(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Record batch from columns (sequences or Arrow arrays), one for every field of the schema.

    Half a surrogate pair, which Python's text can hold and UTF-8 cannot, becomes U+FFFD.
    """
    assert set(columns) == set(schema.names), set(columns) ^ set(schema.names)
    fields = [(columns[field.name], field.type) for field in schema]
    arrays = [values if isinstance(values, pa.Array) else _array(values, type_) for values, type_ in fields]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array(values: Sequence[Any], of: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, type=of, from_pandas=False)
    except UnicodeEncodeError:
        return pa.array([_SURROGATE.sub("\ufffd", v) if isinstance(v, str) else v for v in values], type=of)


def given(tokens: Sequence[Sequence[int]], texts: Sequence[str]) -> pa.RecordBatch:
    """Completions that no policy sampled, in the columns of GENERATE, with log-probs of 0 as placeholders."""
    lengths_ = np.array([len(ids) for ids in tokens])
    zeros = np.zeros(int(lengths_.sum()))
    columns = {
        "completion_tokens": list(tokens),
        "completion_logprobs": from_ragged(zeros.astype(np.float32), lengths_, NATS),
        "weight_versions": from_ragged(zeros.astype(np.int32), lengths_, TOKENS),
        "completion": list(texts),
        "finish_reason": finish_reasons(True for _ in tokens),
        "generator": [GIVEN] * len(tokens),
        "generate_seconds": [0.0] * len(tokens),
    }
    return build(GENERATE, columns)


def append(batch: pa.RecordBatch, added: pa.RecordBatch) -> pa.RecordBatch:
    """The batch grown to the right by the added columns; its schema metadata is kept."""
    assert batch.num_rows == added.num_rows, (batch.num_rows, added.num_rows)
    assert not set(batch.schema.names) & set(added.schema.names), set(batch.schema.names) & set(added.schema.names)
    fields = [*batch.schema, *added.schema]
    return pa.RecordBatch.from_arrays([*batch.columns, *added.columns], schema=pa.schema(fields, batch.schema.metadata))


def concat(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """One contiguous batch that owns its memory, also from slices and read-only maps.

    Never by pickling or `RecordBatch.slice` alone: those keep, and ship, the whole parent.
    """
    table = pa.Table.from_batches(batches).unify_dictionaries().combine_chunks()
    return from_bytes(to_bytes(table.to_batches()[0])) if table.num_rows else batches[0].slice(0, 0)


def select(batch: pa.RecordBatch, keep: np.ndarray) -> pa.RecordBatch:
    """Rows where the boolean mask [rows] holds."""
    return batch.filter(pa.array(keep))


def to_bytes(batch: pa.RecordBatch) -> pa.Buffer:
    """The batch as a complete Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def from_bytes(content: pa.Buffer | bytes) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.BufferReader(content))
    assert reader.num_record_batches == 1, reader.num_record_batches
    return reader.get_batch(0)


def ragged(batch: pa.RecordBatch, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat values [all items] and lengths [rows] of a list column; honors slices (`.values` would not)."""
    array = batch.column(column)
    return array.flatten().to_numpy(zero_copy_only=False), lengths(batch, column)


def lengths(batch: pa.RecordBatch, column: str) -> np.ndarray:
    return pc.list_value_length(batch.column(column)).to_numpy(zero_copy_only=False).astype(np.int64)


def completion_lengths(batch: pa.RecordBatch) -> np.ndarray:
    """Tokens of each completion [rows], from whichever per-token column the batch has."""
    known = next(name for name in ("completion_tokens", "completion_logprobs") if name in batch.schema.names)
    return lengths(batch, known)


def sampled(batch: pa.RecordBatch) -> np.ndarray:
    """bool [rows]: completions that a policy sampled. Of others -log pi is no entropy and log pi - log ref no KL."""
    if "completion_logprobs" not in batch.schema.names:
        return np.zeros(batch.num_rows, bool)
    if "generator" not in batch.schema.names:
        return np.ones(batch.num_rows, bool)
    return np.array([name not in (STORED, GIVEN) for name in batch.column("generator").to_pylist()], bool)


def from_ragged(values: np.ndarray, row_lengths: np.ndarray, list_type: pa.DataType) -> pa.ListArray:
    """List array from flat values and the length of each row."""
    offsets = np.concatenate([[0], np.cumsum(row_lengths)]).astype(np.int32)
    items = pa.array(values, type=list_type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=list_type)


def finish_reasons(ended: Iterable[bool]) -> pa.Array:
    """The column `finish_reason` of completions that ended by themselves, or did not."""
    reasons = pa.array(["stop" if end else "length" for end in ended], pa.string())
    return reasons.dictionary_encode().cast(GENERATE.field("finish_reason").type)


def finished(batch: pa.RecordBatch) -> np.ndarray:
    """bool [rows]: completions that ended by themselves; all where the batch does not say."""
    if "finish_reason" not in batch.schema.names:
        return np.ones(batch.num_rows, bool)
    return np.array([reason == "stop" for reason in batch.column("finish_reason").to_pylist()], bool)


def row_sums(values: np.ndarray, row_lengths: np.ndarray) -> np.ndarray:
    """Sum of each row of a ragged array, in float64; 0 for an empty row."""
    totals = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.cumsum(row_lengths)
    return totals[ends] - totals[ends - row_lengths]


def check(batch: pa.RecordBatch, vocabulary: int | None = None) -> None:
    """Raise ContractError when a batch at a border breaks the contract of its columns.

    Nulls only where a scorer may fail; every per-token list as long as the completion; log-probs finite and not
    positive; token ids inside the vocabulary; completions not empty.
    """
    failed = batch.column("failure").is_valid() if "failure" in batch.schema.names else None
    for field, column in zip(batch.schema, batch.columns, strict=True):
        may_be_null = field.name in _NULLABLE or field.name.startswith("reward")
        if column.null_count and not may_be_null:
            raise ContractError(f"column {field.name}: {column.null_count} nulls")
        if field.name == "reward" and failed is not None and not column.is_null().equals(failed):
            raise ContractError("column reward: null without a failure, or a failure with a reward")
        if pa.types.is_floating(field.type) and not np.isfinite(column.drop_null().to_numpy()).all():
            raise ContractError(f"column {field.name}: not finite")
    if "completion_tokens" not in batch.schema.names:
        return
    completion = lengths(batch, "completion_tokens")
    if (completion == 0).any():
        raise ContractError("column completion_tokens: empty completion")
    for name in [name for name in _PER_COMPLETION_TOKEN if name in batch.schema.names]:
        values, row_lengths = ragged(batch, name)
        if (row_lengths != completion).any():
            raise ContractError(f"column {name}: not as long as completion_tokens")
        if name.endswith("logprobs") and not (np.isfinite(values).all() and (values <= 1e-4).all()):
            raise ContractError(f"column {name}: log-probs must be finite and at most 0")
    ids, _ = ragged(batch, "completion_tokens")
    if ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary):
        raise ContractError(f"column completion_tokens: id outside 0..{vocabulary}")
