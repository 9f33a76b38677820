"""Reads of files that a decision hangs on: whole, or an error.

A read that failed says nothing of the file. Damage is what reads wrongly twice, and alike.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from keel.errors import KeelError

Seen = TypeVar("Seen")


class ReadFailed(KeelError, OSError):
    """A file or folder that is there could not be read. What it holds is unknown, so nothing may follow from it."""


def read(path: Path) -> bytes:
    """All of a file. Raises FileNotFoundError where there is none, else ReadFailed: never a part of it."""
    with naming_a_failed_read(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read()
    check_length(path, len(content), size)
    return content


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises ValueError where it twice reads as none, and what `read` does."""
    return json.loads(settled(path, lambda: read(path), _is_json))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def settled(
    path: Path,
    look: Callable[[], Seen],
    sound: Callable[[Seen], bool],
    same: Callable[[Seen, Seen], bool] | None = None,
) -> Seen:
    """What a look at a file shows; what is not sound is looked at once more, past the cache.

    Only what is twice wrong, and alike, is damage: raises ReadFailed where two wrong looks differ.
    """
    first = look()
    if sound(first):
        return first
    uncache(path)
    second = look()
    if not sound(second) and not (same(first, second) if same else first == second):
        raise ReadFailed(errno.EIO, "it reads differently each time; it was left as it is", str(path))
    return second


def uncache(path: Path) -> None:
    """Have the next read of a file come from the disk, where the system can be asked for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(FileNotFoundError), naming_a_failed_read(path), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def naming_a_failed_read(path: Path) -> Iterator[None]:
    """Raise ReadFailed with the path in place of an error of the system; a missing file stays one."""
    try:
        yield
    except (FileNotFoundError, ReadFailed):
        raise
    except OSError as error:
        raise ReadFailed(error.errno, f"{error.strerror or error}; it was left as it is", str(path)) from error


def check_length(path: Path, length: int, size: int) -> None:
    if length < size:
        raise ReadFailed(errno.EIO, f"{length} of its {size} bytes were read; it was left as it is", str(path))


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder. Raises ReadFailed where that cannot be said."""
    try:
        with naming_a_failed_read(path), contextlib.suppress(NotADirectoryError):
            path.stat()
            return True
    except FileNotFoundError:
        pass
    return False


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name; nothing where there is none. Raises ReadFailed: that is no empty folder."""
    try:
        with naming_a_failed_read(folder):
            return [folder / name for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []


def files(folder: Path) -> list[Path]:
    """Every file below a folder, by its path; of a file, itself. Raises ReadFailed."""
    return [file for path in entries(folder) for file in files(path)] if folder.is_dir() else [folder]
