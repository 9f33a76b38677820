"""Families with windows, scaled logits and recurrent layers through `keel sft` and `keel train`, beside transformers.

The models are random and far from uniform, prompts and answers are longer than every window, and everything is fp32:
what Keel prints must be what the plain model says, to rounding.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from commands import finish
from keel.config import loader
from keel.config.stages import SupervisedSettings
from keel.learner import tiny
from keel.stages import policy

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": SIZES | {"sliding_window": 16, "head_dim": 32},
    "granite": SIZES | {"logits_scaling": 8.0, "embedding_multiplier": 4.0, "attention_multiplier": 0.2},
    "falcon_h1": SIZES | {"head_dim": 32, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16, "lm_head_multiplier": 0.25},
}  # fmt: skip
"""Mistral's shape, Granite's, and a hybrid of recurrent layers beside attention."""
PROMPT = "The quick brown fox jumps over the lazy dog. What is love? A good question number"


def write(folder: Path, family: str) -> Path:
    """A random model of a family with the tiny tokenizer, in Hugging Face layout; the folder."""
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    values = FAMILIES[family] | {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_loss(folder: Path, rows: Any) -> float:
    """Mean over completion tokens of -log p, every row read by the model alone."""
    model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    pairs = zip(*(rows.column(name).to_pylist() for name in ("prompt_tokens", "completion_tokens")), strict=True)
    for prompt, completion in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        losses.append(-logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_held_out_loss_of_sft_is_the_models_own(family: str, tmp_path: Path, keel: Callable[..., Any]) -> None:
    folder = write(tmp_path / "model", family)
    rows = [
        {"prompt": f"{PROMPT} {n}", "completion": f" the lazy dog {n} is over a brown fox" * (1 + n % 3)}
        for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run": {"name": "sft", "directory": str(tmp_path / "run")},
        "policy": {"model": str(folder)},
        "prompts": {"source": str(tmp_path / "rows.jsonl"), "max_tokens": 80, "held_out": 8},
        "completions": {"max_tokens": 96},
        "training": {"rows_per_step": 8, "max_steps": 1},
        "learners": {"precision": "fp32", "threads": 1, "learning_rate": 1e-4, "packed_tokens": 400},
        "cluster": {"address": "local", "object_store_bytes": 2**27, "min_memory_bytes": 2**31},
        "metrics": {"port": 0},
    }  # fmt: skip
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(tree))
    code, out, err = finish(keel("sft", str(path)))
    assert code == 0, err
    first = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[0])
    settings = loader.load_as(SupervisedSettings, path)
    settings = settings.model_copy(
        update={"run": settings.run.model_copy(update={"directory": str(tmp_path / "other")})}
    )
    expected = plain_loss(folder, policy.prepare(settings).rows.held_out())
    print(f"{family}: held-out loss {first['loss']:.4f}, transformers {expected:.4f}")
    assert first["step"] == 0 and first["loss"] == pytest.approx(expected, abs=2e-4)
    assert ("takes one row a sequence" in out + err) == (family == "falcon_h1"), out + err


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_where_the_sampler_is(
    family: str, tmp_path: Path, keel: Callable[..., Any], write_config: Any
) -> None:
    """Before any update learner, sampler and reference are one model: no gap, no KL, with four samples a prompt."""
    folder = write(tmp_path / "model", family)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{PROMPT} {n}"}) + "\n" for n in range(6)))
    path = write_config(
        family,
        policy={"model": str(folder)},
        run={"steps": 2},
        prompts={"source": str(prompts), "max_tokens": 80, "held_out": 2},
        sampling={"samples_per_prompt": 4, "max_tokens": 24},
        regularizer={"kl": {"coefficient": 0.1}},
        checkpoint={"every_steps": 0},
    )
    code, _, err = finish(keel("train", str(path)))
    assert code == 0, err
    first, second = map(json.loads, (path.parent / "run" / "metrics.jsonl").read_text().splitlines())
    print(
        f"{family}: step 1 gap {first['gap_nats']:.5f} nats, KL {first['kl_nats']:.4f}; step 2 gap {second['gap_nats']:.5f}"
    )
    assert first["gap_nats"] < 5e-3 and first["fresh_gap_nats"] == first["gap_nats"]
    assert second["gap_nats"] < 5e-3, "the sampler holds what was trained"
    assert abs(first["kl_nats"]) < 0.05
