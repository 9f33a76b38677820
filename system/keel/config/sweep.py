"""Settings of `keel sweep`: arms x seeds of online runs that start from one configuration."""

import itertools
import json
import re
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from keel.config.base import Options, Seconds, Section
from keel.config.pipeline import flat_settings

ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]
GridValues = Annotated[list[Any], Field(min_length=1)]
_SET_BY_THE_SWEEP = ("run.seed", "run.name", "run.directory")


class SweepSettings(Section):
    """`keel sweep`: arms x seeds as one unit that can be interrupted and continued."""

    base: str | Options = Field(
        description="what all runs start from: a configuration of keel train, relative to this file, or its blocks"
    )
    arms: dict[ArmName, Options | None] = Field(
        min_length=1, description="name -> settings to change, as blocks or `a.b: value`; the first is the baseline"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        [0, 1, 2], min_length=1, description="run.seed of the runs of every arm"
    )
    grid: dict[str, GridValues] = Field(
        {}, description="setting (a.b) -> its values; every arm is run with every combination of them"
    )
    directory: str = Field("runs/sweep", min_length=1, description="folder of the runs and of what is made of them")
    concurrent_runs: int = Field(
        1, ge=1, description="runs under way at the same time; above 1 their output is in DIRECTORY/output"
    )
    budget_seconds: Seconds | None = Field(
        None, description="time after which a call stops the runs under way, with a checkpoint; null: none"
    )

    def changes(self) -> dict[str, dict[str, Any]]:
        """Arms with those of the grid -> changed settings as a.b -> value."""
        last = [setting.rpartition(".")[2] for setting in self.grid]
        short = {s: name if last.count(name) == 1 else s for s, name in zip(self.grid, last, strict=True)}
        arms = {}
        for arm, settings in self.arms.items():
            for values in itertools.product(*self.grid.values()):
                point = dict(zip(self.grid, values, strict=True))
                name = "-".join([arm, *(f"{short[setting]}-{_word(value)}" for setting, value in point.items())])
                if name in arms:
                    raise ValueError(f"grid: two arms are called {name}; expected values that are told apart by name")
                arms[name] = dict(flat_settings(settings or {})) | point
        return arms

    @model_validator(mode="after")
    def _arms_and_seeds_are_unique(self) -> Self:
        if repeated := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ValueError(f"seeds: {repeated[0]} is there twice; expected different seeds")
        for name, changes in self.changes().items():
            if taken := [setting for setting in _SET_BY_THE_SWEEP if setting in changes]:
                raise ValueError(f"arms.{name}: {taken[0]} is set by the sweep; expected other settings")
        return self


def _word(value: Any) -> str:
    """A value as a part of a name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", value if isinstance(value, str) else json.dumps(value)).strip("_") or "_"
