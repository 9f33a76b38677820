"""Files that are whole or absent, also while somebody reads them or the process that writes them dies."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from keel import durable


def test_a_file_and_its_folder_appear_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    durable.write(path, b"one")
    durable.write(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """Two contents of 2 MB take turns; every read in between is one of them, whole."""
    path, contents = tmp_path / "file", [b"a" * 2_000_000, b"b" * 2_000_000]
    durable.write(path, contents[0])
    done, seen = threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(1, 21):
        durable.write(path, contents[turn % 2])
    done.set()
    reader.join(timeout=20)
    assert seen and seen <= set(contents)


def test_a_killed_writer_leaves_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write(path, b"0" * 500_000)
    code = """
import sys
from pathlib import Path
from keel import durable
sys.stdout.write("ready"); sys.stdout.flush()
while True:
    for digit in b"123456789":
        durable.write(Path(sys.argv[1]), bytes([digit]) * 500_000)
"""
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.read(5) == b"ready"
    while path.read_bytes()[:1] == b"0":
        assert writer.poll() is None
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    content = path.read_bytes()
    assert len(content) == 500_000 and set(content) == {content[0]}
    durable.write(path, b"next")  # what the dead writer left aside is no obstacle
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write(path, b"old")
    with pytest.raises(TypeError):
        durable.write(path, "text")
    assert path.read_bytes() == b"old"


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    durable.write_json(first, {"b": 1, "a": {"d": [1, None], "c": "ü"}})
    durable.write_json(second, {"a": {"c": "ü", "d": [1, None]}, "b": 1})
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text()) == {"a": {"c": "ü", "d": [1, None]}, "b": 1}


LINES = [{"step": 1, "text": "line\nbreak \u2028 ü"}, {"step": 2, "loss": -1.5e-9}, {"step": 3, "text": '"'}]


def written(path: Path) -> Path:
    for line in LINES:
        durable.append_json(path, line)
    return path


def test_json_lines_come_back_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path / "lines.jsonl")
    assert durable.read_json_lines(path) == LINES
    assert len(path.read_bytes().splitlines()) == 3
    assert durable.read_json_lines(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_line_cut_off_anywhere_is_no_line(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "lines.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    assert durable.read_json_lines(path) == LINES[:2]
    path.write_bytes(path.read_bytes()[:5])
    assert durable.read_json_lines(path) == []


@pytest.mark.parametrize("last", [0, 1, 2, 3, 9])
def test_keep_steps_cuts_back_and_lets_appends_go_on(tmp_path: Path, last: int) -> None:
    path = written(tmp_path / "lines.jsonl")
    path.write_text(path.read_text() + '{"step": 4, "re')  # the run was killed here
    durable.keep_steps(path, last)
    assert durable.read_json_lines(path) == LINES[:last]
    durable.append_json(path, {"step": last + 1})
    assert durable.read_json_lines(path) == [*LINES[:last], {"step": last + 1}]


def test_keep_steps_makes_no_file(tmp_path: Path) -> None:
    durable.keep_steps(tmp_path / "absent.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
