"""What a learner saved is what any other learner reads, or an error names the file."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from keel.checkpoint import CheckpointError
from keel.errors import NotFinite
from keel.learner import sharded_checkpoint
from whole_learner import SHAPES, Whole, written


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_checkpoint, "BLOCK_BYTES", 100)


def test_blocks_are_full_and_a_large_tensor_is_alone() -> None:
    assert list(sharded_checkpoint.blocks(SHAPES).values()) == [["weight/a", "exp_avg/a"], ["weight/b.c"], ["weight/d"]]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_share_the_writing_and_nothing_is_lost(tmp_path: Path, ranks: int) -> None:
    saved, other = Whole(0, adam_steps=9), Whole(1)
    written(tmp_path, saved, ranks)
    blocks = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [name for block in blocks for name in block] and len(blocks) == 3
    assert all(torch.equal(tensor, saved.tensors[name]) for block in blocks for name, tensor in block.items())
    assert sharded_checkpoint.read(tmp_path, other) == 7
    assert other.adam_steps == 9 and all(torch.equal(other.tensors[name], saved.tensors[name]) for name in SHAPES)


def test_a_rank_writes_no_block_of_another(tmp_path: Path) -> None:
    sharded_checkpoint.write_blocks(tmp_path, Whole(0), 1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["block-00001.safetensors"]


def change(file: str, how: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        how(tensors)
        save_file(tensors, folder / file)

    return damage


def reindex(**values: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


LAST = "block-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "index.json: .*No such file"),
    "cut index": (lambda folder: (folder / "index.json").write_text('{"format": 1,'), "index.json: "),
    "format": (reindex(format=2), "index.json: format 2; expected 1"),
    "no block": (lambda folder: (folder / LAST).unlink(), f"{LAST}: .*No such file"),
    "cut block": (lambda folder: (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-1]), f"{LAST}: "),
    "no tensor": (change(LAST, lambda block: block.pop("weight/d")), f"{LAST}: weight/d is missing"),
    "shape": (
        change(LAST, lambda block: block.update({"weight/d": torch.zeros(3)})),
        r"d is F32 \[3\]; expected F32 \[2\]",
    ),
    "type": (
        change(LAST, lambda block: block.update({"weight/d": torch.zeros(2).half()})),
        r"d is F16 \[2\]; expected F32",
    ),
    "unknown": (
        reindex(blocks={"block-00000.safetensors": [*SHAPES, "weight/e"]}),
        "index.json: 1 tensors do not fit the learner, for instance weight/e is none of the learner's",
    ),
    "lost": (
        reindex(blocks={"block-00000.safetensors": ["weight/a"]}),
        "index.json: 3 tensors do not fit the learner, for instance exp_avg/a is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_changes_nothing(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(written(tmp_path, Whole(0)))
    other, before = Whole(1, adam_steps=3), Whole(1)
    with pytest.raises(CheckpointError, match=message) as caught:
        sharded_checkpoint.read(tmp_path, other)
    assert str(caught.value).startswith(str(tmp_path))
    assert other.adam_steps == 3 and all(torch.equal(other.tensors[name], before.tensors[name]) for name in SHAPES)


def test_a_refusal_survives_the_way_between_processes() -> None:
    error = NotFinite("step 3: the loss is nan")
    error.weights_moved = True
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, FloatingPointError) and str(copy) == "step 3: the loss is nan" and copy.weights_moved
