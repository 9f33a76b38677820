"""Files that are whole or absent: write aside, fsync, rename."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash


def write(path: Path, content: Any) -> None:
    """Put bytes at a path so that a reader sees the old file, no file, or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync_directory(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line, in place of a last line that a crash cut off."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a", encoding="utf8") as file:
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


def keep_steps(path: Path, last_step: int) -> None:
    """Cut a JSON-lines file back to the lines of steps up to `last_step`: what a resumed run has really done."""
    lines = [line for line in read_json_lines(path) if line["step"] <= last_step]
    if path.exists():
        write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def replace_folder(aside: Path, target: Path) -> None:
    """Put a folder at a path; the one that was there is moved away first and removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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
