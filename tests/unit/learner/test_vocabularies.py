"""Models that read the policy's tokens have its vocabulary: a smaller one is refused like a larger one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from keel.config import loader
from keel.errors import ConfigError
from keel.learner import tiny
from keel.online import models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("vocabularies") / "tiny")


def beside(model: Path, folder: Path, more: int) -> Path:
    """A copy of the model with more tokens, in its embedding too."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    rows = torch.arange(len(embedding) + more) % len(embedding)
    tensors["model.embed_tokens.weight"] = embedding[rows].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "vocab_size": tree["vocab_size"] + more}))
    return folder


def run_of(model: Path, **blocks: Any) -> Any:
    return loader.parse(
        {
            "policy": {"model": str(model)},
            "prompts": {"source": "p", "max_tokens": 8},
            "rewards": [{"name": "a", "source": "m:f"}],
            **blocks,
        }
    )


SETTINGS = {
    "objective.critic.model": lambda folder: {"advantage": "gae", "critic": {"model": folder}},
    "objective.dense.teacher": lambda folder: {
        "kind": "logits_convexity", "anchor": "reference", "dense": {"teacher": folder}
    },
}  # fmt: skip


@pytest.mark.parametrize("more", [-1, 1, -100, 100])
@pytest.mark.parametrize("setting", [*SETTINGS, "reference.model"])
def test_another_number_of_tokens_is_refused_by_name(model: Path, tmp_path: Path, setting: str, more: int) -> None:
    other = beside(model, tmp_path / "other", more)
    blocks = {"objective": SETTINGS[setting](str(other))} if setting in SETTINGS else {}
    reference = str(other) if setting == "reference.model" else str(model)
    with pytest.raises(ConfigError, match="tokens in its vocabulary") as caught:
        models.learner_folders(run_of(model, **blocks), model, reference)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    assert str(caught.value).startswith(f"{setting}={other}: {size + more} tokens in its vocabulary; expected")
    assert str(caught.value).endswith(str(size)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_the_same_number_is_accepted_and_its_folder_handed_on(model: Path, tmp_path: Path, setting: str) -> None:
    other = beside(model, tmp_path / "other", 0)
    settings = run_of(model, objective=SETTINGS[setting](str(other)))
    result = models.learner_folders(settings, model, str(model))
    assert result == {setting.split(".")[1].replace("dense", "teacher"): str(other), "reference": str(model)}
    assert models.learner_folders(run_of(model), model, None) == {}


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_two_models_of_a_stage_have_the_same_vocabulary(model: Path, tmp_path: Path, more: int) -> None:
    other = beside(model, tmp_path / "other", more)
    for subject, second in ((model, other), (other, model)):
        if more:
            with pytest.raises(
                ConfigError, match=rf"reference\.model={second}: \d+ tokens in its vocabulary; expected"
            ):
                models.check_vocabulary(subject, second, "reference.model")
        else:
            models.check_vocabulary(subject, second, "reference.model")
