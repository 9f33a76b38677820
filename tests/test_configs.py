"""The shipped configurations load, and say what their file name says."""

from pathlib import Path

import pytest

from keel import config
from keel.pipeline_settings import PipelineSettings
from keel.section import Section
from keel.settings import Settings
from keel.stage_settings import LabelSettings, PreferSettings, RewardModelSettings, SupervisedSettings

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
STAGES: dict[str, type[Section]] = {
    "sft": SupervisedSettings,
    "label": LabelSettings,
    "reward": RewardModelSettings,
    "prefer": PreferSettings,
    "pipeline": PipelineSettings,
}
OTHER_NAMES = {"prefer": "dpo-offline", "pipeline": "quickstart"}


def settings_of(path: Path) -> type[Section]:
    """By the first word of the file's name; other words are online runs."""
    return STAGES.get(path.stem.split("-")[0], Settings)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_configuration_loads_under_its_own_name(path: Path) -> None:
    loaded = config.load_as(settings_of(path), path)
    assert loaded.run.name == OTHER_NAMES.get(path.stem, path.stem)
    assert path.read_text().startswith("# ")  # what it is, in its first line


def test_the_quickstarts_differ_in_their_regulariser_alone() -> None:
    one, other = (config.load(FOLDER / f"{name}.yaml").model_dump() for name in ("quickstart", "quickstart-maxent"))
    assert {name for name in one if one[name] != other[name]} == {"run", "regulariser"}
    assert {name for name in one["run"] if one["run"][name] != other["run"][name]} == {"name"}
