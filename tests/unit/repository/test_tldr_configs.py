"""configs/tldr, the setting of arXiv 2509.20265: every file passes --dry-run, and the arms differ in one block."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from keel.cli import main
from keel.config import loader
from keel.config.stages import RewardModelSettings, SupervisedSettings

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

FOLDER = Path(__file__).parents[3] / "configs" / "tldr"
ARMS = sorted(FOLDER.glob("rloo-*.yaml"))
FILES = sorted(FOLDER.glob("*.yaml"))
SIZES = ("1b", "2.8b")


def command_of(path: Path) -> str:
    first = path.stem.split("-")[0]
    return "train" if first == "rloo" else first


def dry_run(command: str, *arguments: str) -> str:
    answer = CliRunner().invoke(main.app, [command, *arguments, "--dry-run"])
    assert answer.exit_code == 0, answer.output or answer.exception
    return answer.output


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_passes_a_dry_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # nothing is looked for beside the file, and nothing is written
    out = dry_run(command_of(path), str(path))
    if command_of(path) == "pipeline":
        assert re.findall(r"^(\w+): to do", out, re.M) == ["sft", "reward", "arm", "evaluate"]
    else:
        assert yaml.safe_load(out)["run"]["name"] == path.stem
    assert list(tmp_path.iterdir()) == []


def test_the_arms_differ_in_their_regularizer_alone() -> None:
    trees = [loader.load(path).model_dump(mode="json") for path in ARMS]
    assert [tree["run"].pop("name") for tree in trees] == [path.stem for path in ARMS]
    regularizers = [tree.pop("regularizer") for tree in trees]
    assert len(trees) == 5 and all(tree == trees[0] for tree in trees)
    assert {terms(regularizer) for regularizer in regularizers} == {
        (0.05, "none", 0.0),
        (0.0, "none", 0.0),
        (0.0, "sequence_sum", 0.01),
        (0.0, "sequence_mean_naive", 0.5),
        (0.0, "token_bonus", 0.01),
    }


def terms(regularizer: dict[str, Any]) -> tuple[float, str, float]:
    return (
        regularizer["kl"]["coefficient"],
        regularizer["entropy"]["form"],
        regularizer["entropy"]["coefficient"],
    )


def test_numbers_are_those_of_the_papers() -> None:
    """Huang et al. 2403.17031 for SFT and reward model, TRL v0.19's RLOO for the arms."""
    for size in SIZES:
        sft = loader.load_as(SupervisedSettings, FOLDER / f"sft-{size}.yaml")
        reward = loader.load_as(RewardModelSettings, FOLDER / f"reward-{size}.yaml")
        for stage, rows in ((sft, 128), (reward, 64)):
            optimizer = stage.learners
            assert (optimizer.learning_rate, optimizer.adam_epsilon, optimizer.weight_decay) == (3e-6, 1e-5, 0.01)
            assert (stage.training.rows_per_step, stage.training.epochs) == (rows, 1)
        assert (sft.prompts.max_tokens, sft.completions.max_tokens) == (512, 53)
        assert reward.center.source == sft.prompts.source  # demonstrations score 0
        assert reward.policy.model == sft.run_directory
    arm = loader.load(FOLDER / "rloo-kl.yaml")
    assert (arm.sampling.temperature, arm.sampling.samples_per_prompt, arm.sampling.max_tokens) == (0.7, 2, 53)
    assert arm.shaping.missing_end_penalty == 1 and arm.regularizer.kl.in_reward
    episodes = arm.run.steps * arm.buffer.groups_per_step * arm.sampling.samples_per_prompt
    assert episodes == pytest.approx(1e6, rel=1e-3)


def test_stages_hand_their_folders_on() -> None:
    arm = loader.load(FOLDER / "rloo-kl.yaml")
    sft = loader.load_as(SupervisedSettings, FOLDER / "sft-1b.yaml")
    reward = loader.load_as(RewardModelSettings, FOLDER / "reward-1b.yaml")
    assert arm.policy.model == sft.run_directory
    assert arm.rewards[0].source == reward.run_directory


def commands() -> list[list[str]]:
    """Every keel command that README.md shows, continued lines joined."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("keel ")]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:2]))
def test_the_commands_of_the_readme_resolve(words: list[str]) -> None:
    command, path, *overrides = words
    if command in ("compare", "evaluate"):  # need runs; their overrides are those of the arm
        loader.load(FOLDER / "rloo-kl.yaml", [word for word in overrides if "=" in word])
        return
    assert path.startswith("configs/tldr/")
    dry_run(command, str(FOLDER.parent.parent / path), *overrides)


def test_the_commands_of_the_readme_know_both_sizes() -> None:
    resolved = [loader.load(FOLDER.parent.parent / words[1], words[2:]) for words in commands() if words[0] == "train"]
    assert {item.policy.model for item in resolved} == {f"runs/tldr/sft-{size}" for size in SIZES}
