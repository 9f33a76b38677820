"""A read that failed says nothing of a file: no checkpoint, segment or line is given up for it. What is wrong is."""

import asyncio
import errno
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from disks import FAILURES, failing, failing_call, flipped, tree_of
from keel import checkpoint, files, reads, references, schema
from keel.analysis import verify
from keel.cli import main
from keel.errors import ConfigError
from keel.learner import loading, sharded_checkpoint, tiny
from keel.reads import ReadFailed
from keel.rollout import segments
from keel.rollout.buffer import RolloutBuffer
from keel.stages import offline_loop
from keel.stages import policy as policy_stage
from offline_runs import FakeOfflineLearner, Run, offline_run_of
from runs import Writer, scored, settings
from whole_learner import Whole
from whole_learner import written as write_state


def restored(directory: Path) -> list[str]:
    """What a buffer that starts on the directory takes for damaged."""
    buffer = RolloutBuffer(directory, groups_per_step=2, groups_per_batch=1, max_staleness=0, version=5, taken=10)
    return list(asyncio.run(buffer.restored())["damaged"])


def audited(directory: Path) -> None:
    report = verify.check(directory)
    assert report.findings == (), report.findings


def learner(directory: Path) -> None:
    sharded_checkpoint.read(directory / "state", Whole(1))


def located(directory: Path) -> None:
    loading.locate(str(directory / "stage"), "policy.model")


def log_probs(directory: Path) -> None:
    assert policy_stage._kept(directory / "cache" / "a.arrow") is not None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that is read: an online run, a reference, a learner's state, a finished stage, a cache."""
    directory = tmp_path_factory.mktemp("made") / "run"
    Writer(directory, settings(0)).train()
    folder = references.folder_of(directory, 4)
    references.begin(folder).mkdir()
    (folder.with_name(".step-000004.tmp") / "model.safetensors").write_bytes(b"weights" * 99)
    references.commit(folder)
    rows = asyncio.run(_accept(directory))
    write_state(directory / "state", Whole(0))
    _finish_stage(directory / "stage")
    (directory / "stage" / "config.yaml").write_text("{}\n")
    policy_stage._keep(directory / "cache" / "a.arrow", schema.to_bytes(rows))
    return directory


async def _accept(directory: Path) -> pa.RecordBatch:
    """One more batch behind what was trained."""
    state = checkpoint.state_of(directory, 5)["buffer"]
    buffer = RolloutBuffer(directory, groups_per_step=2, groups_per_batch=1, max_staleness=0, **state)
    tickets = await buffer.admit()
    rows = scored(tickets, 5)
    await buffer.add(tickets, rows)
    return rows


def _finish_stage(directory: Path) -> None:
    directory.mkdir()
    run = Run(offline_run_of(directory, steps=2, checkpoints=1), FakeOfflineLearner([3, 2, 1]))
    state = asyncio.run(run.finish())
    shutil.rmtree(run.plan.model)
    tiny.write(run.plan.model)
    offline_loop.finish(run.plan, "sft", 0.0, trained_steps=state.version)


def unmade(steps: list[str]) -> Callable[[Path], None]:
    """Lines cut back to their own last step: nothing is cut."""

    def cut(directory: Path) -> None:
        for name in steps:
            assert files.keep_steps(directory / name, 5) == []

    return cut


NEWEST = "checkpoints/step-000005"
READERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "newest_intact": (
        checkpoint.newest_intact,
        [f"{NEWEST}/{name}" for name in ("MANIFEST.json", "state.json", "policy/model.safetensors", "learner/state")]
        + ["metrics.jsonl", "rollouts/MANIFEST.jsonl"],
    ),
    "buffer": (restored, [".arrow", "rollouts/MANIFEST.jsonl"]),
    "reference": (
        lambda directory: checkpoint.check(references.folder_of(directory, 4)),
        ["references/step-000004/model.safetensors", "references/step-000004/MANIFEST.json"],
    ),
    "learner": (learner, ["state/index.json"]),
    "verify": (
        audited,
        ["metrics.jsonl", "rollouts/MANIFEST.jsonl", "rollouts/step-000003.arrow", f"{NEWEST}/state.json"]
        + [f"{NEWEST}/learner/state", "evaluations/step-000002.arrow", "frontier.arrow", ".arrow"],
    ),
    "finished": (
        lambda directory: offline_loop.finished(directory / "stage"),
        ["stage/stage.json", "stage/MANIFEST.json", "stage/model/config.json", "stage/model/model.safetensors"],
    ),
    "located": (located, ["stage/MANIFEST.json", "stage/model/model.safetensors"]),
    "log-probs": (log_probs, ["cache/a.arrow", "cache/a.json"]),
    "lines": (unmade(["metrics.jsonl", "rollouts/MANIFEST.jsonl"]), ["metrics.jsonl", "rollouts/MANIFEST.jsonl"]),
}
CASES = [(reader, file) for reader, (_, names) in READERS.items() for file in names]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("reader", "file"), CASES)
def test_a_failed_read_is_an_error_and_changes_nothing(made: Path, reader: str, file: str, failure: str) -> None:
    read, before = READERS[reader][0], tree_of(made)
    with failing(file, FAILURES[failure]) as hits, pytest.raises(ReadFailed, match=rf".*{file}.*") as caught:
        read(made)
    assert hits() == 1 and "\n" not in str(caught.value)
    assert tree_of(made) == before
    read(made)  # nothing was given up


@pytest.mark.parametrize(("reader", "file"), CASES)
def test_what_reads_wrongly_once_is_not_damaged(made: Path, reader: str, file: str) -> None:
    """The second look is taken at the disk, and it is the one that counts."""
    read, before = READERS[reader][0], tree_of(made)
    with failing(file, flipped) as hits:
        result = read(made)
    assert hits() == 1 and tree_of(made) == before
    if reader == "newest_intact":
        assert result[0] == made / NEWEST and result[2] == []
    if reader == "buffer":
        assert result == []


LISTS = [
    ("newest_intact", "listdir", "checkpoints"),
    ("newest_intact", "stat", "step-000005/COMMIT"),
    ("newest_intact", "stat", "metrics.jsonl"),
    ("buffer", "listdir", "buffer"),
    ("verify", "listdir", "checkpoints"),
    ("verify", "listdir", "buffer"),
    ("finished", "stat", "stage/stage.json"),
]


@pytest.mark.parametrize(("reader", "call", "name"), LISTS)
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_not_empty(
    made: Path, reader: str, call: str, name: str, number: int
) -> None:
    read, before = READERS[reader][0], tree_of(made)
    with failing_call(call, name, number), pytest.raises(ReadFailed, match=name):
        read(made)
    assert tree_of(made) == before


@pytest.mark.parametrize("reader", ["newest_intact", "buffer", "reference", "learner", "verify", "finished"])
def test_a_process_without_a_descriptor_left_gives_nothing_up(made: Path, reader: str) -> None:
    """Really without: also what is not Python's own code finds none."""
    read, before = READERS[reader][0], tree_of(made)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(made, os.O_RDONLY)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        with pytest.raises(OSError, match="Too many open files") as caught:
            if reader == "buffer":
                segments.read(segments.paths(made)[0])  # a loop of its own would need descriptors, too
            else:
                read(made)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert str(made) in str(caught.value) and tree_of(made) == before


def test_a_block_without_a_descriptor_is_not_a_missing_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors calls every file that it cannot open a missing one."""
    block = next(path for path in sorted((made / "state").iterdir()) if path.suffix == ".safetensors")
    with failing(block.name, FAILURES["EMFILE"]), pytest.raises(ReadFailed, match="Too many open files"):
        learner(made)


def test_a_file_that_reads_differently_each_time_is_an_error(tmp_path: Path) -> None:
    """Nothing is known of it: it may be sound."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    looks = iter([b"a", b"b"])
    with pytest.raises(ReadFailed, match="reads differently each time"):
        reads.confirmed(path, lambda: next(looks), lambda result: result == b"content")
    assert reads.confirmed(path, lambda: b"a", lambda result: result == b"content") == b"a"


def copied(made: Path, target: Path) -> Path:
    shutil.copytree(made, target)
    return target


def test_what_is_really_damaged_is_moved_aside(made: Path, tmp_path: Path) -> None:
    run = copied(made, tmp_path / "run")
    (segment,) = segments.paths(run)
    content = segment.read_bytes()[:-1]
    segment.write_bytes(content)
    assert restored(run) == [segment.name]
    assert segments.paths(run) == [] and (run / ".aside" / "buffer" / segment.name).read_bytes() == content
    segments.forget(run, before_ticket=99)  # its tickets were trained since
    assert not (run / ".aside" / "buffer" / segment.name).exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_finished_stage_whose_model_is_not_whole_is_neither_finished_nor_read(
    made: Path, tmp_path: Path, damage: str, file: str
) -> None:
    stage = copied(made, tmp_path / "run") / "stage"
    path = stage / "model" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"" if damage == "empty" else content[:-1])
    message = rf"1 files are missing or changed, for instance model/{file}"
    with pytest.raises(ConfigError, match=rf"run.directory={stage}: finished, by stage.json, but.*{message}"):
        offline_loop.finished(stage)
    if (file, damage) == ("config.json", "gone"):
        message = "no config.json in it"
    for model in (stage, stage / "model"):
        with pytest.raises(ConfigError, match=rf"policy.model={model}: .*{message}"):
            loading.locate(str(model), "policy.model")


def test_a_policy_of_a_checkpoint_and_a_reference_are_read_only_as_they_were_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny.write(checkpoint.begin(run, 3) / "policy")
    policy = checkpoint.commit(run / "checkpoints" / ".step-000003.tmp", {"version": 3}) / "policy"
    reference = references.folder_of(run, 3)
    tiny.write(references.begin(reference))
    references.commit(reference)
    for folder in (policy, reference):
        assert loading.locate(str(folder), "policy.model") == folder
        with (folder / "tokenizer.json").open("a") as file:
            file.write("\n")
        with pytest.raises(ConfigError, match=r"1 files are missing or changed, for instance .*tokenizer.json"):
            loading.locate(str(folder), "policy.model")
        copy = shutil.copytree(folder, tmp_path / f"copy-{folder.name}", ignore=shutil.ignore_patterns("MANIFEST.json"))
        assert loading.locate(str(copy), "policy.model") == copy


def test_a_failed_read_ends_a_command_with_one_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with failing("state.json", FAILURES["EIO"]), pytest.raises(ReadFailed, match="Input/output error") as caught:
        checkpoint.newest_intact(made)
    error = pickle.loads(pickle.dumps(caught.value))  # as it comes from a learner rank or the buffer
    with pytest.raises(SystemExit, match=r"^1$"):
        main._fail_run(error)
    path = made / NEWEST / "state.json"
    assert (
        capsys.readouterr().err == f"keel: ReadFailed: [Errno 5] Input/output error; it was left as it is: '{path}'\n"
    )
