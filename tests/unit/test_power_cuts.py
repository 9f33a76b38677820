"""Whatever a marker vouches for is whole after a power cut at any moment. The code that writes is the product's own."""

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pyarrow import parquet

import rollouts
from judged_pairs import judged
from judged_pairs import settings_for as labels_for
from keel import checkpoint, files, references, schema
from keel.analysis import verify
from keel.config.run import Settings
from keel.learner import loading
from keel.observability.metrics import RunMetrics
from keel.rollout import segments
from keel.rollout.buffer import RolloutBuffer
from keel.stages import label, offline_loop
from keel.stages import policy as policy_stage
from offline_runs import FakeOfflineLearner, Listener, offline_run_of
from power import MODELS, Disk, Model
from reward_stages import LOSSES, FakeRankGroup, Stage
from runs import Writer, settings

FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Memory, where there is some: fsync is slow on some disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def write_model(folder: Path, content: str) -> None:
    """A model as libraries write it: nothing is synced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(f"{name} {content}")


def model_of(folder: Path) -> str | None:
    """What a model holds; None where its files are not of one model, or not all there."""
    texts = {path.read_text().removeprefix(f"{path.name} ") for path in map(folder.joinpath, FILES) if path.is_file()}
    complete = all((folder / name).is_file() for name in FILES)
    return texts.pop() if complete and len(texts) == 1 else None


class PoweredRun(Writer):
    """A run that says what it was promised: commits, references, accepted tickets."""

    def __init__(self, directory: Path, setup: Settings) -> None:
        super().__init__(directory, setup, failing=frozenset({1, 6}), lost=frozenset({3}))
        self.committed, self.renewed = 0, 0
        self.accepted: set[int] = set()

    def promised(self) -> tuple[int, int, set[int]]:
        return self.committed, self.renewed, set(self.accepted)

    async def _steps(self, buffer: RolloutBuffer, version: int) -> None:
        real = buffer.add

        async def add(tickets: list[int], batch: Any) -> Any:
            receipt = await real(tickets, batch)
            self.accepted |= set(tickets) if receipt.accepted_groups == len(tickets) else set()
            return receipt

        buffer.add = add  # type: ignore[method-assign]
        await super()._steps(buffer, version)

    async def _checkpoint(self, buffer: RolloutBuffer, version: int) -> None:
        folder = references.folder_of(self.directory, version)
        write_model(references.begin(folder), str(version))
        references.commit(folder)
        self.renewed = version
        write = checkpoint.commit

        def commit(aside: Path, state: Any) -> Path:
            write_model(aside / "policy", str(version))
            path = write(aside, state)
            self.committed = version
            return path

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "commit", commit)
            await super()._checkpoint(buffer, version)
        files.append_json(self.directory / "events.jsonl", {"event": "checkpoint", "time": 0.0, "step": version})


def check_run(result: Path, promised: tuple[int, int, set[int]]) -> None:
    committed, renewed, accepted = promised
    path, state, damaged = checkpoint.newest_intact(result)
    assert damaged == [] and (state or {"version": 0})["version"] >= committed
    events = [line["step"] for line in files.read_json_lines(result / "events.jsonl") if line["event"] == "checkpoint"]
    assert max(events, default=0) <= (state or {"version": 0})["version"]
    if path:
        assert model_of(path / "policy") == str(state["version"] if state else 0)
    if renewed:
        checkpoint.check(references.folder_of(result, renewed))
        assert model_of(references.folder_of(result, renewed)) == str(renewed)
    stored = {ticket for path in segments.paths(result) for ticket in segments.read(path).tickets}
    behind = state["buffer"]["next_ticket"] if state else 0
    assert {ticket for ticket in accepted if ticket >= behind} <= stored


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("every", "keep", "stride"), [(1, 1, 61), (2, 2, 37)])
def test_a_run_survives_a_power_cut_at_any_moment(
    scratch: Path, model: Model, every: int, keep: int, stride: int
) -> None:
    """Every moment is looked at; some are audited, and from every stride-th the run continues, to the same end."""
    setup = settings(0, checkpoint={"every_steps": every, "keep": keep})
    whole = PoweredRun(scratch / "disk" / "run", setup)
    disk = Disk(scratch / "disk", whole.promised)
    with disk.followed():
        whole.train()
    assert len(disk.moments) > 150
    for number, moment in enumerate(disk.moments):
        result = disk.after_a_cut(moment, model, scratch / "found") / "run"
        check_run(result, moment.promised)
        if number % 7 == 0 and (result / "config.yaml").exists():
            assert verify.check(result).findings == (), moment.operation
        if number % stride == 0:
            again = PoweredRun(result, setup)
            again.train()
            assert verify.check(result).findings == () and verify.compare(result, whole.directory) == []


class PoweredOfflineLearner(FakeOfflineLearner):
    """Writes models of several files, as libraries do."""

    def _export(self, folder: str) -> None:
        Path(folder).mkdir()
        write_model(Path(folder), str(self.version))

    def _save(self, folder: str) -> None:
        super()._save(folder)
        write_model(Path(folder) / "learner", str(self.version))


def train_stage(directory: Path, patience: int) -> dict[str, Any]:
    """What `keel sft` does around its learner."""
    if done := offline_loop.finished(directory):
        return done
    files.make_folder(directory)
    plan = offline_run_of(directory, every=1, patience=patience, checkpoints=2)
    learner = PoweredOfflineLearner([9, 8, 7, 7.5, 6, 6.5, 6.25])
    recorder = offline_loop.OfflineRecorder(plan, RunMetrics("test", directory / "metrics.jsonl"), Listener())

    async def to_the_end() -> offline_loop.State:
        state = await offline_loop.restore(plan, learner, recorder)
        return await offline_loop.run(plan, learner, recorder, state)

    state = asyncio.run(to_the_end())
    return offline_loop.finish(plan, "sft", 0.0, model_step=offline_loop.kept(plan, state))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("patience", [0, 2])
def test_a_stage_survives_a_power_cut_at_any_moment(scratch: Path, model: Model, patience: int) -> None:
    directory = scratch / "disk" / "stage"
    disk = Disk(scratch / "disk", lambda: len(files.read_json_lines(directory / "events.jsonl")))
    with disk.followed():
        done = train_stage(directory, patience)
    for number, moment in enumerate(disk.moments):
        result = disk.after_a_cut(moment, model, scratch / "found") / "stage"
        if offline_loop.finished(result) is None:
            _, state, damaged = checkpoint.newest_intact(result)
            assert damaged == [] and (state or {"version": 0})["version"] >= 2 * moment.promised, moment.operation
            if state and state["best_version"] and patience:
                files.bring_back(result / "model")
                assert int(model_of(result / "model") or 0) >= state["best_version"], moment.operation
        else:
            assert model_of(result / "model") == str(done["model_step"]), moment.operation
        if number % 11 == 0:
            assert train_stage(result, patience)["model_step"] == done["model_step"]
            assert model_of(result / "model") == str(done["model_step"]), moment.operation


class PoweredRankGroup(FakeRankGroup):
    def _export(self, folder: str) -> None:
        super()._export(folder)
        write_model(Path(folder), f"{self.member} {self.version}")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("members", [1, 2])
async def test_an_ensemble_survives_a_power_cut_at_any_moment(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, model: Model, members: int
) -> None:
    (scratch / "disk").mkdir()
    stage = Stage(scratch / "disk", monkeypatch, members={"count": members})
    disk = Disk(scratch / "disk")
    with disk.followed():
        files.sync_tree(stage.directory.parent)  # the rows, and the folder that stages.conduct makes
        await stage.train(PoweredRankGroup(LOSSES))
    expected = [f"{member} 4" for member in range(members)]
    seen = set()
    for moment in disk.moments:
        result = disk.after_a_cut(moment, model, scratch / "found") / "run"
        for member in range(members):
            if offline_loop.finished(result / "members" / str(member)):
                assert model_of(result / "members" / str(member) / "model") == expected[member], moment.operation
        whole = result / "model"
        parts = [whole / f"member-{member}" for member in range(members)] if members > 1 else [whole]
        if (whole / "ensemble.json").exists() if members > 1 else whole.exists():
            assert [model_of(part) for part in parts] == expected, moment.operation
            seen.add("model")
        if offline_loop.finished(result):
            assert [model_of(part) for part in parts] == expected, moment.operation
            assert (result / "report.json").stat().st_size
            seen.add("finished")
    assert seen == {"model", "finished"}


@pytest.mark.parametrize("model", MODELS)
def test_labels_survive_a_power_cut_at_any_moment(scratch: Path, monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    async def judge(*_: Any) -> Any:
        return judged([["a", "b"], ["c", "d"]], [[1, 2], [4, 3]])

    monkeypatch.setattr(label, "_scored", judge)
    monkeypatch.setattr(label, "actors", SimpleNamespace(connect=lambda _: "connected", disconnect=lambda: None))
    prepared = SimpleNamespace(settings=labels_for(), directory=scratch / "disk" / "label", notes=())
    disk = Disk(scratch / "disk")
    with disk.followed():
        done = label.run(cast(label.Labeling, prepared), Listener())
    seen = set()
    for moment in disk.moments:
        result = disk.after_a_cut(moment, model, scratch / "found") / "label"
        if offline_loop.finished(result):
            assert parquet.read_table(result / "pairs.parquet").num_rows == done["pairs"] == 2, moment.operation
            assert schema.from_bytes((result / "completions.arrow").read_bytes()).num_rows == 4
            seen.add("finished")
    assert seen == {"finished"}


class GgufModel:
    """transformers' model and tokenizer of a GGUF file."""

    config = object()

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> "GgufModel":
        return cls()

    def save_pretrained(self, folder: Path) -> None:
        write_model(folder, "converted")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_converted_model_survives_a_power_cut_at_any_moment(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, model: Model, damaged: bool
) -> None:
    """Also one that replaces what an earlier version left after a power cut: files of no bytes."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM", GgufModel)
    monkeypatch.setattr("transformers.AutoTokenizer", GgufModel)
    monkeypatch.setattr("transformers.GgufConfig", lambda **_: None)
    target = scratch / "disk" / "cache" / "models" / "a-1"
    disk = Disk(scratch / "disk")
    with disk.followed():
        if damaged:
            write_model(target, "old")
            (target / "config.json").write_text("")
            files.sync_tree(scratch / "disk")
        assert not loading._is_converted(target)
        loading._convert_gguf(Path("model.gguf"), target)
        assert loading._is_converted(target)
    for moment in disk.moments:
        result = disk.after_a_cut(moment, model, scratch / "found") / "cache" / "models" / "a-1"
        assert not loading._is_converted(result) or model_of(result) == "converted", moment.operation
    assert loading._is_converted(result)


@pytest.mark.parametrize("model", MODELS)
def test_kept_log_probs_survive_a_power_cut_at_any_moment(scratch: Path, model: Model) -> None:
    content = schema.to_bytes(rollouts.prompts(range(3)))
    disk = Disk(scratch / "disk")
    with disk.followed():
        policy_stage._keep(scratch / "disk" / "cache" / "reference_logprobs" / "a.arrow", content)
    for moment in disk.moments:
        result = disk.after_a_cut(moment, model, scratch / "found") / "cache" / "reference_logprobs" / "a.arrow"
        assert policy_stage._kept(result) in (None, content.to_pybytes()), moment.operation
    assert policy_stage._kept(result) == content.to_pybytes()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("write", [files.write_json, files.append_json], ids=["write", "append"])
def test_a_file_that_was_written_is_there_with_all_folders_above_it(
    scratch: Path, model: Model, write: Callable[[Path, Any], None]
) -> None:
    disk = Disk(scratch / "disk")
    path = Path("a") / "b" / "c.json"
    with disk.followed():
        files.make_folder(scratch / "disk" / "a" / "b")
        write(scratch / "disk" / path, {"n": 1})
    result = disk.after_a_cut(disk.moments[-1], model, scratch / "found") / path
    assert json.loads(result.read_text()) == {"n": 1}


def test_the_simulator_loses_what_nobody_synced(scratch: Path) -> None:
    """Else the tests above would show nothing."""
    disk = Disk(scratch / "disk")
    digest = hashlib.sha256(b"content").hexdigest()
    with disk.followed():
        (scratch / "disk" / "unsynced").write_text(digest)
        files.write(scratch / "disk" / "synced", digest.encode())
        (scratch / "disk" / "folder").mkdir()
    last = disk.moments[-1]
    journalled = disk.after_a_cut(last, "journalled", scratch / "journalled")
    letter = disk.after_a_cut(last, "letter", scratch / "letter")
    assert {path.name: path.stat().st_size for path in journalled.iterdir() if path.is_file()} == {
        "unsynced": 0,
        "synced": 64,
    }
    assert (journalled / "folder").is_dir() and not (letter / "folder").exists()
