"""Checkpoints that exist only when they are whole: written aside, digested, COMMIT last, renamed.

checkpoints/step-000010/    policy/  learner/  state.json  MANIFEST.json  COMMIT

This file knows folders and digests. What they hold is decided by online/checkpointer.py (state.json) and by
learner/policy_learner.py `save` (policy/, learner/); learner/sharded_checkpoint.py is the format of learner/.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from keel import files, reads, recorded_commits
from keel.errors import ConfigError, KeelError

_MANIFEST, _COMMIT, _STAGE = "MANIFEST.json", "COMMIT", "stage.json"
_DAMAGED, ROLLED_BACK = "damaged-", "rolled-back-"
_STEP = re.compile(r"step-(\d+)")
_ASIDE = re.compile(rf"(?:{_DAMAGED}|{ROLLED_BACK})step-(\d+)")


class CheckpointError(KeelError, RuntimeError):
    """A checkpoint whose files are not those its manifest names."""


def begin(run_directory: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; a reader never looks at it."""
    aside = run_directory / "checkpoints" / f".step-{step:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    files.make_folder(aside)
    return aside


def commit(aside: Path, state: Mapping[str, Any]) -> Path:
    """Make the folder a checkpoint: state, manifest with digests of what is on the disk, COMMIT, rename."""
    files.write_json(aside / "state.json", state)
    seal(aside)
    files.write(aside / _COMMIT, b"")
    target = aside.with_name(aside.name.removeprefix(".").removesuffix(".tmp"))
    files.swap_folder(aside, target)
    files.sync(target.parent.parent)  # an interrupted start may have made checkpoints/ and no more
    return target


def seal(folder: Path, names: Iterable[str] = (), manifest: str = _MANIFEST) -> None:
    """Have all files of a folder, or those under these names in it, on the disk, then a manifest of their digests."""
    for path in [folder / name for name in names] or [folder]:
        files.sync_tree(path)
    files.write_json(folder / manifest, {"files": digests(folder, names)})


def latest(run_directory: Path) -> Path | None:
    """The newest committed checkpoint; None when there is none."""
    checkpoints = committed(run_directory)
    return checkpoints[-1] if checkpoints else None


def committed(run_directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return [folder_of(run_directory, step) for step in steps(run_directory)]


def trained(folder: Path) -> Path:
    """The model of a run directory: a stage's, or the policy of the newest checkpoint; any other folder is itself."""
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return folder
    if (folder / "model").is_dir() and (folder / _STAGE).is_file():  # of a finished stage
        return folder / "model"
    newest = latest(folder)
    return newest / "policy" if newest else folder


def stage(directory: Path) -> dict[str, Any] | None:
    """Read stage.json of a finished stage, None before its end. Raises ConfigError where a file is not as written."""
    path = directory / _STAGE
    if not reads.is_there(path):
        return None
    try:
        if reads.is_there(directory / _MANIFEST):
            check(directory)
        return reads.read_json(path)
    except (CheckpointError, ValueError) as error:
        raise ConfigError(
            f"run.directory={directory}: finished, by {_STAGE}, but not as it was written: {error}; expected what"
            f" {_MANIFEST} names, or another run.name to run it again"
        ) from None


def check_model(folder: Path) -> None:
    """The model in a run directory is what was written there. Raises CheckpointError.

    A stage's model lies beside stage.json, a member of an ensemble one deeper, a policy beside COMMIT; a manifest
    beside these names its files. Any other model has none that would tell.
    """
    folder = folder.resolve()
    for top in (folder, *folder.parents[:2]):
        marked = reads.is_there(top / _STAGE) or reads.is_there(top / _COMMIT)
        if (top.parent.name == "references" if top == folder else marked) and reads.is_there(top / _MANIFEST):
            check(top, below="" if top == folder else f"{folder.relative_to(top)}/")


def folder_of(run_directory: Path, step: int) -> Path:
    return run_directory / "checkpoints" / f"step-{step:06d}"


def steps(run_directory: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first. Raises ReadFailed: a listing that failed is not none."""
    named = {path: _STEP.fullmatch(path.name) for path in reads.entries(run_directory / "checkpoints")}
    return sorted(int(name[1]) for path, name in named.items() if name and reads.is_there(path / _COMMIT))


def lost(run_directory: Path) -> tuple[int, str] | None:
    """The newest commit that other files of the run know of, and which of them, where it is neither there nor aside."""
    known, source = recorded_commits.newest_known(run_directory)
    if known <= max(steps(run_directory), default=0) or reads.is_there(run_directory / _STAGE):
        return None  # in this order: a live run commits meanwhile; a finished stage has deleted its own
    names = [path.name for path in reads.entries(run_directory / "checkpoints")]
    aside = [_ASIDE.fullmatch(name) for name in names]
    return None if any(int(name[1]) >= known for name in aside if name) else (known, source)


def check_known(run_directory: Path) -> None:
    """Raise ConfigError unless the newest commit that the run's own files know of is there, or was put aside."""
    if missing := lost(run_directory):
        known, source = missing
        raise ConfigError(
            f"run.directory={run_directory}: {source} knows of a commit at step {known}, which checkpoints/ does not"
            " hold; expected it where it was (a link, a mount, a moved folder?), or another run.name to begin again; to"
            f" go on without it: mkdir -p {run_directory}/checkpoints/{_DAMAGED}step-{known:06d}"
        )


def newest_intact(run_directory: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, its state, and the names of damaged newer ones.

    Those are put aside as `damaged-step-N`. Raises CheckpointError when there are checkpoints and none is intact,
    ConfigError when one that the run knows of is gone, ReadFailed when it cannot be said: then nothing has changed.
    """
    check_known(run_directory)
    damaged: list[str] = []
    for path in reversed(committed(run_directory)):
        try:
            state = read_state(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        put_aside(run_directory, int(path.name.removeprefix("step-")), _DAMAGED)
        return path, state, damaged
    if damaged:
        raise CheckpointError(
            f"no intact checkpoint: {'; '.join(damaged)}; expected copies of them, or another run.name to begin again"
        )
    return None, None, []


def put_aside(run_directory: Path, last_step: int, prefix: str) -> None:
    """Rename the checkpoints of later steps, so that they count no longer."""
    for step in steps(run_directory):
        if step > last_step:
            path = folder_of(run_directory, step)
            aside = path.with_name(f"{prefix}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            files.sync(path.parent)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, after every file was checked against the manifest. Raises CheckpointError."""
    check(path)
    digest, state = _files(path / _MANIFEST)["state.json"], path / "state.json"
    return json.loads(reads.confirmed(state, lambda: reads.read(state), lambda read: files.digest_of(read) == digest))


def check(folder: Path, manifest: str = _MANIFEST, below: str = "") -> None:
    """Every file that a manifest names, or those below a path in it, is there as it was. Raises CheckpointError."""
    try:
        wrong = reads.confirmed(folder / manifest, lambda: _wrong(folder, manifest, below), lambda wrong: not wrong)
    except (FileNotFoundError, ValueError) as error:  # torn or missing
        raise CheckpointError(f"{folder.name}: its manifest cannot be read ({error})") from error
    if wrong:
        raise CheckpointError(f"{folder.name}: {len(wrong)} files are missing or changed, for instance {wrong[0]}")


def _wrong(folder: Path, manifest: str, below: str) -> list[str]:
    named = sorted(_files(folder / manifest).items())
    return [name for name, digest in named if name.startswith(below) and not _is_intact(folder / name, digest)]


def _files(manifest: Path) -> dict[str, str]:
    """Digests by name. Raises ValueError for a manifest that has none."""
    tree = reads.read_json(manifest)
    digest_by_name = tree.get("files") if isinstance(tree, dict) else None
    if not isinstance(digest_by_name, dict):
        raise ValueError("it names no files")
    return digest_by_name


def _is_intact(path: Path, expected: str) -> bool:
    try:
        return files.digest(path, expected) == expected
    except FileNotFoundError:
        return False


def state_of(run_directory: Path, step: int) -> dict[str, Any]:
    """state.json of a committed checkpoint, the other files unseen."""
    return reads.read_json(folder_of(run_directory, step) / "state.json")


def best_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The best evaluation that a checkpoint's state knows of; None without a monitor."""
    return state.get("guard", {}).get("best")


def best(run_directory: Path) -> dict[str, Any] | None:
    """The best evaluation that the newest checkpoint knows of: step, reward, mean, standard_error, rows, folder.

    `folder`: the policy of its checkpoint; null where the best is step 0, which has none.
    """
    committed_steps = steps(run_directory)
    known = best_of(state_of(run_directory, committed_steps[-1])) if committed_steps else None
    if known is None:
        return None
    folder = folder_of(run_directory, known["step"]) / "policy" if known["step"] in committed_steps else None
    return {**known, "folder": None if folder is None else str(folder)}


def run_of_best(path: Path) -> Path | None:
    """The run directory where a path is RUN_DIR/best, the name of its best policy; None for any other path."""
    return (
        path.parent if path.name == "best" and not path.exists() and (path.parent / "config.yaml").is_file() else None
    )


def best_line(known: Mapping[str, Any]) -> str:
    """The best evaluation in words: step, monitor with its standard error, where the policy lies."""
    value = f"{known['mean']:+.3f} +- {known['standard_error']:.3f} (standard error, {known['rows']} prompts)"
    place = known["folder"] or ("the policy it started from" if known["step"] == 0 else "no checkpoint of it is there")
    return f"step {known['step']}, {known['reward']} {value}: {place}"


def kept(run_directory: Path, keep: int) -> list[int]:
    """Steps of the newest checkpoints, and of the best that each of them knows of: a damaged one may be put aside."""
    newest = steps(run_directory)[-keep:]
    bests = [best_of(state_of(run_directory, step)) for step in newest]
    return sorted({*newest, *(known["step"] for known in bests if known)} & set(steps(run_directory)))


def prune(run_directory: Path, keep: int) -> None:
    """Delete all but the newest checkpoints and the best, and what an earlier deletion left."""
    for path in reads.entries(run_directory / "checkpoints"):
        if _STEP.fullmatch(path.name) and not reads.is_there(path / _COMMIT):
            shutil.rmtree(path)
    spared = [folder_of(run_directory, step) for step in kept(run_directory, keep)]
    for path in [path for path in committed(run_directory) if path not in spared]:
        (path / _COMMIT).unlink()  # from here on it does not exist for a reader
        files.sync(path)  # nor after a power cut
        shutil.rmtree(path)


def digests(folder: Path, names: Iterable[str] = ()) -> dict[str, str]:
    """xxh3-128 of every file, or those under these names, but the manifest and the marker."""
    places = [folder / name for name in names] or [folder]
    named = {str(path.relative_to(folder)): path for place in places for path in reads.files(place)}
    return {name: files.digest(named[name]) for name in sorted(named) if name not in (_MANIFEST, _COMMIT)}
