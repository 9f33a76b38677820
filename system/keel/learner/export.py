"""A trained policy as a Hugging Face folder: weights, tokenizer, chat template, model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from keel import files
from keel.config import loader
from keel.config.run import LearnerSpec
from keel.config.stages import OfflineSpec
from keel.learner.loading import DTYPES
from keel.text import printable

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")


def policy(
    target: Path,
    source: Path,
    named: Mapping[str, Tensor],
    settings: LearnerSpec,
    version: int,
    coefficients: Mapping[str, float],
) -> None:
    """Write a folder that `from_pretrained` and vLLM load, with the start model's tokenizer; synced to the disk.

    `coefficients` by metric name, as they are in force at this step.
    """
    target.mkdir(parents=True)
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if not path.name.endswith(".safetensors.index.json") and path.name != "MANIFEST.json":  # of other files
                shutil.copy(path, target / path.name)
    dtype = DTYPES[settings.weights_dtype]
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in named.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "README.md").write_text(_card(settings, version, coefficients), encoding="utf8")
    files.sync_tree(target)


def _card(settings: LearnerSpec, version: int, coefficients: Mapping[str, float]) -> str:
    rewards = "\n".join(f"| {r.name} | {r.role} | {r.kind} | {r.weight} |" for r in settings.rewards)
    model = printable(settings.policy.model)
    stored = isinstance(settings, OfflineSpec)
    training = "training on stored completions" if stored else "online reinforcement learning"
    return f"""---
base_model: {json.dumps(model, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
tags: [rlhf, keel, {_objective(settings)}]
---
# {settings.run.name}, step {version}

`{model}` after {version} steps of {training} with Keel.{_best(settings)}

| setting | value |
|---|---|
{_settings(settings, coefficients)}
| prompts x samples a step | {settings.groups_per_step} x {settings.sampling.samples_per_prompt} |
| settings digest (sha256) | {loader.digest(settings)} |

| reward | role | kind | weight |
|---|---|---|---|
{rewards}
"""


def _best(settings: LearnerSpec) -> str:
    """Where a better policy may be: training on goes past the best one where a reward is over-optimized."""
    guard = getattr(settings, "guard", None)
    monitor = guard.monitor_of([reward.name for reward in settings.rewards]) if guard and guard.keep_best else None
    return (
        f" Of this run's policies the best by `{monitor}` is `RUN_DIR/best`, not always the last one."
        if monitor
        else ""
    )


def _settings(settings: LearnerSpec, coefficients: Mapping[str, float]) -> str:
    """Rows of what the objective is made of: its word, the regularizers, the rate, then all that is no default."""
    kl, entropy = settings.regularizer.kl, settings.regularizer.entropy
    rows = {
        "objective": f"{settings.objective.kind}: {_objective(settings)}",
        "KL to the reference": f"coefficient {kl.coefficient}, in the {kl.placement}",
        "entropy": f"{entropy.form}, coefficient {entropy.coefficient}",
        "learning rate": f"{settings.learners.learning_rate}",
    }
    for name, start in (("kl_coefficient", kl.coefficient), ("entropy_coefficient", entropy.coefficient)):
        if (now := coefficients.get(name, start)) != start:
            rows[f"{name} in force at this step"] = f"{now:.6g}"
    blocks = {"objective", "regularizer", "ensemble", "shaping"}
    chosen = settings.model_dump(mode="json", include=blocks, exclude_defaults=True)
    for name, value in loader.dotted(chosen):
        rows[f"`{name.removeprefix('.')}`"] = printable(json.dumps(value, ensure_ascii=False)).replace("|", "\\|")
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _objective(settings: LearnerSpec) -> str:
    """The one word that tells an objective from others of its kind."""
    words = {"policy_gradient": "advantage", "preference": "loss", "weighted_likelihood": "weights"}
    words |= {"logits_convexity": "form", "custom": "source"}
    return str(getattr(settings.objective, words[settings.objective.kind]))
