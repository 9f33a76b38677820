"""Checkpoints that exist only when they are whole: written aside, digested, COMMIT last, renamed.

checkpoints/step-000010/    policy/  learner/  state.json  MANIFEST.json  COMMIT
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel import durable


class CheckpointError(RuntimeError):
    """A checkpoint whose files are not those its manifest names."""


def begin(run_directory: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; a reader never looks at it."""
    aside = run_directory / "checkpoints" / f".step-{step:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, state: Mapping[str, Any]) -> Path:
    """Make the folder a checkpoint: state, manifest with digests, COMMIT, rename."""
    durable.write_json(aside / "state.json", state)
    durable.write_json(aside / "MANIFEST.json", {"files": digests(aside)})
    durable.write(aside / "COMMIT", b"")
    target = aside.with_name(aside.name.removeprefix(".").removesuffix(".tmp"))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    durable.sync_directory(target.parent)
    return target


def latest(run_directory: Path) -> Path | None:
    """The newest committed checkpoint; None when there is none."""
    found = committed(run_directory)
    return found[-1] if found else None


def committed(run_directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return [folder_of(run_directory, step) for step in steps(run_directory)]


def trained(folder: Path) -> Path:
    """The model of a run directory: a stage's, or the policy of the newest checkpoint; any other folder is itself."""
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return folder
    if (folder / "model").is_dir() and (folder / "stage.json").is_file():  # of a finished stage
        return folder / "model"
    newest = latest(folder)
    return newest / "policy" if newest else folder


def folder_of(run_directory: Path, step: int) -> Path:
    return run_directory / "checkpoints" / f"step-{step:06d}"


def steps(run_directory: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    found = (path.parent.name for path in (run_directory / "checkpoints").glob("step-*/COMMIT"))
    return sorted(int(name.removeprefix("step-")) for name in found)


def newest_intact(run_directory: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, its state, and the names of damaged newer ones.

    Those are put aside as `damaged-step-N`. Raises CheckpointError when there are checkpoints and none is intact.
    """
    damaged: list[str] = []
    for path in reversed(committed(run_directory)):
        try:
            state = read_state(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        _put_aside(run_directory, newer_than=path)
        return path, state, damaged
    if damaged:
        raise CheckpointError(f"no intact checkpoint: {'; '.join(damaged)}; without checkpoints/ the run starts anew")
    return None, None, []


def _put_aside(run_directory: Path, newer_than: Path) -> None:
    for path in committed(run_directory):
        if path.name > newer_than.name:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, after every file was checked against the manifest. Raises CheckpointError."""
    check(path)
    return json.loads((path / "state.json").read_text())


def check(path: Path) -> None:
    """Every file of a folder is the one that its manifest names. Raises CheckpointError."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())["files"]
        found = digests(path)
        wrong = sorted(name for name in manifest if found.get(name) != manifest[name])
    except (OSError, ValueError, KeyError) as error:  # a torn or missing manifest
        raise CheckpointError(f"{path.name}: its manifest cannot be read ({error})") from error
    if wrong:
        raise CheckpointError(f"{path.name}: {len(wrong)} files are missing or changed, for instance {wrong[0]}")


def state_of(run_directory: Path, step: int) -> dict[str, Any]:
    """state.json of a committed checkpoint, the other files unseen."""
    return json.loads((folder_of(run_directory, step) / "state.json").read_text())


def prune(run_directory: Path, keep: int) -> None:
    """Delete all but the newest checkpoints, and what an earlier deletion left."""
    for path in (run_directory / "checkpoints").glob("step-*"):
        if not (path / "COMMIT").exists():
            shutil.rmtree(path)
    for path in committed(run_directory)[:-keep]:
        (path / "COMMIT").unlink()  # from here on it does not exist for a reader
        shutil.rmtree(path)


def digests(folder: Path) -> dict[str, str]:
    """xxh3-128 of every file but the manifest and the marker."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): durable.digest(path)
        for path in files
        if path.name not in ("MANIFEST.json", "COMMIT")
    }
