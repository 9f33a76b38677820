"""The shipped configurations load, and say what their file name says."""

from pathlib import Path

import pytest

from keel.config import loader
from keel.config.commands import COMMANDS
from keel.config.pipeline import PipelineSettings
from keel.config.sweep import SweepSettings
from keel.stages import pipeline, sweep
from shipped import FILES, FOLDER, identity, settings_class

PAPER = FOLDER.parent / "benchmarks" / "maxent"
OTHER_NAMES = {
    "pipeline": "quickstart",
    "stages/prefer": "dpo-offline",
}
"""Where the file is named after its command."""


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_a_shipped_configuration_loads_under_its_own_name(path: Path) -> None:
    settings = loader.load_as(settings_class(path), path)
    name = Path(settings.directory).name if isinstance(settings, SweepSettings) else settings.run.name  # type: ignore[attr-defined]
    assert name == OTHER_NAMES.get(identity(path), path.stem)
    assert path.read_text().splitlines()[1].startswith("# ")  # what it is, below the line for editors


def test_the_shipped_pipeline_can_be_planned(tmp_path: Path) -> None:
    """Every stage's file is there, and its overrides fit its settings."""
    path = FOLDER / "pipeline.yaml"
    planned = pipeline.plan(loader.load_as(PipelineSettings, path, [f"run.directory={tmp_path}"]), path)
    assert [stage.entry.name for stage in planned] == ["label", "reward", "train", "evaluate"]
    assert not any(stage.done for stage in planned)
    train = planned[2]
    assert planned[3].model == str(train.directory / "best")
    assert f'evaluation.against="{train.directory}"' in planned[3].overrides


def test_the_shipped_sweep_can_be_planned(tmp_path: Path) -> None:
    path = FOLDER / "sweep.yaml"
    runs = sweep.plan(loader.load_as(SweepSettings, path, [f"directory={tmp_path}"]), path)
    assert [(run.arm, run.seed) for run in runs[:4]] == [("kl", 0), ("entropy", 0), ("none", 0), ("kl", 1)]
    assert [run.settings.regularizer.kl.coefficient for run in runs[:3]] == [0.02, 0, 0]
    assert [run.settings.regularizer.entropy.coefficient > 0 for run in runs[:3]] == [False, True, False]


@pytest.mark.parametrize("command", ["sft", "label", "reward", "reward-minilm", "prefer", "train"])
def test_a_configuration_of_the_papers_experiment_loads(command: str) -> None:
    settings = loader.load_as(COMMANDS[command.partition("-")[0]], PAPER / f"{command}.yaml")
    assert settings.run_directory.startswith("runs/")  # type: ignore[attr-defined]


def test_the_sweeps_of_the_papers_experiment_can_be_planned(tmp_path: Path) -> None:
    """Two learning rates a factor 10 apart, three seeds, and every arm differs from every other one.

    The arms of the guard are those of the first sweep, with further seeds.
    """
    rates, arms, seeds, settings = {}, {}, {}, {}
    for name in ("sweep", "sweep-low", "sweep-guard", "sweep-more"):
        path = PAPER / f"{name}.yaml"
        runs = sweep.plan(loader.load_as(SweepSettings, path, [f"directory={tmp_path / name}"]), path)
        seeds[name] = sorted({run.seed for run in runs})
        settings[name] = {run.arm: run.settings.model_dump_json(exclude={"run"}) for run in runs}
        assert len(set(settings[name].values())) == len(settings[name]) == len(runs) / len(seeds[name])
        arms[name] = {run.arm.removesuffix("-learning_rate-3e-05") for run in runs}
        rates[name] = {run.settings.learners.learning_rate for run in runs}
    assert arms["sweep-low"] == arms["sweep"] - {"none-guard"}
    assert settings["sweep-guard"] == {arm: settings["sweep"][arm] for arm in ("none", "none-guard")}
    assert seeds == {name: [0, 1, 2] for name in arms} | {"sweep-guard": [3, 4, 5, 6, 7]}
    assert rates == {"sweep": {3e-4}, "sweep-low": {3e-5}, "sweep-guard": {3e-4}, "sweep-more": {3e-4}}


def test_the_quickstarts_differ_in_their_regularizer_alone() -> None:
    one, other = (loader.load(FOLDER / f"{name}.yaml").model_dump() for name in ("quickstart", "quickstart-maxent"))
    assert {name for name in one if one[name] != other[name]} == {"run", "regularizer"}
    assert {name for name in one["run"] if one["run"][name] != other["run"][name]} == {"name"}


def test_eapo_is_configured_as_published() -> None:
    """2407.18143: plain squared losses of both heads, PopArt at rate .03, lambda_H 0, no bonus in the loss."""
    settings = loader.load(FOLDER / "objectives" / "eapo.yaml")
    critic, entropy = settings.objective.critic, settings.objective.entropy_advantage  # type: ignore[union-attr]
    assert critic is not None and entropy is not None
    assert (critic.clip, critic.loss, critic.popart, critic.popart_rate) == (None, "mse", True, 0.03)
    assert (entropy.coefficient, entropy.discount, entropy.gae_lambda) == (0.02, 0.9, 0.0)
    assert settings.regularizer.entropy.form == "none"
