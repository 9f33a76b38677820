"""How long each stage takes: measured on runs (measurement.py), or given. What `keel plan` simulates with.

    stage     fixed_seconds + sequence_seconds * sequences of the batch           the fixed part: prefill, Python, Ray
    generator fixed_seconds * waves + sequence_seconds * sequences of the batch   more than max_sequences take waves
    learner   fixed_seconds + sequence_seconds * sequences / ranks                the fixed part: optimizer, collectives
              + communication_seconds, with more than one rank
    weights   publish_seconds, then load_seconds in every generator at once
              + node_seconds * (nodes - 1)                                        a broadcast passes every node

A straight line needs two sizes of batch. Evaluations are such a second size for generators and scorers, a second run
for all; where there is one size only, an assumed share of the time is fixed (ASSUMED_FIXED_RATIO).
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from keel.config.base import Fraction, Section

ASSUMED_FIXED_RATIO = {"generator": 0.5, "reference": 0.2, "scorer": 0.2, "learner": 0.2}
"""Decoding reads the weights once a token however many sequences there are; passes over whole sequences scale."""


def waves(sequences: float, max_sequences: int) -> float:
    """Rounds in which a generator decodes a batch: it takes max_sequences together, and one round at the least."""
    return max(sequences / max_sequences, 1.0)


class _LineRates(Section):
    fixed_seconds: float = Field(ge=0, description="of a batch, whatever its size")
    sequence_seconds: float = Field(ge=0, description="more for each sequence of it")
    variation_ratio: float = Field(0, ge=0, description="standard deviation over mean of a lognormal duration")
    relative_seconds: list[Annotated[float, Field(ge=0)]] = Field(
        [], description="measured durations over their mean; drawn from, if given"
    )

    def seconds(self, sequences: float, passes: float = 1.0) -> float:
        """Mean of a batch."""
        return self.fixed_seconds * passes + self.sequence_seconds * sequences


class StageRates(_LineRates):
    cpu_ratio: Fraction = Field(1, description="share of the time in which cores compute; the rest is waiting")


class LearnerRates(_LineRates):
    communication_seconds: float = Field(0, ge=0, description="of a step, with more than one rank")

    @model_validator(mode="after")
    def _takes_time(self) -> Self:
        if not self.seconds(1):
            raise ValueError("fixed_seconds=0, sequence_seconds=0: a step takes time; expected one above 0")
        return self


class WeightRates(Section):
    publish_seconds: float = Field(ge=0, description="the learner's side of a weight sync")
    load_seconds: float = Field(ge=0, description="one generator takes them over")
    node_seconds: float = Field(0, ge=0, description="more for each node beyond the first")


class DriverRates(Section):
    add_seconds: float = Field(0, ge=0, description="scored rows until the buffer has them on disk")
    take_seconds: float = Field(0, ge=0, description="the last row of a step until the learner has the step")
    advance_seconds: float = Field(0, ge=0, description="weights loaded until new tickets open")
    checkpoint_seconds: float = Field(0, ge=0, description="one checkpoint")


class Rates(Section):
    """Rates of one model on one kind of machine. `keel plan --save-rates` writes this as YAML."""

    source: str = Field("given", description="where the numbers come from, for the reader")
    tokens_per_sequence: float = Field(gt=0, description="mean completion length")
    generator: StageRates
    reference: StageRates | None = None
    scorer: StageRates
    learner: LearnerRates
    weights: WeightRates
    driver: DriverRates = DriverRates()
    policy_parameters: int | None = Field(None, ge=1, description="for memory; null: counted in the model's files")

    def of(self, role: str) -> StageRates:
        rates = {"generator": self.generator, "reference": self.reference, "scorer": self.scorer}[role]
        assert rates is not None, role
        return rates
