"""How the learner is optimized: DeepSpeed's configuration, parameter groups, the rate of a step."""

import math
from typing import Any

import torch

from keel.config.passed_options import merged
from keel.config.workers import LearnerSettings
from keel.learner.networks import Learnable


def optimizer(learners: LearnerSettings, module: Learnable, critic_rate: float | None) -> torch.optim.Optimizer:
    """AdamW over two groups: the policy at the configured rate, the critic (if any) at its own or the same."""
    groups = [{"params": list(module.policy.parameters()), "lr": learners.learning_rate}]
    if module.critic is not None:
        groups.append({"params": list(module.critic.parameters()), "lr": critic_rate or learners.learning_rate})
    return adamw(learners, groups)


def adamw(learners: LearnerSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW at the configured numbers over parameter groups, each with its own rate or the configured one."""
    return torch.optim.AdamW(
        groups,
        lr=learners.learning_rate,
        betas=learners.adam_betas,
        eps=learners.adam_epsilon,
        weight_decay=learners.weight_decay,
        fused=True,
    )


def engine_config(learners: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's configuration. The caller owns accumulation: backward accumulates, step() updates."""
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": learners.zero_stage, "overlap_comm": False},
        # an update whose gradient is not finite is skipped: Engine.update relies on it
        "bf16": {"enabled": learners.precision == "bf16", "check_grad_overflow": True},
        "gradient_clipping": learners.max_grad_norm,
        "steps_per_print": 10**9,
    }
    return merged(own, learners.deepspeed)


def learning_rate(learners: LearnerSettings, version: int, steps: int) -> float:
    """Rate of the step that starts from `version`: a pure function, so a resumed run needs no scheduler state."""
    if version < learners.warmup_steps:
        return learners.learning_rate * (version + 1) / learners.warmup_steps
    progress = (version - learners.warmup_steps) / max(1, steps - learners.warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return learners.learning_rate * factors[learners.schedule]
