"""A checkpoint exists when it is whole, and what it holds is what was put in."""

import json
from pathlib import Path

import pytest
import xxhash

from keel import checkpoint
from keel.checkpoint import CheckpointError


def made(run: Path, step: int) -> Path:
    aside = checkpoint.begin(run, step)
    (aside / "policy").mkdir()
    (aside / "policy" / "weights").write_bytes(bytes([step]) * 100)
    return checkpoint.commit(aside, {"version": step})


def test_only_a_committed_folder_exists(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    first = made(tmp_path, 1)
    checkpoint.begin(tmp_path, 2)  # a crash while writing the second
    assert checkpoint.latest(tmp_path) == first
    second = made(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == second
    (second / "COMMIT").unlink()
    assert checkpoint.latest(tmp_path) == first
    assert checkpoint.read_state(first) == {"version": 1}


@pytest.mark.parametrize("name", ["policy/weights", "state.json"])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str, name: str) -> None:
    path = made(tmp_path, 1)
    file = path / name
    if damage == "change":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=f"1 files are missing or changed, for instance {name}"):
        checkpoint.read_state(path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    paths = [made(tmp_path, step) for step in (1, 2, 10, 11)]
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.committed(tmp_path) == paths[2:]
    assert not paths[0].exists()


def test_pruning_fewer_than_are_kept_deletes_nothing_and_leftovers_do_not_count(tmp_path: Path) -> None:
    paths = [made(tmp_path, step) for step in (1, 2)]
    (made(tmp_path, 3) / "COMMIT").unlink()
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.committed(tmp_path) == paths
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.committed(tmp_path) == paths[1:]
    assert checkpoint.read_state(paths[1]) == {"version": 2}


def test_a_step_is_done_again_from_an_empty_folder(tmp_path: Path) -> None:
    """A run killed while writing step 1 and one resumed before it: neither leaves files in the new checkpoint."""
    (checkpoint.begin(tmp_path, 1) / "half").write_bytes(b"x")
    first = made(tmp_path, 1)
    (first / "later").write_bytes(b"x")
    second = made(tmp_path, 1)
    assert first == second
    files = {str(path.relative_to(second)) for path in second.rglob("*") if path.is_file()}
    assert files == {"policy/weights", "state.json", "MANIFEST.json", "COMMIT"}
    assert [path.name for path in second.parent.iterdir()] == ["step-000001"]


def test_the_manifest_has_the_digest_of_every_file(tmp_path: Path) -> None:
    path = made(tmp_path, 7)
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    expected = {
        name: xxhash.xxh3_128_hexdigest((path / name).read_bytes()) for name in ("policy/weights", "state.json")
    }
    assert files == expected
