"""The contract for reward models: Keel's scores of rows in a padded batch are the classifier's own, row by row."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from keel.errors import ConfigError
from keel.learner import loading, reward_models, scaled_down_models
from keel.learner.forward_contract import difference, kept, key_of
from keel.learner.reward_text import RewardText
from keel.learner.scaled_down_models import ScaleDownError
from keel.text import one_line


def check_scores(folder: Path, setting: str) -> None:
    """Hold a sequence classifier to the contract. Raises ConfigError for a family whose scores break it."""
    config = loading.without_dropout(folder)
    if reason := kept(f"scores-{key_of(config)}", lambda: {"reason": score_difference(config)})["reason"]:
        raise ConfigError(
            f"{setting}={folder}: the scores that Keel computes for {config.model_type} are not the model's own"
            f" ({reason}); expected another family of sequence classifiers"
        )


@torch.no_grad()
def score_difference(config: Any) -> str:
    """Why scores of a small classifier like this one are not its own; empty where they are, or where none is made."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    try:
        small = scaled_down_models.scale_down(config)
        if type(small) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return ""
        small.num_labels, small.get_text_config().pad_token_id = 1, 0
        model = scaled_down_models.build(small, architecture=MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(small)])
    except ScaleDownError:
        return ""  # the start of training and scoring loads the model itself, and fails there where it must
    rng, tokens = np.random.default_rng(0), scaled_down_models.row_tokens(small)
    ids = (scaled_down_models.FIRST_ORDINARY_TOKEN, small.get_text_config().vocab_size)
    rows = [rng.integers(*ids, length).tolist() for length in (tokens + 5, 9, 3, tokens)]
    try:
        expected = np.array([float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows])
    except Exception as error:  # what a family's code makes of a plain row of tokens
        return f"its own forward fails: {type(error).__name__}: {one_line(error)[:120]}"
    text = RewardText(SimpleNamespace(model_input_names=()), reward_models.is_encoder(config), tokens + 5)
    reward = reward_models.RewardModel(model, text, 0.0)
    inputs = reward.padded([(row, len(row)) for row in rows])
    return difference(lambda: reward(*inputs).double().numpy(), expected, float(np.std(expected)))
