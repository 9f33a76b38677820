"""Settings of KL-Cov and Clip-Cov: what happens to the tokens that make the entropy fall fastest."""

from typing import Literal, Self

from pydantic import Field, model_validator

from keel.config.base import Section


class CovarianceSettings(Section):
    """Tokens by their covariance, (log pi - its mean) (A - its mean) over the tokens of the step (2505.22617)."""

    form: Literal["kl_cov", "clip_cov"] = Field(
        description="kl_cov: the tokens of largest covariance pay a KL to the sampler; clip_cov: a random few of those"
        " within the band have no gradient",
    )
    share: float = Field(
        0.002,
        gt=0,
        le=1,
        description="of the step's tokens that are penalized or cut, at least one of them (2505.22617: kl_cov 0.0002 to"
        " 0.002, clip_cov 0.0002)",
    )
    coefficient: float = Field(1.0, gt=0, description="kl_cov: beta, loss units per nat")
    low: float = Field(1.0, description="clip_cov: smallest covariance of the band")
    high: float = Field(5.0, description="clip_cov: largest covariance of the band")

    @model_validator(mode="after")
    def _band_is_one(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low}: not below high={self.high}; expected less")
        return self

    def check_sampler(self, epochs: int, max_staleness: int) -> None:
        """Raises ValueError where the policy is the sampler itself, so that a KL between them has no gradient."""
        if self.form == "kl_cov" and epochs == 1 and max_staleness == 0:
            raise ValueError(
                "objective.covariance.form=kl_cov: with objective.epochs=1 and buffer.max_staleness=0 the policy is"
                " what sampled, and a KL to it has no gradient; expected epochs of 2 or more, or clip_cov"
            )
