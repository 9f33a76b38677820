"""A run whose commits are gone is refused in one line, and nothing of it changes; what is undone is moved aside."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.dataset
import pytest

from disks import tree_of
from keel import checkpoint, files, recorded_commits, schema
from keel.analysis import verify
from keel.config import loader
from keel.errors import ConfigError
from keel.observability.metrics import RunMetrics
from keel.online import preflight, train
from keel.online.preflight import Prepared
from keel.online.recorder import Recorder
from keel.rollout import manifest as rollout_manifest
from keel.stages import offline_loop
from offline_runs import FakeOfflineLearner, Killed, Run, offline_run_of
from quiet_display import Quiet
from runs import Writer, settings


def dangling(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("nowhere")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def newest_gone(folder: Path) -> None:
    shutil.rmtree(sorted(folder.iterdir())[-1])


def marker_gone(folder: Path) -> None:
    (sorted(folder.iterdir())[-1] / "COMMIT").unlink()


HELD_OUT = [9, 8, 7, 6, 5, 4, 3]
BY = settings(0, checkpoint={"every_steps": 2, "keep": 3})
LOSSES = [dangling, empty, moved, newest_gone, marker_gone]
SOURCES = ["events.jsonl", "metrics.jsonl", "rollouts/MANIFEST.jsonl"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of five steps and a bit: commits at 2 and 4, and rows of step 5."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    writer = Writer(directory, BY)
    writer.train()
    shutil.rmtree(checkpoint.folder_of(directory, 5))
    for step in (2, 4):
        files.append_json(directory / "events.jsonl", {"event": "checkpoint", "time": 0.0, "step": step})
    assert checkpoint.steps(directory) == [2, 4]
    return directory


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def recorder_of(run: Path) -> Recorder:
    prepared = SimpleNamespace(settings=BY, directory=run)
    return Recorder(cast(Prepared, prepared), RunMetrics("test", run / "metrics.jsonl"), Quiet())


def from_preflight(run: Path) -> None:
    settings_of_run = BY.model_copy(update={"run": BY.run.model_copy(update={"directory": str(run)})})
    files.write(run / "config.yaml", loader.dump(settings_of_run).encode())
    before = tree_of(run)
    try:
        preflight.check_directory(run, settings_of_run)
    finally:
        assert tree_of(run) == before


WAYS: dict[str, Callable[[Path], Any]] = {
    "preflight of train and resume": from_preflight,
    "recovery": lambda run: train._newest(recorder_of(run)),
    "start": lambda run: train._run_alone(cast(Prepared, recorder_of(run).prepared), Quiet(), cast(Any, None)),
    "newest_intact": checkpoint.newest_intact,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_whose_commits_are_gone_is_refused(
    run: Path, lose: Callable[[Path], None], source: str, way: str
) -> None:
    """Each of the files alone knows of the commit."""
    lose(run / "checkpoints")
    for other in set(SOURCES) - {source}:
        (run / other).unlink()
    kept = {name: digest for name, digest in tree_of(run).items() if name != "config.yaml"}
    with pytest.raises(
        ConfigError, match=rf"{source} knows of a commit at step 4, which checkpoints/ does not"
    ) as caught:
        WAYS[way](run)
    assert "\n" not in str(caught.value) and f"mkdir -p {run}/checkpoints/damaged-step-000004" in str(caught.value)
    assert {name: digest for name, digest in tree_of(run).items() if name != "config.yaml"} == kept


def test_verify_says_that_a_commit_is_gone(run: Path) -> None:
    moved(run / "checkpoints")
    assert any(
        (finding.file, finding.found) == ("checkpoints", "none") and "step 4, which events.jsonl" in finding.expected
        for finding in verify.check(run).findings
    )


def test_a_run_that_is_sound_is_not_refused(run: Path, tmp_path: Path) -> None:
    assert recorded_commits.newest_known(run) == (4, "events.jsonl") and recorded_commits.newest_known(tmp_path) == (
        0,
        "events.jsonl",
    )
    checkpoint.check_known(tmp_path)  # a new one
    checkpoint.check_known(run)
    shutil.rmtree(checkpoint.folder_of(run, 2))  # pruned
    checkpoint.check_known(run)


@pytest.mark.parametrize("step", [4, 5])
def test_a_commit_that_was_put_aside_is_not_missed(run: Path, step: int) -> None:
    newest_gone(run / "checkpoints")
    (run / "checkpoints" / f"damaged-step-{step:06d}").mkdir()
    path, _, damaged = checkpoint.newest_intact(run)
    assert path == checkpoint.folder_of(run, 2) and damaged == []


def test_a_damaged_commit_is_given_up_for_good(run: Path) -> None:
    """Also when what was put aside has been deleted since."""
    (checkpoint.folder_of(run, 4) / "learner" / "state").write_text("other")
    assert train._newest(recorder_of(run)).version == 2
    rollout_manifest.cut_back(run, 2)  # as the buffer does
    shutil.rmtree(run / "checkpoints" / "damaged-step-000004")
    assert train._newest(recorder_of(run)).version == 2


def test_without_a_sound_commit_a_run_does_not_start_from_the_beginning(run: Path) -> None:
    for step in (2, 4):
        (checkpoint.folder_of(run, step) / "learner" / "state").write_text("other")
    before = tree_of(run)
    with pytest.raises(checkpoint.CheckpointError, match=r"no intact checkpoint: .*expected copies of them"):
        train._newest(recorder_of(run))
    assert tree_of(run) == before


def test_what_is_done_again_is_moved_aside(run: Path) -> None:
    """As the line of the refusal says: from the beginning, and everything that was there can be found."""
    moved(run / "checkpoints")
    (run / "checkpoints" / "damaged-step-000004").mkdir(parents=True)
    metrics, manifest = ((run / name).read_bytes() for name in ("metrics.jsonl", "rollouts/MANIFEST.jsonl"))
    rows = {path.name: path.read_bytes() for path in (run / "rollouts").glob("*.arrow")}
    assert len(rows) == 5
    assert train._newest(recorder_of(run)).version == 0
    rollout_manifest.cut_back(run, 0)
    aside = run / ".aside"
    assert (run / "metrics.jsonl").read_bytes() == b"" and (aside / "metrics.jsonl").read_bytes() == metrics
    assert (aside / "rollouts" / "MANIFEST.jsonl").read_bytes() == manifest
    assert {path.name: path.read_bytes() for path in (aside / "rollouts").glob("*.arrow")} == rows
    assert list((run / "rollouts").glob("*.arrow")) == []


def test_readers_see_nothing_of_what_was_moved_aside(run: Path) -> None:
    rows = schema.from_bytes((run / "rollouts" / "step-000001.arrow").read_bytes()).num_rows
    assert train._newest(recorder_of(run)).version == 4
    assert (run / ".aside" / "rollouts" / "step-000005.arrow").exists()
    assert pyarrow.dataset.dataset(run / "rollouts", format="ipc", exclude_invalid_files=True).count_rows() == 4 * rows
    Writer(run, BY).train()
    assert verify.check(run).findings == ()


def test_a_step_that_is_undone_again_is_kept_once(run: Path) -> None:
    """So what lies aside is bounded by the steps of the run."""
    for content in (b"first", b"second"):
        (run / "rollouts" / "step-000005.arrow").write_bytes(content)
        rollout_manifest.undo(run, 4)
    assert [path.name for path in (run / ".aside" / "rollouts").iterdir()] == ["step-000005.arrow"]
    assert (run / ".aside" / "rollouts" / "step-000005.arrow").read_bytes() == b"second"


def test_lines_that_lie_aside_do_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ASIDE_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    for turn in range(50):
        files.append_json(path, {"step": 2, "turn": turn})
        files.keep_steps(path, 1)
    lines = files.read_json_lines(tmp_path / ".aside" / "metrics.jsonl")
    assert [line["turn"] for line in lines] == list(range(50 - len(lines), 50)) and 3 <= len(lines) <= 6


def test_damaged_lines_are_moved_aside_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step": 2\xff}\n{"step": 3}\n{"st')
    assert files.keep_steps(path, 2) == ["metrics.jsonl line 2"]
    assert path.read_bytes() == b'{"step":1}\n'
    assert (tmp_path / ".aside" / "metrics.jsonl").read_bytes() == b'{"step": 2\xff}\n{"step": 3}\n'


def test_files_of_a_run_on_two_disks_are_moved_aside(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = os.rename, run / "rollouts" / "step-000005.arrow"
    content = path.read_bytes()

    def rename(source: Any, target: Any) -> None:
        if Path(source) == path:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    rollout_manifest.undo(run, 4)
    assert (run / ".aside" / "rollouts" / path.name).read_bytes() == content and not path.exists()


@pytest.mark.parametrize("lose", [dangling, empty, moved], ids=lambda lose: lose.__name__)
@pytest.mark.parametrize("source", ["events.jsonl", "metrics.jsonl"])
async def test_a_stage_whose_commits_are_gone_is_refused(
    tmp_path: Path, lose: Callable[[Path], None], source: str
) -> None:
    plan = offline_run_of(tmp_path / "stage", every=1, checkpoints=2)
    plan.directory.mkdir()
    with pytest.raises(Killed, match="at step 6"):
        await Run(plan, FakeOfflineLearner(HELD_OUT, killed_at=6)).finish()
    lose(plan.directory / "checkpoints")
    (plan.directory / ({"events.jsonl", "metrics.jsonl"} - {source}).pop()).unlink()
    before = tree_of(plan.directory)
    with pytest.raises(ConfigError, match=f"{source} knows of a commit at step 4"):
        await Run(plan, FakeOfflineLearner(HELD_OUT)).finish()
    with pytest.raises(ConfigError, match=f"{source} knows of a commit at step 4"):
        preflight.check_directory(plan.directory, plan.settings)
    assert tree_of(plan.directory) == before


async def test_a_finished_stage_has_no_commits_and_is_not_refused(tmp_path: Path) -> None:
    run = Run(offline_run_of(tmp_path, checkpoints=2), FakeOfflineLearner(HELD_OUT))
    await run.finish()
    done = offline_loop.finish(run.plan, "sft", 0.0)
    assert not (tmp_path / "checkpoints").exists()
    preflight.check_directory(tmp_path, run.plan.settings)
    assert offline_loop.finished(tmp_path) == json.loads(json.dumps(done))


async def test_a_best_model_that_was_moved_away_is_brought_back(tmp_path: Path) -> None:
    """A stage that was killed between the two renames of a replacement."""
    run = Run(offline_run_of(tmp_path, every=1, patience=2, checkpoints=2), FakeOfflineLearner([1, 2, 3, 4, 5, 6, 7]))
    await run.finish()
    run.plan.model.rename(tmp_path / ".model.old")
    again = Run(run.plan, FakeOfflineLearner([1, 2, 3, 4, 5, 6, 7]))
    recorder = offline_loop.OfflineRecorder(run.plan, again.metrics, again.display)
    await offline_loop.restore(run.plan, again.learner, recorder)
    assert again.exported == 0 and not (tmp_path / ".model.old").exists()
