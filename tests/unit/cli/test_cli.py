"""The command line: answers at once where no model is needed, and one line with an exit code for what goes wrong."""

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import __version__
from keel.cli import doctor, main, summary, training_commands
from keel.config import loader
from keel.config.run import Settings
from keel.errors import ConfigError, WorkerLost
from keel.observability.metric_table import reference_table

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

CONFIGS = Path(__file__).parents[3] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed", "datasets"}
QUICK = [["--help"], ["schema"], ["metrics"], ["deploy", "grafana"], ["train", QUICKSTART, "--dry-run"]]


def keel(*arguments: str, folder: Path) -> tuple[int, str, str, float]:
    """Exit code, standard output, standard error and seconds of the processor of a command in its own process."""
    before = _children_seconds()
    command = [sys.executable, "-m", "keel", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    return answer.returncode, answer.stdout, answer.stderr, _children_seconds() - before


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run directory as Keel 0.1.0 left it: config.yaml with the digest alone, and a checkpoint."""
    directory = tmp_path / "old"
    settings = loader.load(QUICKSTART, [f"run.directory={directory}"])
    _, body = loader.dump(settings).split("\n", 1)
    body = body.replace("regularizer:", "regulariser:").replace("center:", "centre:")
    (directory / "checkpoints" / "step-000001").mkdir(parents=True)
    (directory / "config.yaml").write_text(f"# sha256 of the resolved settings: {'0' * 64}\n{body}")
    return directory


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["resume", "RUN"], "RUN_DIR="),
        (["train", QUICKSTART, "run.directory=RUN"], "run.directory="),
        (["verify", "RUN"], "RUN_DIR="),
        (["compare", "RUN", "RUN"], "run "),
        (["explain", "RUN"], "RUN_DIR="),
        (["replay", "RUN", "--step", "1"], "RUN_DIR="),
        (["plan", QUICKSTART, "--from", "RUN"], "--from "),
        (["evaluate", "RUN"], "MODEL="),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_of_an_earlier_version_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], old_run: Path, arguments: list[str], name: str
) -> None:
    """Before anything of it is read: the states of its checkpoints have other names than those of this version."""
    assert run(monkeypatch, *(word.replace("RUN", str(old_run)) for word in arguments)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"keel: {name}{old_run}: was written by Keel 0.1.0; this is Keel {__version__}, ")
    assert line.count("\n") == 1


def test_the_status_of_a_run_of_an_earlier_version_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], old_run: Path
) -> None:
    assert run(monkeypatch, "status", str(old_run)) == 0
    assert "broken off" in capsys.readouterr().out


@pytest.mark.parametrize("configured", [False, True])
def test_the_best_policy_of_a_run_is_evaluated_by_the_runs_settings_beside_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], configured: bool
) -> None:
    directory, asked = tmp_path / "run", []
    directory.mkdir()
    (directory / "config.yaml").write_text(loader.dump(loader.load(QUICKSTART, [f"run.directory={directory}"])))

    def prepare(settings: Settings, model: str, output: Path) -> None:
        asked.append((settings.run_directory, model, output))
        raise ConfigError("asked")

    monkeypatch.setattr("keel.stages.evaluate.prepare", prepare)
    config = ["--config", str(directory / "config.yaml")] * configured
    for model, folder in ((directory / "best", "evaluation-best"), (directory, "evaluation")):
        assert run(monkeypatch, "evaluate", str(model), *config) == 2
        assert asked.pop() == (str(directory), str(model), directory / folder)
    assert run(monkeypatch, "evaluate", str(tmp_path / "none" / "best")) == 2
    assert "is no online run; expected --config" in capsys.readouterr().err


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def torch_seconds() -> float:
    """Of the processor, for the import of torch on this machine."""
    before = _children_seconds()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=120)
    return _children_seconds() - before


@pytest.mark.parametrize("arguments", QUICK, ids=lambda arguments: arguments[0])
def test_answers_that_need_no_model_come_quickly(tmp_path: Path, arguments: list[str], torch_seconds: float) -> None:
    """Half a second to one, less than torch alone would add: two on the machine where this was measured.

    Of the processor, because the machine may be busy, and the best of a few runs; nothing is written.
    """
    seconds: list[float] = []
    while len(seconds) < 8 and min(seconds, default=torch_seconds) >= torch_seconds:
        code, out, err, took = keel(*arguments, folder=tmp_path)
        assert (code, err) == (0, "") and out
        seconds.append(took)
    assert min(seconds) < torch_seconds, seconds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", QUICK, ids=lambda arguments: arguments[0])
def test_answers_that_need_no_model_import_no_heavy_library(tmp_path: Path, arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["keel", *{arguments!r}]
from keel.cli import main
main.app(standalone_mode=False)
assert "typer" in sys.modules
sys.stderr.write(" ".join(sorted({HEAVY!r} & set(sys.modules))))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (answer.returncode, answer.stderr) == (0, "")


# ---- in this process


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line; 0 when it returns."""
    monkeypatch.setattr(sys, "argv", ["keel", *arguments])
    try:
        main.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, str]]:
    """Runs that would have been trained, in place of training them."""
    calls: list[tuple[Settings, str]] = []
    monkeypatch.setattr(training_commands, "start", lambda settings, path: calls.append((settings, path)))
    return calls


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    page = capsys.readouterr().out
    assert all(f" {command} " in page for command in ("train", "resume", "schema", "metrics", "doctor"))


def test_schema_and_metrics_come_from_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "schema") == 0
    assert json.loads(capsys.readouterr().out) == Settings.model_json_schema()
    assert run(monkeypatch, "metrics") == 0
    assert capsys.readouterr().out == reference_table() + "\n"


def test_dry_run_prints_what_would_run_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = started(monkeypatch)
    assert run(monkeypatch, "train", QUICKSTART, "run.steps=7", "--address", "auto", "--dry-run") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert loader.load(printed) == loader.load(QUICKSTART, ["run.steps=7", "cluster.address=auto"])
    assert calls == []


@pytest.mark.parametrize("name", ["moved", "a #1", "2024"])
def test_train_and_resume_hand_over_the_same_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = started(monkeypatch)
    assert run(monkeypatch, "train", QUICKSTART, "run.seed=5", "rewards.vader.weight=2") == 0
    settings, path = calls.pop()
    assert (settings.run.seed, settings.rewards[0].weight, path) == (5, 2.0, QUICKSTART)
    Path(name).mkdir()
    Path(name, "config.yaml").write_text(loader.dump(settings))
    assert run(monkeypatch, "resume", name) == 0
    resumed, path = calls.pop()
    assert resumed.run_directory == name and path == f"{name}/config.yaml"
    assert loader.digest(resumed) == loader.digest(settings)
    assert run(monkeypatch, "resume", name, "--steps", "99") == 0
    assert calls.pop()[0].run.steps == 99 != settings.run.steps


def test_only_an_online_run_is_extended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = started(monkeypatch)
    assert run(monkeypatch, "sft", str(CONFIGS / "stages/sft.yaml")) == 0
    (tmp_path / "config.yaml").write_text(loader.dump(calls.pop()[0]))
    assert run(monkeypatch, "resume", str(tmp_path), "--steps", "9") == 2 and not calls
    assert f"--steps=9: {tmp_path} is a run of keel sft; expected an online run" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["runs", "runs of mine/pipeline"])
def test_the_next_command_is_another_run_beside_the_one_that_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = started(monkeypatch)
    assert run(monkeypatch, "train", QUICKSTART, "run.seed=5", "rewards.vader.weight=2") == 0
    settings, _ = calls.pop()
    directory = Path(folder, "quickstart")
    directory.mkdir(parents=True)
    alone = settings.run.model_copy(update={"directory": str(directory)})  # as keel resume writes it
    (directory / "config.yaml").write_text(loader.dump(settings.model_copy(update={"run": alone})))
    keel, *arguments = shlex.split(summary._next(directory, settings, "configs/pipeline/train.yaml"))
    assert (keel, run(monkeypatch, *arguments)) == ("keel", 0)
    other, path = calls.pop()
    assert (other.run_directory, other.run.seed) == (f"{folder}/another", 6) and path == str(directory / "config.yaml")
    assert other.rewards[0].weight == 2.0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a.b=[red]x[/red]: expected y"), 2, "keel: a.b=[red]x[/red]: expected y\n"),
        (WorkerLost("gone: " + "x" * 300), 1, f"keel: WorkerLost: gone: {'x' * 300}\n"),
        (KeyboardInterrupt(), 130, "keel: interrupted; `keel resume RUN_DIR` resumes from the last checkpoint\n"),
    ],
    ids=["bad input", "failed run", "interrupt"],
)
def test_how_a_run_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    """The message as it is: neither wrapped at the terminal's width nor read as markup."""

    def fail(settings: Settings, path: str) -> None:
        raise error

    monkeypatch.setattr(training_commands, "start", fail)
    assert run(monkeypatch, "train", QUICKSTART) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("command", "function", "way_on"),
    [
        ("verify", "keel.analysis.verify.check", ""),
        ("report", "keel.analysis.report_page.write", ""),
        ("pipeline", "keel.stages.pipeline.plan", "; the same command continues"),
    ],
)
def test_only_a_command_that_trains_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, function: str, way_on: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupt)
    assert run(monkeypatch, command, str(CONFIGS / "pipeline.yaml") if way_on else ".") == 130
    assert capsys.readouterr().err == f"keel: interrupted{way_on}\n"


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor_ends_with_1_when_a_check_failed(monkeypatch: pytest.MonkeyPatch, healthy: bool) -> None:
    monkeypatch.setattr(doctor, "run", lambda console, as_json, self_test: healthy)
    assert run(monkeypatch, "doctor") == (0 if healthy else 1)


def test_an_error_of_nobody_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings, path: str) -> None:
        raise LookupError("a defect\x1b]0;title\x07 [bold]\u202e\ud800")

    monkeypatch.setattr(training_commands, "start", fail)
    assert run(monkeypatch, "train", QUICKSTART) == 1
    shown = capfd.readouterr().err
    assert "Traceback (most recent call last):\n" in shown and f'"{__file__}", line' in shown.replace("\n", "")
    assert shown.endswith("LookupError: a defect\\x1b]0;title\\x07 [bold]\\u202e\\ud800\n")


# ---- bad input, in an empty working directory


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    tree: dict[str, Any] = {
        "policy": {"model": "./absent"},
        "prompts": {"source": str(tmp_path / "prompts.jsonl")},
        "rewards": [{"name": "distinct", "source": "keel.examples:distinct_token_ratio"}],
        "metrics": {"port": 0},
        "cluster": {"object_store_bytes": 2**27, "min_memory_bytes": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "CONFIG"], "policy.model=./absent: no such folder"),
        (["train", "CONFIG", "polcy.model=x"], "polcy: unknown setting; did you mean policy?"),
        (["train", "CONFIG", "run.steps=many"], "run.steps='many': input should be a valid integer"),
        (["train", "CONFIG", "sampling.samples_per_prompt=1"], "sampling.samples_per_prompt=1: "),
        (["train", "absent.yaml"], "config absent.yaml: no such file"),
        (["resume", "absent"], "RUN_DIR=absent: no config.yaml in it"),
        (["train"], "Missing argument 'CONFIG'"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_ends_with_2_one_line_and_nothing_written(
    tmp_path: Path, config_file: str, arguments: list[str], expected: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    given = [config_file if word == "CONFIG" else word for word in arguments]
    code, out, err, _ = keel(*given, folder=empty)
    assert (code, out) == (2, "")
    assert err.startswith(f"keel: {expected}") and err.count("\n") == 1, err
    assert list(empty.iterdir()) == []
