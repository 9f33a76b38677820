"""Settings of pair selection: which two completions of a prompt become a preference pair."""

from typing import Literal, Self

from pydantic import Field, model_validator

from keel.config.base import Fraction, Section


class PairSettings(Section):
    """Which two completions of a prompt become a pair."""

    selection: Literal[
        "max_min", "max_random", "random", "max_max", "best_of_n_vs_policy", "all", "most_disagreeing"
    ] = Field(
        "max_min",
        description="best and worst; best and another; any two; the two best; best of samples 1.. and sample 0;"
        " every two; the pair of the plausible set on which the reward ensemble disagrees most (Sim-OPRL)",
    )
    length_penalty: float = Field(0.0, ge=0, description="reward units per token, for the selection only")
    min_margin: float = Field(0.0, ge=0, description="pairs whose rewards differ by no more are dropped and counted")
    finished_only: bool = Field(False, description="leave out completions that did not end by themselves")
    judge: str | None = Field(None, description="name of the reward that orders a pair; null: the training reward")
    stop_settled_ratio: Fraction | None = Field(
        None, description="most_disagreeing: the run ends when this share of prompts has one plausible answer left"
    )

    @model_validator(mode="after")
    def _stop_fits(self) -> Self:
        if self.stop_settled_ratio is not None and self.selection != "most_disagreeing":
            raise ValueError(
                f"stop_settled_ratio={self.stop_settled_ratio}: selection={self.selection} has no plausible set;"
                " expected most_disagreeing"
            )
        return self
