"""Read files that a decision depends on: whole, or an error.

A failed read proves nothing about the file. Damage is content that is wrong twice, and alike.
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
    """An existing file or folder could not be read. Its content is unknown, so no decision may follow from it."""


def read(path: Path) -> bytes:
    """Read a whole file. Raises FileNotFoundError where there is none, else ReadFailed: never returns a part."""
    with naming_a_failed_read(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read()
    check_length(path, len(content), size)
    return content


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises ValueError where two reads agree that it is no JSON, and what `read` raises."""
    return json.loads(confirmed(path, lambda: read(path), _is_json))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def confirmed(
    path: Path,
    look: Callable[[], Seen],
    sound: Callable[[Seen], bool],
    same: Callable[[Seen, Seen], bool] | None = None,
) -> Seen:
    """Look at a file, and again past the page cache where it is not sound; ReadFailed where two such looks differ."""
    first = look()
    if sound(first):
        return first
    uncache(path)
    second = look()
    if not sound(second) and not (same(first, second) if same else first == second):
        raise ReadFailed(errno.EIO, "it reads differently each time; it was left as it is", str(path))
    return second


def uncache(path: Path) -> None:
    """Drop a file from the page cache, where the system supports it, so that the next read comes from the disk."""
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
    """Whether the file or folder exists. Raises ReadFailed where that cannot be determined."""
    missing, inside_a_file = contextlib.suppress(FileNotFoundError), contextlib.suppress(NotADirectoryError)
    with missing, naming_a_failed_read(path), inside_a_file:
        path.stat()
        return True
    return False


def entries(folder: Path) -> list[Path]:
    """List a folder by name; empty where it does not exist. Raises ReadFailed for one that cannot be listed."""
    with contextlib.suppress(FileNotFoundError), naming_a_failed_read(folder):
        return [folder / name for name in sorted(os.listdir(folder))]
    return []


def files(folder: Path) -> list[Path]:
    """Every file below a folder, by its path; for a file, itself. Raises ReadFailed."""
    return [file for path in entries(folder) for file in files(path)] if folder.is_dir() else [folder]
