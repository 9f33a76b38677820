"""What the guard reads of an evaluation: one value a completion, by name, from the rows of the held-out prompts."""

import numpy as np
import pyarrow as pa

from keel.config.run import Settings
from keel.observability.diagnostics import per_completion


def held_out_values(batch: pa.RecordBatch, settings: Settings) -> dict[str, np.ndarray]:
    """Float64 [rows] by name, NaN where a row has none; names that the run does not measure are absent.

    proxy: the training reward; monitor: guard.monitor or gold; entropy: -log pi(y)/|y|, nats a token; length: tokens;
    repetition: share of repeated 3-grams; reference_nll: -log ref(y)/|y|, nats a token.
    """
    values = per_completion(batch)
    monitor = settings.guard.monitor_of([reward.name for reward in settings.rewards])
    named = {
        "proxy": "reward",
        "monitor": f"reward_{monitor}",
        "entropy": "entropy_nats",
        "length": "length_tokens",
        "repetition": "repetition_ratio",
        "reference_nll": "reference_nll_nats",
    }
    return {name: values[column] for name, column in named.items() if column in values}


def members(batch: pa.RecordBatch, settings: Settings) -> np.ndarray | None:
    """Rewards of the members of the ensemble [M, rows], NaN where one failed; None: the run trains on no ensemble."""
    if settings.ensemble.form == "sum" or len(settings.train_rewards) < 2:
        return None
    columns = [batch.column(f"reward_{reward.name}") for reward in settings.train_rewards]
    weights = np.array([reward.weight for reward in settings.train_rewards])
    return np.stack([column.to_numpy(zero_copy_only=False).astype(np.float64) for column in columns]) * weights[:, None]


def folder_spread(batch: pa.RecordBatch, settings: Settings) -> np.ndarray | None:
    """Standard deviation over the members of a folder of reward models, [rows]; None: no training reward is one."""
    names = [f"reward_{reward.name}_std" for reward in settings.train_rewards]
    named = [name for name in names if name in batch.schema.names]
    return batch.column(named[0]).to_numpy(zero_copy_only=False).astype(np.float64) if named else None
