"""Files that are whole or absent: write aside, fsync, rename."""

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

from keel.config import ConfigError


class DiskFull(OSError):
    """There is no space left for a file of the run."""


def write(path: Path, content: Any) -> None:
    """Put bytes at a path so that a reader sees the old file, no file, or all of it. Raises DiskFull."""
    aside = path.with_name(f".{path.name}.tmp")
    with naming_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)  # it would take the space that is missing
            raise
        aside.rename(path)
        sync_directory(path.parent)


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
    if path.exists() and not _ends_whole(path):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with naming_a_full_disk(path), path.open("a", encoding="utf8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line cut off by a crash is not one of them. Missing file: none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf8")
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def sound_lines(path: Path, fields: Mapping[str, type]) -> tuple[list[dict[str, Any]], list[int]]:
    """Lines of a JSON-lines file with fields of these types, and the numbers (from 1) of lines that are none.

    The end of the file without a newline was cut off by a crash: it is neither.
    """
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    parsed = [_parse(text, fields) for text in whole]
    return [line for line in parsed if line], [number for number, line in enumerate(parsed, 1) if not line]


def _parse(text: bytes, fields: Mapping[str, type]) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode())
    except ValueError:  # also of the decoding
        return None
    typed = isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in fields.items())
    return line if typed else None


def keep_steps(path: Path, last_step: int) -> list[str]:
    """Cut a JSON-lines file back to the lines of steps up to `last_step`: what a resumed run has really done.

    Lines that are damaged are left out; their names.
    """
    lines, damaged = sound_lines(path, {"step": int})
    if path.exists():
        write(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= last_step).encode())
    return [f"{path.name} line {number}" for number in damaged]


def replace_folder(aside: Path, target: Path) -> None:
    """Put a folder at a path; the one that was there is moved away first and removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def lock(directory: Path) -> IO[str]:
    """Hold a directory for this process until the file is closed or the process ends, however it does.

    Raises ConfigError when another process holds it.
    """
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


def digest(path: Path) -> str:
    """xxh3-128 of a file, read in pieces."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
