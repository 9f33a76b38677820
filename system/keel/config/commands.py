"""Which command has which settings."""

from typing import Any

from keel.config.base import CommandSettings, Section
from keel.config.label import LabelSettings
from keel.config.pipeline import PipelineSettings
from keel.config.run import Settings
from keel.config.stages import PreferSettings, RewardModelSettings, StageSettings, SupervisedSettings
from keel.config.sweep import SweepSettings

AnySettings = Settings | StageSettings | LabelSettings
"""The configuration of one command."""
COMMANDS: dict[str, type[CommandSettings]] = {
    "train": Settings,
    "evaluate": Settings,
    "sft": SupervisedSettings,
    "prefer": PreferSettings,
    "reward": RewardModelSettings,
    "label": LabelSettings,
}
"""Commands that have a run directory of their own, and the settings of each."""
CONFIGURATIONS: dict[str, type[Section]] = {**COMMANDS, "pipeline": PipelineSettings, "sweep": SweepSettings}
"""Commands that read a configuration, and its settings."""


def command_of(tree: dict[str, Any]) -> str:
    """The command that a run directory's configuration belongs to, by the blocks that only it has."""
    marks = {"rewards": "train", "judge": "label", "members": "reward", "objective": "prefer"}
    return next((command for block, command in marks.items() if block in tree), "sft")
