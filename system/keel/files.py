"""Files that are whole or absent: write aside, fsync, rename.

What a marker vouches for (COMMIT, stage.json, a line of a manifest) is on the disk before the marker is: files, their
folders, the marker, the folder of the marker. What a run has no more use for, and nothing replaced yet, is moved into
`.aside/` of the run directory.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from keel.errors import ConfigError, KeelError
from keel.reads import check_length, confirmed, entries, is_there, naming_a_failed_read, read

ASIDE = ".aside"
_ASIDE_BYTES = 2**26
"""Size limit of a JSON-lines file in `.aside/`: its oldest lines are deleted beyond this."""


class DiskFull(KeelError, OSError):
    """There is no space left for a file of the run."""


def write(path: Path, content: Any) -> None:
    """Put bytes at a path so that a reader sees the old file, no file, or all of it. Raises DiskFull."""
    aside = path.with_name(f".{path.name}.tmp")
    with naming_a_full_disk(path):
        if not path.parent.is_dir():
            make_folder(path.parent)
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)  # it would take the space that is missing
            raise
        aside.rename(path)
        sync(path.parent)


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Raise DiskFull with the path, and what is free there, in place of the library's own error."""
    try:
        yield
    except Exception as error:  # safetensors and torch have their own classes for it: the text is what they share
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(text in str(error) for text in ("No space left on device", "Disk quota exceeded")):
            raise
        free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
        raise DiskFull(f"{path}: no space left ({free} bytes free there); make room, then keel resume") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line, in place of a last line that a crash cut off."""
    new = not is_there(path)
    if not new and not _ends_whole(path):
        os.truncate(path, read(path).rfind(b"\n") + 1)
    with naming_a_full_disk(path), path.open("a", encoding="utf8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line cut off by a crash is not one of them. Missing file: none."""
    if not is_there(path):
        return []
    text = read(path).decode("utf8")
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _ends_whole(path: Path) -> bool:
    with naming_a_failed_read(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        end = file.read()
    check_length(path, len(end), min(size, 1))
    return end in (b"", b"\n")


def sound_lines(path: Path, fields: Mapping[str, type]) -> tuple[list[dict[str, Any]], list[int]]:
    """Lines of a JSON-lines file with fields of these types, and the numbers (from 1) of damaged lines.

    The end of the file without a newline was cut off by a crash: it is neither.
    """
    parsed = [line for _, line in _lines(path, fields)]
    return [line for line in parsed if line], [number for number, line in enumerate(parsed, 1) if not line]


def _lines(path: Path, fields: Mapping[str, type]) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The bytes of every whole line with their parsed JSON; None where a line is damaged."""

    def look() -> list[tuple[bytes, dict[str, Any] | None]]:
        content = read(path) if is_there(path) else b""
        return [(text, _parse(text, fields)) for text in content.split(b"\n")[:-1]]

    def grown(first: list[Any], second: list[Any]) -> bool:
        return second[: len(first)] == first  # a live run appends

    return confirmed(path, look, lambda lines: all(line for _, line in lines), same=grown)


def _parse(text: bytes, fields: Mapping[str, type]) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode())
    except ValueError:  # also of the decoding
        return None
    typed = isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in fields.items())
    return line if typed else None


def keep_steps(path: Path, last_step: int, aside: Path | None = None) -> list[str]:
    """Cut a JSON-lines file back to the lines of steps up to `last_step`: what a resumed run has really done.

    Lines that are cut or damaged go into a file of the folder `aside` (`.aside/` beside it). Returns the names of the
    damaged ones.
    """
    if not is_there(path):
        return []
    lines = _lines(path, {"step": int})
    kept = [line is not None and line["step"] <= last_step for _, line in lines]
    cut = b"".join(text + b"\n" for (text, _), keep in zip(lines, kept, strict=True) if not keep)
    if cut:
        _append_aside((aside or path.parent / ASIDE) / path.name, cut)
    content = b"".join(text + b"\n" for (text, _), keep in zip(lines, kept, strict=True) if keep)
    if cut or not _ends_whole(path):
        write(path, content)
    return [f"{path.name} line {number}" for number, (_, line) in enumerate(lines, 1) if not line]


def _append_aside(aside: Path, lines: bytes) -> None:
    earlier = read(aside) if is_there(aside) else b""
    if len(earlier) > _ASIDE_BYTES:
        earlier = earlier[earlier.index(b"\n", -_ASIDE_BYTES) + 1 :]
    write(aside, earlier + lines)


def move_aside(run_directory: Path, path: Path) -> None:
    """Put a file of a run into its `.aside/`, in place of an earlier one of its name. Readers do not look there."""
    aside = run_directory / ASIDE / path.relative_to(run_directory)
    make_folder(aside.parent)
    try:
        path.rename(aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        write(aside, read(path))  # a folder of the run may be a link to another disk
        path.unlink()
    sync(aside.parent)
    sync(path.parent)


def replace_folder(aside: Path, target: Path) -> None:
    """Put a folder at a path once all of it is on the disk, in place of the one that was there."""
    sync_tree(aside)
    swap_folder(aside, target)


def swap_folder(aside: Path, target: Path) -> None:
    """Put a folder that is on the disk at a path; the one that was there is moved away first and removed last."""
    bring_back(target)
    old = _moved_away(target)
    if is_there(target):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    aside.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def bring_back(target: Path) -> None:
    """Undo what an interrupted `swap_folder` did: a folder that was moved away, and not replaced, is back."""
    old = _moved_away(target)
    if is_there(old) and not is_there(target):
        old.rename(target)
        sync(target.parent)


def _moved_away(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def lock(directory: Path) -> IO[str]:
    """Hold a directory until the file is closed or the process ends. Raises ConfigError where another holds it."""
    file = (directory / "lock").open("a", encoding="utf8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"run.directory={directory}: another process works on it; let that end first") from None
    return file


def held(directory: Path) -> bool:
    """Whether a process has the `lock` of a directory. It is taken and given back within the call."""
    path = directory / "lock"
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def digest_of(content: Any) -> str:
    """xxh3-128 of a bytes-like object."""
    return xxhash.xxh3_128_hexdigest(memoryview(content))


def digest(path: Path, expected: str | None = None) -> str:
    """xxh3-128 of a file, read in pieces; one that is not the expected is made again, from the disk."""
    return confirmed(path, lambda: _digest(path), lambda actual: expected in (None, actual))


def _digest(path: Path) -> str:
    hasher, length = xxhash.xxh3_128(), 0
    with naming_a_failed_read(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while block := file.read(1 << 24):
            hasher.update(block)
            length += len(block)
    check_length(path, length, size)
    return hasher.hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder and those above it; the entry of each, and of one that was there, is on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for made in [path, *missing[1:]]:
        with contextlib.suppress(PermissionError):  # a folder above the run's may be closed to its owner
            sync(made.parent)


def sync_tree(folder: Path) -> None:
    """Have every file below a folder, and every folder, on the disk; or one file."""
    for path in entries(folder) if folder.is_dir() else []:
        sync_tree(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk."""
    try:
        descriptor = os.open(path, os.O_RDWR)  # some network file systems write out only what is open for writing
    except (PermissionError, IsADirectoryError):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
