"""Disks that fail at one read, and what a folder holds."""

import builtins
import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Failure = Callable[[Any], Any]
"""What becomes of a file that was opened to be read."""


def tree_of(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by its path; links as they are."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


class _Opened:
    """A file that reads as it is told."""

    def __init__(self, file: Any, read: Callable[..., Any]) -> None:
        self._file, self._read = file, read

    def read(self, *size: int) -> Any:
        return self._read(self._file, *size)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def not_opened(number: int) -> Failure:
    """No descriptor, no memory: the file cannot be opened."""

    def fail(file: Any) -> Any:
        file.close()
        raise OSError(number, os.strerror(number))

    return fail


def not_read(file: Any) -> Any:
    def read(_: Any, *__: int) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return _Opened(file, read)


def cut_short(file: Any) -> Any:
    """Reads end before the file does."""
    size = os.fstat(file.fileno()).st_size
    return _Opened(file, lambda real, *_: real.read(size // 2 - real.tell()) if real.tell() < size // 2 else b"")


def flipped(file: Any) -> Any:
    """One bit of what is read is another."""

    def read(real: Any, *size: int) -> Any:
        content = real.read(*size)
        if isinstance(content, str) or not content:
            return content
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    return _Opened(file, read)


FAILURES: dict[str, Failure] = {
    "EMFILE": not_opened(errno.EMFILE),
    "ENFILE": not_opened(errno.ENFILE),
    "ENOMEM": not_opened(errno.ENOMEM),
    "EACCES": not_opened(errno.EACCES),
    "EIO": not_read,
    "short": cut_short,
}


@contextlib.contextmanager
def failing(name: str, failure: Failure, times: int = 1) -> Iterator[Callable[[], int]]:
    """The first times that a file whose path ends with `name` is opened to be read, this becomes of it.

    The function that is yielded says how often it did.
    """
    hits, real = 0, io.open

    def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        nonlocal hits
        file = real(path, mode, *arguments, **options)
        if mode not in ("r", "rb") or not str(path).endswith(name) or hits == times:
            return file
        hits += 1
        return failure(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield lambda: hits


@contextlib.contextmanager
def failing_call(call: str, name: str, number: int = errno.EIO) -> Iterator[None]:
    """os.listdir, os.scandir or os.stat of a path that ends with `name` fails once."""
    real, failed = getattr(os, call), False

    def once(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        nonlocal failed
        if not failed and isinstance(path, str | os.PathLike) and str(path).endswith(name):
            failed = True
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, once)
        yield
        assert failed, f"{call} was not called"
