"""Model folders as they are published: more files than the weights, more tensors than the parameters, or fewer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from keel.errors import ConfigError
from keel.learner import loading, model_files, reward_models, tiny, weights
from keel.stages import policy as policy_stage

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The folder with other tensors in its one weight file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def in_shards(folder: Path) -> Path:
    """The folder with its weights in two files and an index."""
    names = sorted(load_file(folder / "model.safetensors").items())
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard, metadata={"format": "pt"})
    tree = {"metadata": {}, "weight_map": {name: shard for shard, tensors in shards.items() for name, _ in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))
    (folder / "model.safetensors").unlink()
    return folder


def published(folder: Path) -> dict[str, tuple[int, ...]]:
    """What a learner publishes of the model that it loads from the folder."""
    policy = loading.load_policy(folder, "float32")
    named = policy.to_hf_names({name: parameter.detach() for name, parameter in policy.named_parameters()})
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def tied_llama(folder: Path) -> Path:
    return rewritten(tiny.write(folder), lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})


def old_llama(folder: Path) -> Path:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    return rewritten(tiny.write(folder, tied=False), lambda t: {**t, name: torch.zeros(4)})


def old_pythia(folder: Path) -> Path:
    layer = "gpt_neox.layers.0.attention"
    buffers = {
        f"{layer}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{layer}.masked_bias": torch.tensor(-1e9),
        f"{layer}.rotary_emb.inv_freq": torch.zeros(8),
    }
    return rewritten(tiny.write(folder, "gpt_neox", tied=False), lambda t: {**t, **buffers})


def gpt_2(folder: Path) -> Path:
    """As the first one was published: names without transformer., masks, and a head."""
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=32)).save_pretrained(folder)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return rewritten(folder, lambda t: {**{n.removeprefix("transformer."): v for n, v in t.items()}, **masks})


def bloom(folder: Path) -> Path:
    BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(folder)
    return rewritten(folder, lambda t: {**t, "lm_head.weight": t["transformer.word_embeddings.weight"]})


def mixtral(folder: Path) -> Path:
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(folder)
    return rewritten(folder, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})


def beside_another_format(folder: Path) -> Path:
    tiny.write(folder)
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, folder / "consolidated.safetensors")
    return folder


def shards_beside_another_format(folder: Path) -> Path:
    in_shards(tiny.write(folder, "qwen2", tied=False))
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, folder / "consolidated-00001-of-00001.safetensors")
    return folder


LARGER = [tied_llama, old_llama, old_pythia, gpt_2, bloom, mixtral, beside_another_format, shards_beside_another_format]


@pytest.mark.parametrize("write", LARGER, ids=lambda write: write.__name__)
def test_a_checkpoint_that_holds_more_is_the_model(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Generators expect what learners publish: parameters, no buffers, a tied head once."""
    folder = write(tmp_path / "m")
    expected = model_files.parameter_shapes(folder)
    assert expected == published(folder)
    assert expected.items() != dict(model_files.headers(folder)).items() or "another_format" in write.__name__
    assert not [name for name in expected if "rotary" in name or "masked" in name or "wq" in name]
    model = loading.load_policy(folder, "float32")
    assert model_files.num_parameters(folder) == sum(parameter.numel() for parameter in model.parameters())
    packed = weights.pack(((name, torch.zeros(shape)) for name, shape in expected.items()), 1, "float32")
    weights.verify(packed, expected, "float32")


@pytest.mark.parametrize("write", LARGER[:3] + LARGER[6:], ids=lambda write: write.__name__)
def test_such_a_checkpoint_is_located(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    assert loading.locate_policy(str(folder), "policy.model") == folder


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("shards", [False, True])
def test_a_parameter_that_is_missing_is_one_line(name: str, shards: bool, tmp_path: Path) -> None:
    folder = rewritten(tiny.write(tmp_path / "m"), lambda t: {n: v for n, v in t.items() if n != name})
    folder = in_shards(folder) if shards else folder
    with pytest.raises(
        ConfigError, match=rf"^policy.model=.*[12] parameters are missing \(({name}|lm_head.weight)\)"
    ) as caught:
        loading.locate_policy(str(folder), "policy.model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["rewards.r.source", "objective.critic.model"])
def test_a_reward_model_that_lacks_a_weight_is_one_line(setting: str, tmp_path: Path) -> None:
    model = reward_models.start(tiny.write(tmp_path / "trunk"), "float32", 40, 0)
    named = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    reward_models.write(tmp_path / "m", model, named)
    model_files.check_whole(tmp_path / "m", setting)
    name = "model.layers.1.mlp.up_proj.weight"
    rewritten(tmp_path / "m", lambda t: {n: v for n, v in t.items() if n != name})
    with pytest.raises(ConfigError, match=rf"^{setting}: .*1 parameters are missing \({name}\)"):
        model_files.check_whole(tmp_path / "m", setting)


def test_a_head_that_is_missing_is_no_tied_one(tmp_path: Path) -> None:
    folder = rewritten(
        tiny.write(tmp_path / "m", tied=False), lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"}
    )
    with pytest.raises(ConfigError, match=r"1 parameters are missing \(lm_head.weight\)"):
        loading.locate_policy(str(folder), "policy.model")


def test_weights_of_another_shape_are_one_line(tmp_path: Path) -> None:
    folder = rewritten(tiny.write(tmp_path / "m"), lambda t: {**t, "model.norm.weight": torch.ones(7)})
    with pytest.raises(
        ConfigError, match=r"^reference.model=.*1 parameters are of another shape \(model.norm.weight\)"
    ):
        loading.locate_policy(str(folder), "reference.model")


def test_a_tied_head_with_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    """transformers would train two matrices, vLLM sample with one."""
    folder = rewritten(
        tiny.write(tmp_path / "m"), lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}
    )
    with pytest.raises(ConfigError, match=r"config.json ties lm_head.weight to the embedding, but its weights hold"):
        loading.locate_policy(str(folder), "policy.model")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight_map": ["a"]}', "cannot be read"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "1 of its 1 files are missing: gone.safetensors"),
    ],
)
def test_an_index_that_does_not_hold_is_one_line(index: str, message: str, tmp_path: Path) -> None:
    folder = in_shards(tiny.write(tmp_path / "m"))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=message) as caught:
        loading.locate(str(folder), "policy.model")
    assert "\n" not in str(caught.value)


def test_another_format_alone_is_one_line(tmp_path: Path) -> None:
    folder = beside_another_format(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"consolidated.safetensors is not in transformers' layout"):
        loading.locate(str(folder), "policy.model")


@pytest.mark.parametrize("write", LARGER, ids=lambda write: write.__name__)
def test_an_engine_is_shown_the_weights_alone(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Without an index vLLM opens every *.safetensors of a folder."""
    folder = write(tmp_path / "m")
    with model_files.served(folder) as served:
        shown = {path.name for path in served.glob("*.safetensors")}
        if not (served / "model.safetensors.index.json").is_file():
            assert shown == {path.name for path in model_files.weight_files(folder)}
        assert json.loads((served / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
        assert (served == folder) == (write is not beside_another_format)
    assert folder.is_dir() and served.exists() == (served == folder)


def test_a_reward_head_is_looked_for_in_the_weights(tmp_path: Path) -> None:
    """Not in what lies beside them; also in shards."""
    model = reward_models.start(tiny.write(tmp_path / "trunk"), "float32", 40, 0)
    named = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    reward_models.write(tmp_path / "m", model, named)
    save_file({"score.weight": torch.zeros(3, 4)}, tmp_path / "m" / "adapter.safetensors")
    reward_models.check_head(tmp_path / "m", "rewards.r.source")
    reward_models.check_head(in_shards(tmp_path / "m"), "rewards.r.source")
    trunk = tiny.write(tmp_path / "policy")
    shutil.copy(tmp_path / "m" / "adapter.safetensors", trunk)
    with pytest.raises(ConfigError, match="has no score head"):
        reward_models.check_head(trunk, "rewards.r.source")


def test_reference_logprobs_are_kept_by_the_weights_alone(tmp_path: Path) -> None:
    class Settings:
        class reference:
            dtype = "float32"

    def key() -> str:
        return policy_stage._key(Settings, str(folder), [])  # type: ignore[arg-type]

    folder = tiny.write(tmp_path / "m")
    first = key()
    save_file({"a": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert key() == first
    rewritten(folder, lambda t: {**t, "model.norm.weight": t["model.norm.weight"] + 1})
    assert key() != first


# ---- families that read more than text


def composite(folder: Path, **fields: Any) -> Path:
    """A folder whose configuration is that of an image family."""
    tiny.write(folder)
    config = Gemma3Config(text_config={**SIZES, "head_dim": 16})
    tree = config.to_dict() | fields
    (folder / "config.json").write_text(json.dumps(tree, default=str))
    return folder


@pytest.mark.parametrize("architectures", [None, ["Gemma3ForConditionalGeneration"], ["Gemma3ForCausalLM"]])
def test_an_image_family_is_refused_by_name(architectures: Any, tmp_path: Path) -> None:
    folder = composite(tmp_path / "m", architectures=architectures)
    with pytest.raises(ConfigError, match=r"^policy.model=.*model_type=gemma3 reads more than text; .*gemma3_text"):
        loading.locate_policy(str(folder), "policy.model")


def test_an_image_family_is_refused_as_a_reward_model_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rewards.r.source=.*model_type=gemma3 reads more than text"):
        reward_models.check_readable(composite(tmp_path / "m"), "rewards.r.source")


def test_a_model_without_a_language_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match=r"model_type=vit has no causal language model"):
        loading.locate_policy(str(folder), "policy.model")


def test_sizes_are_those_of_the_text_model(tmp_path: Path) -> None:
    folder = composite(tmp_path / "m")
    assert model_files.vocabulary(folder, "m") == 96
    config = AutoConfig.from_pretrained(folder)
    assert reward_models.limit(config) == config.text_config.max_position_embeddings
    config.text_config.attention_dropout = 0.5
    config.save_pretrained(folder)
    assert loading.without_dropout(folder).text_config.attention_dropout == 0.0
