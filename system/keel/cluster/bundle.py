"""Collects what `keel submit` uploads, as one zip: this Keel, the configuration, the user's own modules, local files.

configuration --> module:name, importable here, not installed   itself, and what it imports of that kind
              --> a relative path that exists here              files/, and the setting says so
              --> an absolute path                              nothing: every node of the cluster must see it
"""

import ast
import contextlib
import importlib.util
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import keel
from keel import checkpoint
from keel.config.base import is_source
from keel.errors import ConfigError

PATHS = frozenset({"model", "teacher", "source", "against", "ca_file", "runs"})
"""Names of the settings whose value may be a path that is read. A name of a hub or of a run does not exist as one."""
WRITTEN = frozenset({"directory", "discovery_directory", "tensorboard_directory"})
"""Names of the settings that say where a run writes: none of it may be the job's own folder, which is thrown away."""
_MODELS = frozenset({"model", "teacher", "source", "against"})
_WHEN = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can store: equal files give equal bytes, which Ray uploads once
_BLOCK_BYTES = 2**20
_SHOWN = 3


def check_written(tree: Any, path: str = "") -> None:
    """Refuse relative paths in settings that say where a run writes. Raises ConfigError."""
    for key, value in tree.items() if isinstance(tree, dict) else []:
        setting = f"{path}{key}"
        if key in WRITTEN and isinstance(value, str) and not value.startswith("/"):
            raise ConfigError(
                f"{setting}={value}: relative; expected an absolute path that every node sees, e.g."
                f" {setting}=/shared/runs/{{name}}"
            )
        check_written(value, f"{setting}.")


@dataclass(frozen=True)
class Item:
    """A file, folder or module that is uploaded."""

    label: str
    """The name in messages: `policy.model=models/tiny`."""
    files: Mapping[str, Path]
    """Name in the zip -> file here."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class Bundle:
    """The configuration of a job with the files it needs."""

    tree: dict[str, Any]
    """The configuration, its local paths as they are in the job's working directory."""
    items: list[Item]
    absolute: list[str]
    """Settings, with values, that name places of the cluster."""

    def write(self, archive: Path, configuration: str, limit_bytes: int) -> int:
        """Write the zip with config.yaml in it; its size in bytes. Raises ConfigError when it grows over the limit."""
        files = {name: path for item in self.items for name, path in item.files.items()}
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
            target.writestr(_entry("config.yaml"), configuration)
            for name, path in sorted(files.items()):
                with _readable():
                    source = path.open("rb")
                with source, target.open(_entry(name), "w", force_zip64=True) as into:
                    while block := source.read(_BLOCK_BYTES):
                        into.write(block)
                        self._check(archive, limit_bytes)
        self._check(archive, limit_bytes)
        return archive.stat().st_size

    def _check(self, archive: Path, limit_bytes: int) -> None:
        if archive.stat().st_size >= limit_bytes:
            largest = sorted(self.items, key=lambda item: -item.num_bytes)[:_SHOWN]
            named = ", ".join(f"{item.label} ({megabytes(item.num_bytes)})" for item in largest)
            raise ConfigError(
                f"CONFIG: more to upload than the {megabytes(limit_bytes)} Ray takes, compressed; largest: {named};"
                " expected an absolute path on storage that every node sees"
            )


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; expected files that can be read") from None


@_readable()
def gather(tree: dict[str, Any], here: Path) -> Bundle:
    """Collect the files and modules that a configuration names, from a folder. Raises ConfigError."""
    items = {"keel": package()}
    for name in _modules({value.removeprefix("python:") for _, _, value in _texts(tree)}, here):
        items[f"module {name}"] = Item(f"module {name}", _files_of_module(name, here))
    absolute, names = [], dict[Path, str]()
    changed: dict[str, str] = {}
    for setting, key, value in _texts(tree):
        if key not in PATHS or is_source(value):
            continue
        if value.startswith(("/", "~")):
            absolute.append(f"{setting}={value}")
        elif value and os.path.exists(here / value):  # also for a text too long for a path
            path = (here / value).resolve()
            path = checkpoint.trained(path) if key in _MODELS and path.is_dir() else path
            if path not in names:
                names[path] = _free(path.name, set(names.values()))
                items[setting] = Item(f"{setting}={value}", dict(_files(path, names[path])))
            changed[setting] = names[path]
    return Bundle(_rewritten(tree, changed), list(items.values()), absolute)


def package() -> Item:
    """The item for Keel itself."""
    return Item("keel", dict(_files(Path(keel.__file__).parent, "keel")))


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _WHEN)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return entry


def _free(name: str, taken: set[str]) -> str:
    """files/NAME; files/2/NAME where another path of that name came before."""
    numbered = (f"files/{number}/{name}" for number in range(2, len(taken) + 3))
    return next(path for path in [f"files/{name}", *numbered] if path not in taken)


def _texts(node: Any, setting: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """(setting, its own name, value) of every text; an entry of a list has the list's name."""
    if isinstance(node, str):
        yield setting, key, node
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _texts(child, f"{setting}.{name}" if setting else name, name)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _texts(child, f"{setting}.{index}", key)


def _rewritten(node: Any, changed: Mapping[str, str], setting: str = "") -> Any:
    if isinstance(node, dict):
        return {
            name: _rewritten(child, changed, f"{setting}.{name}" if setting else name) for name, child in node.items()
        }
    if isinstance(node, list):
        return [_rewritten(child, changed, f"{setting}.{index}") for index, child in enumerate(node)]
    return changed.get(setting, node)


def _files(path: Path, name: str, above: frozenset[Path] = frozenset()) -> Iterator[tuple[str, Path]]:
    """List names in the zip and paths of a file or a folder, links followed.

    Left out: hidden files (.git, .env, .venv), what Python compiled, a link to a folder that it lies in.
    """
    if path.is_file():
        yield name, path
    elif path.is_dir() and (place := path.resolve()) not in above:
        for child in sorted(path.iterdir()):
            if not child.name.startswith(".") and child.name != "__pycache__" and child.suffix != ".pyc":
                yield from _files(child, f"{name}/{child.name}", above | {place})


def _modules(values: set[str], here: Path) -> list[str]:
    """Top-level modules that settings name, and those they import, as far as they are the user's own."""
    waiting, modules = sorted({value.partition(".")[0].partition(":")[0] for value in values if is_source(value)}), []
    while waiting:
        name = waiting.pop()
        if name not in modules and _place(name, here) is not None:
            modules.append(name)
            for path in _files_of_module(name, here).values():
                waiting += sorted(_imports(path)) if path.suffix == ".py" else []
    return sorted(modules)


def _place(name: str, here: Path) -> Path | None:
    """Find the file or folder of a user's module; None if it is installed, Python's or Keel's, or does not exist."""
    if name in sys.stdlib_module_names or name in ("keel", "__main__"):
        return None
    # one search, as an import does it: what lies here comes last, behind everything that is installed
    places = [*(place for place in sys.path if place not in ("", str(here))), str(here)]
    spec: ModuleSpec | None = PathFinder.find_spec(name, places) or importlib.util.find_spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    path = Path(folders[0] if folders else spec.origin or "")
    return None if {"site-packages", "dist-packages"} & set(path.parts) else path


def _files_of_module(name: str, here: Path) -> dict[str, Path]:
    place = _place(name, here)
    assert place is not None, name
    return dict(_files(place, name if place.is_dir() else place.name))


def _imports(path: Path) -> set[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:  # the latter of a null byte
        raise ConfigError(f"{path}: {error}; expected a module that can be imported") from None
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    taken = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in plain | taken if name}
