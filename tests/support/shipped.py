"""The configurations in configs/ and the settings each of them is: the file's name says which command."""

from pathlib import Path

from keel.config.base import Section
from keel.config.label import LabelSettings
from keel.config.pipeline import PipelineSettings
from keel.config.run import Settings
from keel.config.stages import PreferSettings, RewardModelSettings, SupervisedSettings
from keel.config.sweep import SweepSettings

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
assert FILES, "configurations in configs/"
_OF_COMMANDS: dict[str, type[Section]] = {
    "sft": SupervisedSettings,
    "prefer": PreferSettings,
    "reward": RewardModelSettings,
    "label": LabelSettings,
    "pipeline": PipelineSettings,
    "sweep": SweepSettings,
}


def settings_class(path: Path) -> type[Section]:
    """By the first word of the file's name, which is a command's; every other file is an online run's."""
    return _OF_COMMANDS.get(path.stem.split("-")[0], Settings)


def identity(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))
