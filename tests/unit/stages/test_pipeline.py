"""Stages cached by content: what changes a key, what does not, what runs, and mistakes in one line."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from keel.config import loader
from keel.config.pipeline import PipelineSettings
from keel.errors import ConfigError
from keel.stages import pipeline
from keel.stages.pipeline import Planned, StageFailed
from prompt_files import jsonl

LABEL: dict[str, Any] = {
    "policy": {"model": "start"},
    "prompts": {"source": "prompts.jsonl", "max_tokens": 16},
    "judge": {"name": "gold", "source": "judging:gold"},
}
REWARD: dict[str, Any] = {"policy": {"model": "trunk"}, "prompts": {"source": "pairs.parquet", "max_tokens": 16}}
TRAIN: dict[str, Any] = {
    "policy": {"model": "start"},
    "prompts": {"source": "prompts.jsonl", "max_tokens": 16},
    "rewards": [{"name": "proxy", "kind": "model", "source": "runs/reward"}],
}
STAGES: list[dict[str, Any]] = [
    {"name": "label", "command": "label", "config": "label.yaml"},
    {"name": "reward", "command": "reward", "config": "reward.yaml", "settings": {"prompts.source": "{label}/pairs.parquet"}},
    {"name": "train", "command": "train", "config": "train.yaml", "settings": {"rewards": {"proxy": {"source": "{reward}"}}}},
    {"name": "evaluate", "command": "evaluate", "config": "train.yaml", "model": "{train}", "settings": {"rewards.proxy.source": "{reward}"}},
]  # fmt: skip
NAMES = [stage["name"] for stage in STAGES]


@dataclass
class Project:
    """A folder with a pipeline's files, from inside of which it is planned."""

    root: Path

    def write(self, name: str, tree: dict[str, Any]) -> None:
        (self.root / name).write_text(yaml.safe_dump(tree))

    def plan(self, stages: list[dict[str, Any]] = STAGES) -> list[Planned]:
        self.write("pipeline.yaml", {"run": {"name": "p"}, "stages": stages})
        path = self.root / "pipeline.yaml"
        return pipeline.plan(loader.load_as(PipelineSettings, path), path)

    def keys(self, stages: list[dict[str, Any]] = STAGES) -> list[str]:
        return [stage.key for stage in self.plan(stages)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    subject = Project(tmp_path)
    for name, tree in (("label", LABEL), ("reward", REWARD), ("train", TRAIN)):
        subject.write(f"{name}.yaml", tree)
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    (tmp_path / "judging.py").write_text("def gold(completions, **columns):\n    return [0.0 for _ in completions]\n")
    for folder in ("start", "trunk"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(folder.encode())
    return subject


def changed(before: list[str], after: list[str]) -> list[str]:
    return [name for name, one, other in zip(NAMES, before, after, strict=True) if one != other]


def test_the_same_settings_have_the_same_keys(project: Project) -> None:
    keys = project.keys()
    assert keys == project.keys() and len(set(keys)) == 4
    for stage, key in zip(project.plan(), keys, strict=True):
        assert stage.directory == project.root / "runs" / "p" / f"{stage.entry.name}-{key[:8]}"


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("label", {"noise": {"flip_ratio": 0.1}}, NAMES),
        ("label", {"run": {"seed": 1}}, NAMES),
        ("reward", {"margin": 0.5}, NAMES[1:]),
        ("reward", {"training": {"rows_per_step": 16}}, NAMES[1:]),
        ("train", {"run": {"steps": 5}}, NAMES[2:]),
        ("train", {"rewards": [*TRAIN["rewards"], {"name": "gold", "source": "judging:gold", "role": "monitor"}]}, NAMES[2:]),
        # where a stage runs and how it is watched is no content
        ("train", {"metrics": {"port": 0}, "cluster": {"address": "auto"}, "deadlines": {"step_seconds": 5}}, []),
        ("reward", {"metrics": {"host": "0.0.0.0"}, "run": {"name": "other", "directory": "elsewhere"}}, []),
    ],
)  # fmt: skip
def test_a_changed_setting_changes_its_stage_and_later_ones(
    project: Project, name: str, block: dict[str, Any], expected: list[str]
) -> None:
    before = project.keys()
    project.write(f"{name}.yaml", {**{"label": LABEL, "reward": REWARD, "train": TRAIN}[name], **block})
    assert changed(before, project.keys()) == expected


def test_a_setting_of_the_pipeline_is_a_setting(project: Project) -> None:
    stages = [
        STAGES[0],
        {**STAGES[1], "settings": {"prompts.source": "{label}/pairs.parquet", "margin": 0.5}},
        *STAGES[2:],
    ]
    assert changed(project.keys(), project.keys(stages)) == NAMES[1:]
    before = project.keys(stages)
    project.write("reward.yaml", {**REWARD, "margin": 0.5})  # the same, said elsewhere
    assert project.keys() == before


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("prompts.jsonl", b'{"prompt": "b"}\n', NAMES),
        ("judging.py", b"def gold(completions, **columns):\n    return [1.0 for _ in completions]\n", NAMES),
        ("trunk/model.safetensors", b"other", NAMES[1:]),
        ("start/config.json", b'{"a": 1}', NAMES),
        ("unread.jsonl", b"{}", []),
    ],
)
def test_a_changed_file_changes_the_stages_that_read_it(
    project: Project, file: str, content: bytes, expected: list[str]
) -> None:
    before = project.keys()
    (project.root / file).write_bytes(content)
    assert changed(before, project.keys()) == expected


def test_code_of_a_prompt_source_is_content(project: Project) -> None:
    (project.root / "asking.py").write_text("def rows():\n    return [{'prompt': 'a'}]\n")
    project.write("label.yaml", {**LABEL, "prompts": {"source": "python:asking:rows", "max_tokens": 16}})
    before = project.keys()
    (project.root / "asking.py").write_text("def rows():\n    return [{'prompt': 'b'}]\n")
    assert changed(before, project.keys()) == NAMES


def test_another_command_or_model_is_another_key(project: Project) -> None:
    stages = [*STAGES[:3], {**STAGES[3], "model": "start"}]
    assert changed(project.keys(), project.keys(stages)) == ["evaluate"]


def test_stages_that_read_nothing_of_each_other_do_not_share_keys(project: Project) -> None:
    (project.root / "pairs.parquet").write_bytes(b"pairs")
    stages = [STAGES[0], {**STAGES[1], "settings": {}}, *STAGES[2:]]
    before = project.keys(stages)
    project.write("label.yaml", {**LABEL, "noise": {"flip_ratio": 0.1}})
    assert changed(before, project.keys(stages)) == ["label"]


def test_running_a_pipeline_changes_no_key(project: Project) -> None:
    before = project.keys()
    (project.root / "runs").mkdir()  # as the first run makes it
    assert project.keys() == before


@pytest.mark.parametrize("file", ["data/train.parquet", "train.jsonl"])
def test_files_of_a_dataset_folder_are_content(project: Project, file: str) -> None:
    path = project.root / "dataset" / file
    path.parent.mkdir(parents=True)
    path.write_text("one")
    project.write("label.yaml", {**LABEL, "prompts": {"source": "dataset", "max_tokens": 16}})
    before = project.keys()
    path.write_text("two")
    assert changed(before, project.keys()) == NAMES


def test_a_long_text_is_a_setting_like_any_other(project: Project) -> None:
    project.write("label.yaml", {**LABEL, "prompts": {**LABEL["prompts"], "system_prompt": "be kind " * 40}})
    assert len(project.keys()) == 4


def test_a_stage_in_a_list_is_filled_in(project: Project) -> None:
    project.write("again.yaml", {"runs": ["runs/x"], "judge": LABEL["judge"]})
    stages = [
        *STAGES[:3],
        {"name": "again", "command": "label", "config": "again.yaml", "settings": {"runs": ["{train}"]}},
    ]
    train, again = project.plan(stages)[2:]
    assert any(str(train.directory) in change for change in again.overrides)


# ---- mistakes


def line_of(project: Project, stages: list[dict[str, Any]]) -> str:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as caught:
        project.plan(stages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FIRST, SECOND = STAGES[:2]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([], "stages=[]: list should have at least 1 item"),
        ([SECOND], "stages.reward: {label} is no earlier stage; expected one of none: it is the first"),
        ([FIRST, {**SECOND, "settings": {"prompts.source": "{lable}/x"}}], "stages.reward: {lable} is no earlier stage; expected one of label"),
        ([SECOND, FIRST], "{label} is no earlier stage"),
        ([FIRST, {**SECOND, "settings": {"prompts": {"source": "{reward}/x"}}}], "stages.reward: {reward} is no earlier stage"),
        ([FIRST, FIRST], "stages: name 'label' is used twice"),
        ([{**FIRST, "command": "lable"}], "stages.0.command='lable': input should be 'sft', 'label'"),
        ([{**FIRST, "name": "La bel"}], "stages.0.name='La bel': string should match pattern"),
        ([{**FIRST, "comand": "x"}], "stages.0.comand: unknown setting; did you mean command?"),
        ([{**FIRST, "model": "m"}], "stages.0.model=m: command=label; expected a model with evaluate, and only there"),
        ([{**FIRST, "command": "evaluate"}], "stages.0.model=None: command=evaluate; expected a model with evaluate"),
        ([{**FIRST, "config": "absent.yaml"}], "stages.label (absent.yaml): config "),
        ([{**FIRST, "settings": {"max_promts": 3}}], "stages.label (label.yaml): max_promts: unknown setting; did you mean max_prompts?"),
        ([{**FIRST, "settings": {"judge": {"kind": "stored", "source": ""}}}], "stages.label (label.yaml): judge.kind=stored"),
        ([{**FIRST, "command": "train"}], "stages.label (label.yaml): judge: unknown setting"),
        ([FIRST, {**SECOND, "settings": {"margin": "{label}"}}], "stages.reward (reward.yaml): margin="),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(project: Project, stages: list[dict[str, Any]], expected: str) -> None:
    assert expected in line_of(project, stages)


def test_braces_without_a_name_are_refused_in_one_line(project: Project) -> None:
    line_of(project, [{**FIRST, "settings": {"prompts.system_prompt": "answer with {}"}}])


def test_a_wheel_that_is_not_there_is_refused_in_one_line(project: Project) -> None:
    line_of(project, [{**FIRST, "settings": {"policy.model": "wheel:no-such-model"}}])


# ---- running


class FakeProcesses:
    """subprocess.run: writes what a stage would, checks the command, ends with the exit code of the stage's name."""

    def __init__(self, codes: dict[str, int] | None = None) -> None:
        self.codes = codes or {}
        self.commands: list[list[str]] = []

    def run(self, command: list[str], *, check: bool) -> Any:
        assert not check and command[:4] == [sys.executable, "-P", "-m", "keel"]
        self.commands.append(command)
        directory = self.directory(command)
        assert directory.parent.is_dir()
        directory.mkdir(exist_ok=True)
        (directory / "config.yaml").write_text("")
        return type("Completed", (), {"returncode": self.codes.get(command[4], 0)})

    @staticmethod
    def directory(command: list[str]) -> Path:
        if command[4] == "evaluate":
            return Path(command[command.index("--output") + 1])
        (written,) = [part.removeprefix("run.directory=") for part in command if part.startswith("run.directory=")]
        return Path(json.loads(written))

    @property
    def names(self) -> list[str]:
        return [command[4] for command in self.commands]


def execute(project: Project, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int] | None = None) -> FakeProcesses:
    processes = FakeProcesses(codes)
    monkeypatch.setattr(pipeline.subprocess, "run", processes.run)
    with open(project.root / "console.txt", "a") as file:
        pipeline.run(project.plan(), Console(file=file, width=300))
    return processes


def test_every_stage_gets_its_settings_and_directory(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "runs").mkdir()
    planned = {stage.entry.name: stage for stage in project.plan()}
    processes = execute(project, monkeypatch)
    assert processes.names == NAMES
    label, reward, train, evaluate = processes.commands
    directories = {name: str(stage.directory) for name, stage in planned.items()}
    for name, command in zip(NAMES, processes.commands, strict=True):
        assert str(FakeProcesses.directory(command)) == directories[name]
        assert f"run.name=p-{name}" in command
    assert label[5] == "label.yaml" or Path(label[5]) == project.root / "label.yaml"
    assert f'prompts.source="{directories["label"]}/pairs.parquet"' in reward
    assert f'rewards.proxy.source="{directories["reward"]}"' in train
    assert evaluate[5] == directories["train"] and f'rewards.proxy.source="{directories["reward"]}"' in evaluate
    assert Path(evaluate[evaluate.index("--config") + 1]) == project.root / "train.yaml"
    for name, command in zip(NAMES[:3], processes.commands, strict=False):  # which load as they were planned
        settings = loader.load_as(pipeline.COMMANDS[name], command[5], command[6:])
        assert settings.run_directory == directories[name]  # type: ignore[attr-defined]


def test_a_done_stage_is_not_run_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "runs").mkdir()
    assert execute(project, monkeypatch).names == NAMES
    assert all(stage.done for stage in project.plan())
    assert execute(project, monkeypatch).names == []
    assert (project.root / "console.txt").read_text().count("cached, nothing it depends on changed") == 4
    project.write("train.yaml", {**TRAIN, "run": {"steps": 5}})
    assert execute(project, monkeypatch).names == ["train", "evaluate"]
    project.write("train.yaml", TRAIN)  # going back costs nothing
    assert execute(project, monkeypatch).names == []


def test_a_stage_that_fails_ends_the_pipeline_and_is_tried_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "runs").mkdir()
    with pytest.raises(StageFailed, match="stage reward ended with exit code 3; the same command resumes there"):
        execute(project, monkeypatch, {"reward": 3})
    assert [stage.done for stage in project.plan()] == [True, False, False, False]
    assert execute(project, monkeypatch).names == NAMES[1:]
    done = json.loads((project.plan()[1].directory / "done.json").read_text())
    assert done["key"] == project.plan()[1].key and done["seconds"] >= 0
