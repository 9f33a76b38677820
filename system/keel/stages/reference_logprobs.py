"""Log-probs of stored completions under the reference, read once and kept as Arrow by content.

The file's name is a hash of everything the numbers depend on (model files, tokens, dtype), so a sweep over betas reads
them once, and another model or another row never finds them.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from keel import files, reads, schema
from keel.cluster import actors
from keel.config.run import Settings
from keel.learner import loading, model_files
from keel.online.recorder import Display
from keel.online.retries import retrying
from keel.rollout.offline_rows import OfflineRows
from keel.stages import sampling

_ROWS_PER_BATCH = 256


class ReferenceLogprobs:
    """`append` puts the column reference_logprobs on rows that were read."""

    def __init__(self, table: pa.RecordBatch) -> None:
        self._table = table
        ids, samples = (table.column(name).to_pylist() for name in ("prompt_id", "sample"))
        self._places = {key: place for place, key in enumerate(zip(ids, samples, strict=True))}

    @classmethod
    async def read(cls, settings: Settings, folder: str, rows: OfflineRows, display: Display) -> "ReferenceLogprobs":
        """From the cache, or through the reference scorers and into it."""
        parts = rows.everything()
        path = loading.cache_directory() / "reference_logprobs" / f"{_key(settings, folder, parts)}.arrow"
        if kept := _kept(path):
            display.note(f"reference log-probs: cached ({path})")
            return cls(schema.from_bytes(kept))
        pool = actors.reference(settings, folder)
        await pool.pool.ready()

        async def one(batch: pa.RecordBatch) -> pa.RecordBatch:
            handle, _ = await retrying(lambda: pool.score(batch), settings.failures.retries)
            return (await actors.fetch(handle)).select(["prompt_id", "sample", "reference_logprobs"])

        workers, what = pool.pool.count, "reference log-probs"
        display.doing(what)
        found = [await sampling.in_parts(part, one, _ROWS_PER_BATCH, workers, display, what) for part in parts]
        pool.pool.stop()
        table = schema.concat(found)
        _keep(path, schema.to_bytes(table))
        display.note(f"reference log-probs: {table.num_rows} completions read once, kept in {path}")
        return cls(table)

    def append(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        keys = zip(*(batch.column(name).to_pylist() for name in ("prompt_id", "sample")), strict=True)
        taken = self._table.column("reference_logprobs").take(pa.array([self._places[key] for key in keys]))
        assert pc.list_value_length(taken).equals(pc.list_value_length(batch.column("completion_tokens")))
        return schema.append(batch, schema.build(schema.REFERENCE, {"reference_logprobs": taken}))


def _keep(path: Path, content: pa.Buffer) -> None:
    """The file, then its digest beside it: Arrow has no checksum."""
    files.write(path, content)
    files.write_json(path.with_suffix(".json"), {"xxh3_128": schema.digest(content)})


def _kept(path: Path) -> bytes | None:
    """What is in the cache; None: nothing is, or it is damaged. Raises ReadFailed."""

    def look() -> bytes | None:
        try:
            expected = reads.read_json(path.with_suffix(".json"))["xxh3_128"]
            content = reads.read(path)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return content if schema.digest(content) == expected else None

    return reads.settled(path, look, lambda found: found is not None) if reads.is_there(path) else None


def _key(settings: Settings, folder: str, parts: Sequence[pa.RecordBatch]) -> str:
    """Hash of the model's files, the rows' tokens and the arithmetic."""
    assert settings.reference is not None
    hasher = xxhash.xxh3_128(settings.reference.dtype.encode())
    for path in [Path(folder) / "config.json", *model_files.weight_files(Path(folder))]:
        hasher.update(files.digest(path).encode())
    for batch in parts:
        for name in ("prompt_tokens", "completion_tokens"):
            values, lengths = schema.ragged(batch, name)
            hasher.update(values.tobytes())
            hasher.update(lengths.tobytes())
        for name in ("prompt_id", "sample"):
            hasher.update(batch.column(name).to_numpy().tobytes())
    return hasher.hexdigest()
