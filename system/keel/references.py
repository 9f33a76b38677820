"""Reference policies of iterations: with reference.ref_policy=previous a resumed run reads that of its iteration.

RUN_DIR/references/step-000010/    the policy after step 10, Hugging Face layout; whole or absent
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from keel import checkpoint, files, reads


def folder_of(run_directory: Path, step: int) -> Path:
    return run_directory / "references" / f"step-{step:06d}"


def begin(folder: Path) -> Path:
    """Where to write a reference before it counts: a path that does not exist yet."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    files.make_folder(aside.parent)
    return aside


def commit(folder: Path) -> None:
    """Make what was written aside the reference of its step, in place of what an interrupted run left there."""
    aside = folder.with_name(f".{folder.name}.tmp")
    checkpoint.seal(aside)
    files.swap_folder(aside, folder)


def of_version(run_directory: Path, every_steps: int | None, version: int) -> Path | None:
    """The reference in force from a version on, renewed every `every_steps` steps; None: the initial one."""
    step = version // every_steps * every_steps if every_steps else 0
    return folder_of(run_directory, step) if step else None


def prune(run_directory: Path, every_steps: int | None, oldest_version: int, kept: Iterable[int] = ()) -> None:
    """Delete references that no checkpoint from this version on, and none of the `kept` versions, would start with."""
    oldest = of_version(run_directory, every_steps, oldest_version)
    spared = [of_version(run_directory, every_steps, version) for version in kept]
    for folder in reads.entries(run_directory / "references"):
        obsolete = oldest is not None and folder.name.startswith("step-") and folder.name < oldest.name
        if obsolete and folder not in spared:
            shutil.rmtree(folder)
