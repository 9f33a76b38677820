"""What reference scores, length and end of a completion do to its reward. Pure numpy, [rows] -> [rows]."""

import json
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from keel.config.rewards import ShapingSettings
from keel.errors import ConfigError


def shape(
    rewards: np.ndarray, lengths: np.ndarray, finished: np.ndarray, max_tokens: int, config: ShapingSettings
) -> np.ndarray:
    """Rewards after the rules for completions that are long or did not end by themselves.

    overlong (DAPO, 2503.14476): 0 up to max_tokens - buffer, then linear down to -penalty at max_tokens;
    missing end: minus a constant (TRL), or a reward of its own whatever the score was (2403.17031: -1).
    """
    shaped = rewards - config.missing_end_penalty * ~finished
    if config.missing_end_reward is not None:
        shaped = np.where(finished, shaped, config.missing_end_reward)
    if config.overlong_buffer_tokens:
        excess = lengths - (max_tokens - config.overlong_buffer_tokens)
        shaped = shaped - config.overlong_penalty * np.clip(excess / config.overlong_buffer_tokens, 0.0, 1.0)
    return shaped


def preference_as_reward(rewards: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """PAR (2502.18770): mean_m sigmoid(r(y) - r(y_m)), y_m answers of the start policy to the same prompt.

    In (0, 1): the estimated probability that y is preferred to such an answer, if r is a Bradley-Terry reward. What
    is far above the references gains nothing more, so the slope vanishes where a reward model is least to be trusted.
    rewards [rows], references: scores [M] of each row's prompt.
    """
    return np.array([expit(reward - scores).mean() for reward, scores in zip(rewards, references, strict=True)])


def reference_scores(rows: Sequence[str], column: str) -> list[np.ndarray]:
    """Scores of reference answers of each row, from the JSON of its further columns. Raises ConfigError."""
    known = {row: _scores(row, column) for row in dict.fromkeys(rows)}
    return [known[row] for row in rows]


def _scores(row: str, column: str) -> np.ndarray:
    value = json.loads(row).get(column)
    scores = value if isinstance(value, list) else [value]
    if not scores or not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise ConfigError(
            f"shaping.reference_scores={column}: a row of the prompts has no finite number there; expected a column"
            " of prompts.source with the training reward of one reference answer, or a list of several"
        )
    return np.array(scores, np.float64)
