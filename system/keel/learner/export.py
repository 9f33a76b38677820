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
from keel.learner.loading import DTYPES
from keel.text import printable

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")


def policy(target: Path, source: Path, named: Mapping[str, Tensor], settings: LearnerSpec, version: int) -> None:
    """Write a folder that `from_pretrained` and vLLM load, with the start model's tokenizer; synced to the disk."""
    target.mkdir(parents=True)
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if not path.name.endswith(".safetensors.index.json") and path.name != "MANIFEST.json":  # of other files
                shutil.copy(path, target / path.name)
    dtype = DTYPES[settings.weights_dtype]
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in named.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "README.md").write_text(_card(settings, version), encoding="utf8")
    files.sync_tree(target)


def _card(settings: LearnerSpec, version: int) -> str:
    kl, entropy = settings.regularizer.kl, settings.regularizer.entropy
    rewards = "\n".join(f"| {r.name} | {r.role} | {r.kind} | {r.weight} |" for r in settings.rewards)
    model = printable(settings.policy.model)
    return f"""---
base_model: {json.dumps(model, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
tags: [rlhf, keel, {_objective(settings)}]
---
# {settings.run.name}, step {version}

`{model}` after {version} steps of online reinforcement learning with Keel.

| setting | value |
|---|---|
| objective | {settings.objective.kind}: {_objective(settings)} |
| KL to the reference | coefficient {kl.coefficient}, in the {kl.placement} |
| entropy | {entropy.form}, coefficient {entropy.coefficient} |
| learning rate | {settings.learners.learning_rate} |
| prompts x samples a step | {settings.groups_per_step} x {settings.sampling.samples_per_prompt} |
| settings digest (sha256) | {loader.digest(settings)} |

| reward | role | kind | weight |
|---|---|---|---|
{rewards}
"""


def _objective(settings: LearnerSpec) -> str:
    """The one word that tells an objective from others of its kind."""
    words = {"policy_gradient": "advantage", "preference": "loss", "weighted_likelihood": "weights"}
    words |= {"logits_convexity": "form", "custom": "source"}
    return str(getattr(settings.objective, words[settings.objective.kind]))
