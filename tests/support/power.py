"""Power cuts: what a disk holds of a folder at any moment of a program that works in it.

JOURNALLED: every name is as the program left it, of a file only what was synced (an unsynced file is empty), as on
ext4 and xfs. LETTER: a folder, too, has only the names it had when it was synced last, which is all that POSIX
promises.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

Model = Literal["journalled", "letter"]
MODELS: tuple[Model, ...] = ("journalled", "letter")
_CHANGES = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate")
Names = dict[str, tuple[int, bool]]
"""Of a folder: name -> inode, whether it is a folder."""


@dataclass(frozen=True)
class Moment:
    """The disk just before an operation."""

    operation: str
    names: dict[int, Names]
    """Of every folder, as the program sees it."""
    synced_names: dict[int, Names]
    synced: dict[int, bytes]
    """Content by inode."""
    promised: Any
    """What the program had been told by then."""


class Disk:
    """A folder whose every moment is kept while a program works in it; `promise` says what was promised so far."""

    def __init__(self, root: Path, promise: Callable[[], Any] = lambda: None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.promise = root, promise
        self.moments: list[Moment] = []
        self._synced_names: dict[int, Names] = {}
        self._synced: dict[int, bytes] = {}
        self._held: dict[int, int] = {}  # open descriptors: an inode that is held is given to no other file

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in _CHANGES:
                patch.setattr(os, name, self._before(name, getattr(os, name)))
            try:
                yield
                self._keep("the end")
            finally:
                for descriptor in self._held.values():
                    os.close(descriptor)

    def _before(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._keep(f"{name} {arguments[0]}")
            result = real(*arguments, **options)
            if name == "fsync":
                self._sync(arguments[0])
            return result

        return call

    def _keep(self, operation: str) -> None:
        names = {os.stat(folder).st_ino: _names(folder) for folder, _, _ in os.walk(self.root)}
        synced_names = {inode: dict(held) for inode, held in self._synced_names.items()}
        self.moments.append(Moment(operation, names, synced_names, dict(self._synced), self.promise()))

    def _sync(self, descriptor: int) -> None:
        status, path = os.fstat(descriptor), f"/proc/self/fd/{descriptor}"
        if status.st_ino not in self._held:
            self._held[status.st_ino] = os.dup(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._synced_names[status.st_ino] = _names(path)
        else:
            self._synced[status.st_ino] = Path(path).read_bytes()

    def after_a_cut(self, moment: Moment, model: Model, target: Path) -> Path:
        """The folder as it is found when the power is back."""
        shutil.rmtree(target, ignore_errors=True)
        known = moment.names if model == "journalled" else moment.synced_names
        _put(os.stat(self.root).st_ino, target, known, moment.synced)
        return target


def _names(folder: str) -> Names:
    with os.scandir(folder) as outcome:
        return {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in outcome}


def _put(inode: int, target: Path, names: dict[int, Names], synced: dict[int, bytes]) -> None:
    target.mkdir()
    for name, (child, is_folder) in names.get(inode, {}).items():
        if is_folder:
            _put(child, target / name, names, synced)
        else:
            (target / name).write_bytes(synced.get(child, b""))
