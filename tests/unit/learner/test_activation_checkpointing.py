"""Layers that run forward again in the backward pass: the same gradients to the bit, and less kept in between."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_forward_contract import FAMILIES, LLAMA, ROW, config_of
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification

from keel.errors import ConfigError
from keel.learner import activation_checkpointing, forward_contract, packing, scaled_down_models, tiny
from keel.learner.networks import Policy

Gradients = dict[str, Tensor]


def gradients(model: Any, budget: packing.TokenBudget, rows: Any) -> tuple[Gradients, int]:
    """Of the completions' log-probs and entropies, as a learner's pass computes them; bytes kept for the backward pass."""
    policy = Policy(model).train()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    plan = packing.plan(rows, ranks=1, budget=budget)
    for units, chunks in zip(plan.micro_batches[0], plan.head_chunks, strict=True):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logprobs, entropies = policy(packing.tensors(rows, units), 0.7, chunks)
        assert entropies is not None
        (logprobs.square().sum() - 0.1 * entropies.sum()).backward()
    named = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    return named, sum(kept.values())


def of_family(name: str, part: str, wanted: bool) -> tuple[Gradients, int]:
    model = scaled_down_models.build(config_of(name), 0)
    assert activation_checkpointing.enable(model, wanted) is wanted
    rows = forward_contract._rows(model.config.vocab_size, ROW, 0)
    return gradients(model, forward_contract._budgets(rows)[part], rows)


PASSES = [(name, part) for name in FAMILIES for part, can in zip(forward_contract.PASSES, FAMILIES[name][2] or (True, False, False), strict=True) if can]  # fmt: skip


@pytest.mark.parametrize(("name", "part"), PASSES)
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(name: str, part: str) -> None:
    """Rows alone, behind a shared prompt and packed: a layer that runs again must see the masks of its rows."""
    plain, kept = of_family(name, part, False)
    again, kept_with = of_family(name, part, True)
    assert list(plain) == list(again) and any(float(gradient.abs().max()) > 1e-4 for gradient in plain.values())
    for parameter, gradient in plain.items():
        assert torch.equal(gradient, again[parameter]), parameter
    assert kept_with < 0.8 * kept


def one_layer_more(build: Callable[[Any], Any], wanted: bool, **sizes: Any) -> float:
    """Bytes that a layer keeps of a token."""
    kept = []
    for layers in (1, 2):
        model = build(CONFIG_MAPPING["llama"](**LLAMA | sizes | {"num_hidden_layers": layers})).train()
        activation_checkpointing.enable(model, wanted)
        total: dict[int, int] = {}

        def pack(tensor: Tensor, total: dict[int, int] = total) -> Tensor:
            total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.arange(64)[None] + 3)
        kept.append(sum(size for place, size in total.items() if place not in own))
    return (kept[1] - kept[0]) / 64


@pytest.mark.parametrize("build", [AutoModel.from_config, AutoModelForSequenceClassification.from_config])
def test_a_checkpointed_layer_keeps_its_input(build: Callable[[Any], Any]) -> None:
    """Of a trunk and of a reward model: H numbers of 4 bytes a token."""
    sizes = {"hidden_size": 64, "intermediate_size": 224}
    assert one_layer_more(build, True, **sizes) == pytest.approx(64 * 4, rel=0.05)
    assert one_layer_more(build, False, **sizes) > 8 * 64 * 4


def test_null_is_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModel.from_config(config_of("llama"))
    size = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(activation_checkpointing, "LARGE_PARAMETERS", size + 1)
    assert not activation_checkpointing.enable(model, None)
    monkeypatch.setattr(activation_checkpointing, "LARGE_PARAMETERS", size)
    assert activation_checkpointing.enable(model, None)


def test_a_family_without_checkpoints_is_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["openai-gpt"](vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    model = AutoModel.from_config(config)
    model.save_pretrained(tmp_path)
    message = (
        r"^learners\.activation_checkpointing=true: transformers has none for openai-gpt \(policy\.model\); expected"
    )
    with pytest.raises(ConfigError, match=message):
        activation_checkpointing.check_supported(tmp_path, "policy.model", True)
    for wanted in (None, False):
        activation_checkpointing.check_supported(tmp_path, "policy.model", wanted)
    assert not activation_checkpointing.enable(model, True)
    activation_checkpointing.check_supported(tiny.write(tmp_path / "llama"), "policy.model", True)
