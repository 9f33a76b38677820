"""Settings of `keel pipeline`: stages one after the other, each a command with its own configuration file."""

import json
import string
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from keel.config.base import CommandSettings, Options, RunDirectory, Section


class StageEntry(Section):
    """One stage of a pipeline: a command and its configuration."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="later stages write {name} for its directory")
    command: Literal["sft", "label", "reward", "prefer", "train", "evaluate"] = Field(description="keel COMMAND")
    config: str = Field(description="YAML file of that command, relative to this file")
    model: str | None = Field(None, description="evaluate: the model or run directory it evaluates")
    settings: Options = Field(
        {}, description="settings to change, as blocks or `a.b: value`; {name} is the directory of an earlier stage"
    )

    @model_validator(mode="after")
    def _model_fits(self) -> Self:
        if (self.command == "evaluate") != (self.model is not None):
            raise ValueError(
                f"model={self.model}: command={self.command}; expected a model with evaluate, and only there"
            )
        return self

    def changes(self) -> dict[str, Any]:
        """Changed settings as a.b -> value."""
        return dict(flat_settings(self.settings))

    def names(self) -> set[str]:
        """Stages this one reads."""
        return set(_fields([*self.changes().values(), self.model]))


def _fields(node: Any) -> Iterator[str]:
    """Names in braces, in all texts of a value. Raises ValueError for braces without one."""
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _fields(child)
    if isinstance(node, str):
        for _, field, _, _ in string.Formatter().parse(node):
            if field == "":
                raise ValueError(f"settings: {node!r} has braces without a name; expected {{stage}}, or {{{{ and }}}}")
            if field:
                yield field


def flat_settings(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings as blocks or `a.b: value` -> (a.b, value)."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat_settings(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def as_override(value: Any) -> str:
    """A value as an override reads it."""
    return json.dumps(value, ensure_ascii=False)


class PipelineRun(RunDirectory):
    """Name and directory of a pipeline."""

    name: str = Field("pipeline", pattern=r"^[A-Za-z0-9._-]+$", description="prefix of the names of its runs")
    directory: str = Field("runs/{name}", description="folder of the stages; {name} is replaced by run.name")


class PipelineSettings(CommandSettings):
    """`keel pipeline`: stages that run one after the other."""

    run: PipelineRun = Field(PipelineRun(), description="name and directory of the pipeline")
    stages: list[StageEntry] = Field(min_length=1, description="the stages, in the order in which they run")

    @model_validator(mode="after")
    def _stages_follow(self) -> Self:
        known: set[str] = set()
        for stage in self.stages:
            if stage.name in known:
                raise ValueError(f"stages: name {stage.name!r} is used twice; expected unique names")
            if unknown := stage.names() - known:
                earlier = ", ".join(sorted(known)) or "none: it is the first"
                raise ValueError(
                    f"stages.{stage.name}: {{{min(unknown)}}} is no earlier stage; expected one of {earlier}"
                )
            known.add(stage.name)
        return self
