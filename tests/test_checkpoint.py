"""A checkpoint exists when it is whole; files are whole or absent."""

from pathlib import Path

import pytest

from keel import checkpoint, durable
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


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path = made(tmp_path, 1)
    weights = path / "policy" / "weights"
    if damage == "change":
        content = bytearray(weights.read_bytes())
        content[50] ^= 1
        weights.write_bytes(bytes(content))
    else:
        weights.unlink()
    with pytest.raises(CheckpointError, match="policy/weights"):
        checkpoint.read_state(path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    paths = [made(tmp_path, step) for step in (1, 2, 10, 11)]
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.committed(tmp_path) == paths[2:]
    assert not paths[0].exists()


def test_a_line_cut_off_by_a_crash_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert durable.read_json_lines(path) == []
    for step in (1, 2, 3):
        durable.append_json(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4, "re')
    assert [line["step"] for line in durable.read_json_lines(path)] == [1, 2, 3]
    durable.keep_steps(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write(path, b"old")
    with pytest.raises(TypeError):
        durable.write(path, 3)
    assert path.read_bytes() == b"old"
