"""Files that are whole or absent, also while somebody reads them or the process that writes them dies."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from keel import files
from keel.errors import ConfigError
from keel.files import DiskFull


def test_a_file_and_its_folder_appear_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    files.write(path, b"one")
    files.write(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert [item.name for item in path.parent.iterdir()] == ["file"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """Two contents of 2 MB take turns; every read in between is one of them, whole."""
    path, contents = tmp_path / "file", [b"a" * 2_000_000, b"b" * 2_000_000]
    files.write(path, contents[0])
    done, seen = threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(1, 21):
        files.write(path, contents[turn % 2])
    done.set()
    reader.join(timeout=20)
    assert seen and seen <= set(contents)


def test_a_killed_writer_leaves_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write(path, b"0" * 500_000)
    code = """
import sys
from pathlib import Path
from keel import files
sys.stdout.write("ready"); sys.stdout.flush()
while True:
    for digit in b"123456789":
        files.write(Path(sys.argv[1]), bytes([digit]) * 500_000)
"""
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.read(5) == b"ready"
    while path.read_bytes()[:1] == b"0":
        assert writer.poll() is None
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    content = path.read_bytes()
    assert len(content) == 500_000 and set(content) == {content[0]}
    files.write(path, b"next")  # what the dead writer left aside is no obstacle
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write(path, b"old")
    with pytest.raises(TypeError, match="bytes-like"):
        files.write(path, "text")
    assert path.read_bytes() == b"old"


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    files.write_json(first, {"b": 1, "a": {"d": [1, None], "c": "ü"}})
    files.write_json(second, {"a": {"c": "ü", "d": [1, None]}, "b": 1})
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text()) == {"a": {"c": "ü", "d": [1, None]}, "b": 1}


LINES = [{"step": 1, "text": "line\nbreak \u2028 ü"}, {"step": 2, "loss": -1.5e-9}, {"step": 3, "text": '"'}]


def written(path: Path) -> Path:
    for line in LINES:
        files.append_json(path, line)
    return path


def test_json_lines_come_back_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path / "lines.jsonl")
    assert files.read_json_lines(path) == LINES
    assert len(path.read_bytes().splitlines()) == 3
    assert files.read_json_lines(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_line_cut_off_anywhere_is_no_line(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "lines.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    assert files.read_json_lines(path) == LINES[:2]
    path.write_bytes(path.read_bytes()[:5])
    assert files.read_json_lines(path) == []


@pytest.mark.parametrize("last", [0, 1, 2, 3, 9])
def test_keep_steps_cuts_back_and_lets_appends_go_on(tmp_path: Path, last: int) -> None:
    path = written(tmp_path / "lines.jsonl")
    path.write_text(path.read_text() + '{"step": 4, "re')  # the run was killed here
    files.keep_steps(path, last)
    assert files.read_json_lines(path) == LINES[:last]
    files.append_json(path, {"step": last + 1})
    assert files.read_json_lines(path) == [*LINES[:last], {"step": last + 1}]


def test_keep_steps_makes_no_file(tmp_path: Path) -> None:
    files.keep_steps(tmp_path / "absent.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_with_the_file_and_what_is_free(tmp_path: Path) -> None:
    path = tmp_path / "buffer" / "rows.arrow"
    named = pytest.raises(
        DiskFull, match=rf"{path}: no space left \(\d+ bytes free there\); make room, then keel resume"
    )
    with named, files.naming_a_full_disk(path), open("/dev/full", "w", buffering=1) as full:
        full.write("a line that does not fit\n")


def test_a_full_disk_is_known_by_its_text_where_a_library_has_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="weights: no space left"), files.naming_a_full_disk(tmp_path / "weights"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="another"), files.naming_a_full_disk(tmp_path / "weights"):
        raise RuntimeError("another error")


def test_what_did_not_fit_takes_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files.write(tmp_path / "state", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="state: no space left"):
        files.write(tmp_path / "state", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == b"old"


def test_a_directory_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    code = f"import sys, time; from pathlib import Path; from keel import files; held = files.lock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match="another process works on it"):
        files.lock(tmp_path)
    other.kill()
    other.wait()
    other.stdout.close()
    files.lock(tmp_path).close()


def test_damaged_lines_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2\xff}\n{"stop": 3}\n{"step": 4}\n{"step": 5}\n{"st')
    assert files.keep_steps(path, 4) == ["metrics.jsonl line 2", "metrics.jsonl line 3"]
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'
