"""In which order a checkpoint comes and goes: at every place where a process may end, a reader sees only whole ones."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes import settings_for
from keel import checkpoint, files, references
from keel.checkpoint import CheckpointError


class Killed(BaseException):
    """The process ends here: nothing of the code under test may catch it."""


def made(run: Path, step: int) -> Path:
    aside = checkpoint.begin(run, step)
    for name in ("policy", "learner"):
        (aside / name).mkdir()
        (aside / name / "weights").write_bytes(bytes([step % 256]) * 50)
    return checkpoint.commit(aside, {"version": step})


def damage(path: Path) -> None:
    (path / "learner" / "weights").write_bytes(b"other")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- damaged ones


@pytest.mark.parametrize("bad", [[], [4], [3, 4], [1, 4], [1], [2], [1, 2, 3]])
def test_damaged_newer_ones_are_put_aside_and_older_ones_left_alone(tmp_path: Path, bad: list[int]) -> None:
    paths = {step: made(tmp_path, step) for step in (1, 2, 3, 4)}
    for step in bad:
        damage(paths[step])
    newest = max(set(paths) - set(bad))
    path, state, damaged = checkpoint.newest_intact(tmp_path)
    assert (path, state) == (paths[newest], {"version": newest})
    newer = [step for step in bad if step > newest]
    assert [name.split(":")[0] for name in damaged] == [paths[step].name for step in sorted(newer, reverse=True)]
    assert names(tmp_path) == sorted(
        [paths[step].name for step in paths if step <= newest] + [f"damaged-{paths[step].name}" for step in newer]
    )
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.newest_intact(tmp_path) == (path, state, [])  # said once


def test_a_damaged_newest_one_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    """Step 8 is damaged, the run continues from 4 and commits 6: with one kept, 6 is the one, and 8 stays to look at."""
    made(tmp_path, 4)
    damage(made(tmp_path, 8))
    path, _, _ = checkpoint.newest_intact(tmp_path)
    assert path is not None and path.name == "step-000004"
    six = made(tmp_path, 6)
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.committed(tmp_path) == [six] and checkpoint.latest(tmp_path) == six
    assert checkpoint.newest_intact(tmp_path)[0] == six
    assert names(tmp_path) == ["damaged-step-000008", "step-000006"]


def test_a_second_damaged_one_of_a_step_takes_the_place_of_the_first(tmp_path: Path) -> None:
    made(tmp_path, 1)
    for content in (b"first", b"second"):
        (made(tmp_path, 2) / "policy" / "weights").write_bytes(content)
        checkpoint.newest_intact(tmp_path)
    assert (tmp_path / "checkpoints" / "damaged-step-000002" / "policy" / "weights").read_bytes() == b"second"


def test_none_intact_is_refused_and_none_at_all_is_a_fresh_run(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path) == (None, None, [])
    for step in (1, 2):
        damage(made(tmp_path, step))
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=r"no intact checkpoint: step-000002: 1 files .*; step-000001: 1 files"):
        checkpoint.newest_intact(tmp_path)
    assert names(tmp_path) == before


# ---- ends of the process


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Every removal, rename and write of a file counts; the process ends before number `after`. The log of all."""
    log: list[str] = []

    def counting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if len(log) >= after:
                raise Killed
            log.append(f"{what} {Path(str(arguments[0])).name}")
            return function(*arguments, **options)

        return run

    for module, name in itertools.product([os], ["unlink", "rename", "replace", "rmdir"]):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    monkeypatch.setattr(files, "write", counting("write", files.write))
    return log


def until_it_comes_through(
    start: Callable[[Path], Any], work: Callable[[Path], Any], check: Callable[[Path], Any], root: Path
) -> list[str]:
    """Let the work end at each of its places, each time on a folder of its own; what it does when it is not ended."""
    for after in range(200):
        run = root / str(after)
        run.mkdir(parents=True)
        start(run)
        with pytest.MonkeyPatch.context() as patch:
            log = dying(patch, after)
            try:
                work(run)
            except Killed:
                ended = True
            else:
                ended = False
        check(run)
        if not ended:
            return log
    raise AssertionError("it never came through")


def test_pruning_that_breaks_off_leaves_no_half_checkpoint_to_a_reader(tmp_path: Path) -> None:
    def check(run: Path) -> None:
        whole = checkpoint.committed(run)
        assert [path.name for path in whole[-2:]] == ["step-000003", "step-000004"]
        for path in whole:
            checkpoint.check(path)  # whatever a reader is shown is what was written
        checkpoint.prune(run, keep=2)
        assert names(run) == ["step-000003", "step-000004"]  # what was left is cleared up

    def prune(run: Path) -> None:
        checkpoint.prune(run, keep=2)

    log = until_it_comes_through(lambda run: [made(run, step) for step in (1, 2, 3, 4)], prune, check, tmp_path)
    assert log.count("unlink COMMIT") == 2 and len(log) > 10


def test_a_commit_that_breaks_off_is_none_and_the_one_before_stays(tmp_path: Path) -> None:
    def check(run: Path) -> None:
        path, state, damaged = checkpoint.newest_intact(run)
        assert path is not None and state is not None and damaged == []
        assert state["version"] in (1, 2) and (path.name == "step-000002") == (state["version"] == 2)
        made(run, 2)
        assert checkpoint.latest(run) == run / "checkpoints" / "step-000002"

    log = until_it_comes_through(lambda run: made(run, 1), lambda run: made(run, 2), check, tmp_path)
    written = [entry.removeprefix("write ") for entry in log if entry.startswith("write ")]
    assert written == ["state.json", "MANIFEST.json", "COMMIT"]
    moves = [number for number, entry in enumerate(log) if ".step-000002.tmp" in entry]
    assert moves and min(moves) > log.index("write COMMIT")


def test_the_state_lies_among_the_files_that_the_manifest_vouches_for(tmp_path: Path) -> None:
    path = made(tmp_path, 3)
    digests = json.loads((path / "MANIFEST.json").read_text())["files"]
    assert set(digests) == {"state.json", "policy/weights", "learner/weights"}
    (path / "state.json").write_text('{"version": 4}')
    with pytest.raises(CheckpointError, match=r"1 files are missing or changed, for instance state\.json"):
        checkpoint.read_state(path)


@pytest.mark.parametrize("content", ["", "{", '{"other": {}}', None])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, content: str | None) -> None:
    path = made(tmp_path, 3)
    if content is None:
        (path / "MANIFEST.json").unlink()
    else:
        (path / "MANIFEST.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^step-000003: "):
        checkpoint.check(path)


# ---- which ones there are


def test_steps_are_numbers_in_order_of_their_size(tmp_path: Path) -> None:
    for step in (9, 10, 100, 99, 999_999):
        made(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [9, 10, 99, 100, 999_999]
    assert [path.name for path in checkpoint.committed(tmp_path)] == [
        *("step-000009", "step-000010", "step-000099", "step-000100", "step-999999")
    ]
    assert checkpoint.state_of(tmp_path, 99) == {"version": 99}
    checkpoint.prune(tmp_path, keep=3)
    assert checkpoint.steps(tmp_path) == [99, 100, 999_999]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7])
def test_as_many_are_kept_as_are_asked_for(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3, 4):
        made(tmp_path, step)
    checkpoint.prune(tmp_path, keep)
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4][-keep:]


def test_a_checkpoint_begun_again_is_empty_and_hidden(tmp_path: Path) -> None:
    aside = checkpoint.begin(tmp_path, 5)
    (aside / "rest").write_text("of a killed process")
    assert checkpoint.begin(tmp_path, 5) == aside and list(aside.iterdir()) == []
    assert aside.name.startswith(".") and checkpoint.committed(tmp_path) == []


def folders(tmp_path: Path, *names: str) -> Path:
    for file in names:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path


def test_the_model_of_a_folder(tmp_path: Path) -> None:
    """A model folder is itself even beside config.yaml; a stage's model counts once the stage is finished."""
    plain = folders(tmp_path / "plain", "config.json", "config.yaml")
    assert checkpoint.trained(plain) == plain
    nothing = folders(tmp_path / "nothing", "other")
    assert checkpoint.trained(nothing) == nothing
    stage = folders(tmp_path / "stage", "config.yaml", "model/config.json", "stage.json")
    assert checkpoint.trained(stage) == stage / "model"
    (stage / "stage.json").unlink()
    assert checkpoint.trained(stage) == stage
    run = folders(tmp_path / "run", "config.yaml")
    assert checkpoint.trained(run) == run
    made(run, 3)
    assert checkpoint.trained(run) == run / "checkpoints" / "step-000003" / "policy"


# ---- references of iterations


def previous(every: int) -> Any:
    return settings_for(reference={"ref_policy": "previous", "iteration_steps": every})


@pytest.mark.parametrize(
    ("every", "version", "step"),
    [(2, 0, None), (2, 1, None), (2, 2, 2), (2, 3, 2), (2, 4, 4), (3, 2, None), (3, 5, 3), (3, 9, 9)],
)
def test_the_reference_of_a_version_is_that_of_the_last_full_iteration(
    tmp_path: Path, every: int, version: int, step: int | None
) -> None:
    result = references.of_version(tmp_path, previous(every).reference_iteration_steps, version)
    assert result == (None if step is None else tmp_path / "references" / f"step-{step:06d}")


def test_without_iterations_the_reference_is_the_initial_one(tmp_path: Path) -> None:
    assert references.of_version(tmp_path, None, 7) is None
    assert settings_for().reference_iteration_steps is None
    assert settings_for(reference=None).reference_iteration_steps is None


def referred(run: Path, step: int, content: bytes = b"x") -> Path:
    folder = references.folder_of(run, step)
    aside = references.begin(folder)
    aside.mkdir()
    (aside / "weights").write_bytes(content)
    references.commit(folder)
    return folder


def test_a_reference_is_whole_or_absent_and_replaces_what_was_there(tmp_path: Path) -> None:
    folder = references.folder_of(tmp_path, 4)
    aside = references.begin(folder)
    assert not aside.exists() and not folder.exists()
    aside.mkdir()
    (aside / "half").write_bytes(b"x")
    assert not references.begin(folder).exists()  # of a process that was killed
    assert referred(tmp_path, 4, b"first") == folder
    referred(tmp_path, 4, b"second")
    checkpoint.check(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-000004"]
    assert (folder / "weights").read_bytes() == b"second"
    (folder / "weights").write_bytes(b"third")
    with pytest.raises(CheckpointError, match="step-000004: 1 files are missing or changed, for instance weights"):
        checkpoint.check(folder)


@pytest.mark.parametrize(("oldest", "kept"), [(0, [2, 4, 6]), (2, [2, 4, 6]), (3, [2, 4, 6]), (4, [4, 6]), (7, [6])])
def test_references_go_that_no_checkpoint_starts_with(tmp_path: Path, oldest: int, kept: list[int]) -> None:
    for step in (2, 4, 6):
        referred(tmp_path, step)
    references.prune(tmp_path, 2, oldest)
    assert [int(path.name[-6:]) for path in sorted((tmp_path / "references").iterdir())] == kept


def test_a_run_without_references_has_none_to_prune(tmp_path: Path) -> None:
    references.prune(tmp_path, 2, 6)
    referred(tmp_path, 2)
    references.prune(tmp_path, None, 6)
    assert references.folder_of(tmp_path, 2).is_dir()
    shutil.rmtree(tmp_path / "references")
