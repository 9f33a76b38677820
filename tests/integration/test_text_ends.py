"""A published checkpoint as people have them, through the real stack: where its samples end and what is seen of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import finish
from keel import schema
from keel.learner import model_files, tiny

pytestmark = pytest.mark.slow
Start = Callable[..., Any]
PAD, END, THINK = 0, 2, 3


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model: everything but its chat template ends with <pad>; <think> is special; more in it than parameters."""
    monkeypatch.setattr(tiny, "SPECIAL", [*tiny.SPECIAL, "<think>"])
    folder = tiny.write(tmp_path / "published")
    for name, key, value in (("tokenizer_config.json", "eos_token", "<pad>"), ("config.json", "eos_token_id", PAD)):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, key: value}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": PAD}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"output.weight": torch.zeros(4)}, folder / "consolidated.safetensors", metadata={"format": "pt"})
    return folder


def rollouts(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "rollouts").glob("step-*.arrow"))
    return [row for path in files for row in schema.from_bytes(path.read_bytes()).to_pylist()]


def test_samples_end_with_the_templates_token_and_rewards_see_special_ones(
    write_config: Start, keel: Start, published: Path
) -> None:
    blocks = {
        "policy": {"model": str(published)},
        "prompts": {"system_prompt": "Be brief.", "max_tokens": 96},
        "sampling": {"samples_per_prompt": 32, "max_tokens": 24, "temperature": 2.0},
        "run": {"steps": 2},
        "evaluation": {"every_steps": 2},
    }
    ended = write_config("ended", **blocks)
    code, out, err = finish(keel("train", str(ended)))
    assert code == 0, err
    assert "end tokens: '<|im_end|>' (2) of chat template; '<pad>' (0) of tokenizer" in out
    assert "warning: the tokenizer's end token is '<pad>' (0), the chat template closes a turn with '<|im_end|>'" in out
    rows = rollouts(ended.parent / "run")
    for row in rows:
        ids = row["completion_tokens"]
        assert (row["finish_reason"] == "stop") == (ids[-1] in (PAD, END)) and not {PAD, END} & set(ids[:-1])
        assert ("<think>" in row["completion"]) == (THINK in ids)
        assert "<|im_" not in row["completion"] and "<pad>" not in row["completion"]
    lasts = [row["completion_tokens"][-1] for row in rows]
    assert END in lasts and PAD in lasts and any(THINK in row["completion_tokens"] for row in rows)
    exported = next((ended.parent / "run" / "checkpoints").glob("step-*")) / "policy"
    assert dict(model_files.headers(exported)) == model_files.parameter_shapes(published)

    endless = write_config("endless", **{**blocks, "sampling": {**blocks["sampling"], "stop_token_ids": []}})
    code, out, err = finish(keel("train", str(endless)))
    assert code == 0, err
    assert "end tokens: none (sampling.stop_token_ids=[])" in out
    code, _, err = finish(keel("evaluate", str(endless.parent / "run")))
    assert code == 0, err
    evaluated = schema.from_bytes((endless.parent / "run" / "evaluation" / "evaluation.arrow").read_bytes()).to_pylist()
    everything = [*rollouts(endless.parent / "run"), *evaluated]
    assert {len(row["completion_tokens"]) for row in everything} == {24}
    assert {row["finish_reason"] for row in everything} == {"length"}
    assert any(END in row["completion_tokens"][:-1] for row in everything)
