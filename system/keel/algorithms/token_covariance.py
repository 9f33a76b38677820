"""KL-Cov and Clip-Cov (2505.22617): which tokens make the entropy fall fastest. Pure numpy, whole step at once.

Under a softmax policy the entropy of a step changes by about minus the covariance of log-prob and advantage, and a few
tokens hold most of it. What is selected depends on the rows and the version alone: not on their order, nor on how they
are divided into micro-batches and ranks.
"""

import numpy as np

from keel.algorithms import regularizers
from keel.config.covariance import CovarianceSettings

_STREAM = 11
"""Keeps the draws of a row apart from those of other terms that draw from its seed and the version."""


def covariances(logprobs: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """(log pi - mean log pi) (A - mean A) of each token, means over all tokens of the step. [tokens] -> [tokens]."""
    centered = logprobs.astype(np.float64) - logprobs.mean(dtype=np.float64)
    return centered * (advantages - advantages.mean())


def draws(seeds: np.ndarray, lengths: np.ndarray, version: int) -> np.ndarray:
    """A number in [0, 1) for each token, from its row's seed and the version."""
    return regularizers.token_draws(seeds, lengths, version, _STREAM)


def selected(covariance: np.ndarray, order: np.ndarray, config: CovarianceSettings) -> np.ndarray:
    """bool [tokens]: which ones are penalized or cut, max(1, floor(share * tokens)) of them. `order`: see `draws`.

    kl_cov: those of largest covariance (the draws break ties). clip_cov: those of smallest draw within the band, a
    uniform choice without replacement; all of the band where it holds fewer.
    """
    size = max(1, int(config.share * len(covariance)))
    places = np.lexsort((order, -covariance))
    if config.form == "clip_cov":
        places = np.argsort(order, kind="stable")
        places = places[((config.low <= covariance) & (covariance <= config.high))[places]]
    result = np.zeros(len(covariance), bool)
    result[places[:size]] = True
    return result
