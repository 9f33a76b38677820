"""A learner's state on disk, the same whatever the number of ranks and the ZeRO stage that wrote it.

learner/   block-00000.safetensors ...   master weights and moments: whole fp32 tensors, named as zero_shards.py says
           index.json                    format, version, Adam's steps, the tensors of every block; written last
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keel import files, reads
from keel.checkpoint import CheckpointError

FORMAT = 1
INDEX = "index.json"
BLOCK_BYTES = 2**28
"""A block holds as many tensors as fit; a larger one is alone in its block."""


class ShardedTensors(Protocol):
    """Whole tensors of a learner, of which every rank holds a shard."""

    shapes: dict[str, tuple[int, ...]]
    """Of all tensors, by name."""
    adam_steps: int

    def gather(self, name: str, rank: int) -> Tensor: ...

    def scatter(self, name: str, whole: Tensor) -> None: ...


def blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """The tensors of every block, by its file's name."""
    names_by_block: list[list[str]] = []
    used_bytes = BLOCK_BYTES
    for name, shape in shapes.items():
        num_bytes = 4 * math.prod(shape)
        if used_bytes + num_bytes > BLOCK_BYTES:
            names_by_block.append([])
            used_bytes = 0
        names_by_block[-1].append(name)
        used_bytes += num_bytes
    return {f"block-{number:05}.safetensors": names for number, names in enumerate(names_by_block)}


def write_blocks(folder: Path, tensors: ShardedTensors, rank: int, ranks: int) -> None:
    """Write this rank's share of the blocks, one at a time; in memory is one block a rank. Collective."""
    files.make_folder(folder)
    planned = list(blocks(tensors.shapes).items())
    for first in range(0, len(planned), ranks):
        # all blocks of a round are gathered before any is written: so the ranks write at the same time
        gathered: dict[str, Tensor] = {}
        for writer, (_, names) in enumerate(planned[first : first + ranks]):
            for name in names:
                whole = tensors.gather(name, writer)
                if writer == rank:
                    gathered[name] = whole
        if gathered:
            path = folder / planned[first + rank][0]
            save_file(gathered, path)
            files.sync(path)


def write_index(folder: Path, version: int, tensors: ShardedTensors) -> None:
    """Say what the blocks hold, once all are written: one rank's work."""
    index = {"format": FORMAT, "version": version, "adam_steps": tensors.adam_steps, "blocks": blocks(tensors.shapes)}
    files.write_json(folder / INDEX, index)


def read(folder: Path, tensors: ShardedTensors) -> int:
    """Scatter every tensor; the version.

    Raises CheckpointError for a file that is missing or damaged and for other parameters than the learner's, and
    ReadFailed for one that cannot be read, before anything is changed.
    """
    index = _index(folder)
    _check_names(folder / INDEX, index, tensors.shapes)
    for block, names in index["blocks"].items():
        with _opened(folder / block) as file:
            _check_shapes(folder / block, file, names, tensors.shapes)
    for block, names in index["blocks"].items():
        with _opened(folder / block) as file:
            for name in names:
                tensors.scatter(name, file.get_tensor(name))
    tensors.adam_steps = index["adam_steps"]
    return index["version"]


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = reads.read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(index, dict) or not {"format", "version", "adam_steps", "blocks"} <= index.keys():
        raise CheckpointError(f"{path}: no index of blocks")
    if index["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {index['format']}; expected {FORMAT}")
    return index


def _check_names(path: Path, index: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    stored = {name for names in index["blocks"].values() for name in names}
    if odd := sorted(stored ^ shapes.keys()):
        what = "is missing" if odd[0] in shapes else "is none of the learner's"
        raise CheckpointError(f"{path}: {len(odd)} tensors do not fit the learner, for instance {odd[0]} {what}")


def _check_shapes(path: Path, file: Any, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if lost := sorted(set(names) - set(file.keys())):
        raise CheckpointError(f"{path}: {lost[0]} is missing")
    for name in names:
        tensor = file.get_slice(name)
        actual, expected = (tensor.get_dtype(), tensor.get_shape()), ("F32", list(shapes[name]))
        if actual != expected:
            raise CheckpointError(f"{path}: {name} is {actual[0]} {actual[1]}; expected {expected[0]} {expected[1]}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with reads.naming_a_failed_read(path), _open(path) as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _open(path: Path) -> Any:
    """Open a block. If it is no safetensors file, drop the file from the page cache and open it once more."""
    with path.open("rb"):
        pass  # safetensors calls every file that it cannot open a missing one
    try:
        return safe_open(path, "pt")
    except SafetensorError:
        reads.uncache(path)
        return safe_open(path, "pt")
