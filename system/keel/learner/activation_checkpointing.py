"""Activation checkpointing: a layer keeps its input alone for the backward pass, where it runs forward again.

Of a token a Llama layer keeps about 10.5 H + 4 I numbers (H hidden, I intermediate size; 196 KiB in bf16 at the shape
of 8 B, measured), with checkpointing H numbers (8 KiB). It costs a forward pass more. Gradients are the same to the
bit where a layer is a function of its inputs, which that of a model without dropout is.
"""

from pathlib import Path
from typing import Any

from keel.errors import ConfigError

LARGE_PARAMETERS = 10**9
"""From this size on it is the default: a model of a billion parameters keeps about 1.7 MB a token in bf16, 7 GB for a
micro-batch of 4,096 tokens: more than its weights, gradients and a share of its optimizer state on 8 ranks."""


def enable(model: Any, wanted: bool | None) -> bool:
    """Let every layer of a transformers model be checkpointed where it is wanted, or null and the model is large.

    Returns whether they are now.
    """
    large = sum(parameter.numel() for parameter in model.parameters()) >= LARGE_PARAMETERS
    on = bool(model.supports_gradient_checkpointing) and (large if wanted is None else wanted)
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # embeddings that require gradients are of use to reentrant ones alone
    return on


def check_supported(folder: Path, named: str, wanted: bool | None) -> None:
    """Raise ConfigError where it is wanted and transformers cannot checkpoint the layers of this folder's family."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    family = MODEL_MAPPING[type(config)]
    if wanted and not family.supports_gradient_checkpointing:
        raise ConfigError(
            f"learners.activation_checkpointing=true: transformers has none for {config.model_type} ({named});"
            " expected null or false"
        )
