"""The configurations in configs/ and the settings each of them is: the folder or the file's name says which command."""

from pathlib import Path

from keel.pipeline_settings import PipelineSettings
from keel.section import Section
from keel.settings import Settings
from keel.stage_settings import LabelSettings, PreferSettings, RewardModelSettings, SupervisedSettings

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
_OF_STAGES: dict[str, type[Section]] = {
    "sft": SupervisedSettings,
    "prefer": PreferSettings,
    "reward": RewardModelSettings,
    "label": LabelSettings,
}


def settings_class(path: Path) -> type[Section]:
    """stages/ and pipeline/ hold a command's configuration under its name; every other file is an online run's."""
    if path == FOLDER / "pipeline.yaml":
        return PipelineSettings
    return _OF_STAGES.get(path.stem, Settings) if path.parent.name in ("stages", "pipeline") else Settings


def identity(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))
