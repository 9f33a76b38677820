"""A file in the current directory is imported where the configuration names it, and never for installed code."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import user_code
from keel.cluster import actors, bundle
from keel.errors import ConfigError
from keel.learner.tiny import write as write_tiny
from runs import Writer, settings

INSTALLED = ["pyarrow", "numpy", "yaml", "pydantic", "typer", "rich", "torch", "ray", "transformers", "psutil"]
OF_PYTHON = ["json", "typing", "asyncio", "hashlib", "dataclasses", "difflib", "tempfile", "logging"]
REPORTS = "import os, pathlib\npathlib.Path(os.environ['KEEL_TEST_RAN'], __name__).touch()\n"
NAMED = REPORTS + "def judge(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("path") / "run"
    Writer(folder, settings(1)).train()
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with namesakes of installed modules and of Python's own, all of which leave a mark when they run."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in (*INSTALLED, *OF_PYTHON):
        (folder / f"{name}.py").write_text(REPORTS)
    (folder / "my_rewards.py").write_text(NAMED)
    (tmp_path / "ran").mkdir()
    return folder


def as_module(folder: Path) -> list[str]:
    return [sys.executable, "-m", "keel"]


def as_script(folder: Path) -> list[str]:
    """What pip installs as `keel`."""
    script = folder.parent / "keel-script"
    script.write_text("import sys\nfrom keel.cli.main import main\nsys.exit(main())\n")
    return [sys.executable, str(script)]


def ran(folder: Path, command: Sequence[str]) -> tuple[int, set[str], str]:
    """Exit code, modules of the folder that ran, and what was said."""
    marks = folder.parent / "ran"
    environment = os.environ | {"KEEL_TEST_RAN": str(marks), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    return done.returncode, {path.name for path in marks.iterdir()}, done.stdout + done.stderr


@pytest.mark.parametrize("start", [as_module, as_script])
@pytest.mark.parametrize(
    "arguments",
    [["verify", "RUN"], ["compare", "RUN", "RUN"], ["explain", "RUN"], ["metrics"], ["schema", "label"]],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_loads_no_code_of_the_users_runs_nothing_that_lies_there(
    hostile: Path, finished: Path, start: Any, arguments: list[str]
) -> None:
    code, modules, words = ran(hostile, [*start(hostile), *(text.replace("RUN", str(finished)) for text in arguments)])
    assert modules == set() and "Traceback" not in words, words
    assert code in (0, 1, 2), words
    if arguments[0] == "verify":
        assert code == 0, words


def configuration(folder: Path, command: str) -> list[str]:
    """Arguments of a command whose reward lies beside the configuration."""
    model = write_tiny(folder.parent / "model")
    rows = [{"prompt": f"What is {n}?"} for n in range(8)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward = {"name": "mine", "source": "my_rewards:judge"}
    shared = {
        "policy": {"model": str(model)},
        "prompts": {"source": "p.jsonl", "max_tokens": 32, "held_out": 10**6},  # refused, after the reward was loaded
        "sampling": {"samples_per_prompt": 2, "max_tokens": 4},
    }
    subject = {"judge": reward} if command == "label" else {"rewards": [reward]}
    (folder / "c.yaml").write_text(yaml.safe_dump({**shared, **subject}))
    return ["evaluate", str(model), "--config", "c.yaml"] if command == "evaluate" else [command, "c.yaml"]


@pytest.mark.parametrize(
    ("command", "start"),
    [("train", as_module), ("train", as_script), ("label", as_script), ("evaluate", as_module)],
)
def test_a_reward_beside_the_configuration_is_found_and_its_neighbors_are_not_run(
    hostile: Path, command: str, start: Any
) -> None:
    code, modules, words = ran(hostile, [*start(hostile), *configuration(hostile, command)])
    assert (code, modules) == (2, {"my_rewards"}), words
    assert "prompts.held_out=1000000" in words.replace("\n", " ")


def test_prompts_beside_the_configuration_are_found(
    restored_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_own_prompts.py").write_text("def rows(): return [{'prompt': 'a'}]\n")
    assert user_code.import_symbol("my_own_prompts:rows", "prompts.source")() == [{"prompt": "a"}]
    assert sys.path[-1] == str(tmp_path)


def test_a_namesake_of_an_installed_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's file has to get another name; which one was imported instead is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "yaml.py").write_text("def my_reward(): pass\n")
    with pytest.raises(ConfigError, match=r"yaml is .*__init__\.py; .*yaml\.py needs another name") as caught:
        user_code.import_symbol("yaml:my_reward", "rewards.mine.source")
    assert "\n" not in str(caught.value)


def test_keels_own_functions_put_nothing_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = [*sys.path]
    user_code.import_symbol("keel.examples:distinct_token_ratio", "rewards.mine.source")
    assert sys.path == before


def test_a_namesake_of_an_installed_module_is_not_uploaded(tmp_path: Path) -> None:
    for name in ("numpy", "yaml"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "my_rewards.py").write_text("import numpy, yaml, json\n")
    result = bundle.gather({"rewards": [{"source": "my_rewards:judge"}]}, tmp_path)
    assert {item.label for item in result.items} == {"keel", "module my_rewards"}


def test_workers_look_here_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hands on a list that it extends by the current directory; workers insert each entry in front."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/installed", "/python", str(tmp_path)])
    handed = actors._search_path()._py_driver_sys_path
    handed.extend([str(tmp_path)])
    path = ["/of/the/worker"]
    for place in handed:
        path.insert(0, place)
    assert path == ["/installed", "/python", str(tmp_path), "/of/the/worker"]
