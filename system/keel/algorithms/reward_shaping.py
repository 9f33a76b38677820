"""What length and end of a completion do to its reward. Pure numpy, [rows] -> [rows]."""

import numpy as np

from keel.config.rewards import ShapingSettings


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
