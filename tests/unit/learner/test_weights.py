"""weights.pack: published parameters are copied once at most, and not at all where they fill memory of their own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from keel.config.workers import LearnerSettings
from keel.learner import loading, tiny, weights
from keel.learner.engine import Engine

Named = dict[str, Tensor]


def in_one_piece(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Named:
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    memory = torch.arange(sum(sizes), dtype=dtype)
    return {name: piece.view(shapes[name]) for name, piece in zip(shapes, memory.split(sizes), strict=True)}


def received(packed: weights.Weights) -> Named:
    weights.verify(packed, {spec.name: spec.shape for spec in packed.specs}, packed.specs[0].dtype)
    return dict(weights.unpack(packed))


def is_same(one: Named, other: Named) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


SHAPES = {"a": (2, 3), "b": (5,), "c": (1, 4)}


def test_tensors_that_fill_their_memory_are_not_copied() -> None:
    named = in_one_piece(SHAPES)
    packed = weights.pack(named.items(), 1, "float32")
    assert is_same(received(packed), named)
    assert np.shares_memory(packed.buffer, named["a"].numpy()) and packed.buffer.nbytes == 15 * 4


def test_their_order_is_free() -> None:
    named = dict(sorted(in_one_piece(SHAPES).items(), reverse=True))
    packed = weights.pack(named.items(), 1, "float32")
    assert is_same(received(packed), named) and np.shares_memory(packed.buffer, named["a"].numpy())


def with_a_gap(named: Named) -> Named:
    return {name: tensor for name, tensor in named.items() if name != "b"}


def without_the_end(named: Named) -> Named:
    return {name: tensor for name, tensor in named.items() if name != "c"}


def with_an_overlap(named: Named) -> Named:
    return named | {"b": named["a"].view(-1)[1:6]}


def one_twice(named: Named) -> Named:
    return named | {"tied": named["c"]}


def of_another_memory(named: Named) -> Named:
    return named | {"b": named["b"].clone()}


def transposed(named: Named) -> Named:
    return named | {"a": named["a"].T}


CHANGES = [with_a_gap, without_the_end, with_an_overlap, one_twice, of_another_memory, transposed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_all_others_are_copied_once(change: Callable[[Named], Named]) -> None:
    named = change(in_one_piece(SHAPES))
    packed = weights.pack(named.items(), 1, "float32")
    assert is_same(received(packed), named)
    assert not np.shares_memory(packed.buffer, named["a"].numpy())
    assert packed.buffer.nbytes == 4 * sum(tensor.numel() for tensor in named.values())


def test_another_number_format_is_cast() -> None:
    named = in_one_piece(SHAPES)
    packed = weights.pack(named.items(), 1, "bfloat16")
    assert is_same(received(packed), {name: tensor.to(torch.bfloat16) for name, tensor in named.items()})


def gathered(model: torch.nn.Module, dtype: torch.dtype | None) -> Named:
    engine = Engine(LearnerSettings(), ranks=1, steps=1)
    return engine.gather(model, 0, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_in_a_number_format_they_lie_in_one_piece(tmp_path: Path, dtype: torch.dtype) -> None:
    model = loading.load_policy(tiny.write(tmp_path / "m"), "float32")
    plain = gathered(model, None)
    named = gathered(model, dtype)
    assert is_same(named, {name: tensor.to(dtype) for name, tensor in plain.items()})
    packed = weights.pack(named.items(), 1, str(dtype).removeprefix("torch."))
    assert np.shares_memory(packed.buffer, next(iter(named.values())).view(torch.uint8).numpy())
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in named.items()}
        next(model.parameters()).zero_()
    assert is_same(named, before)  # a published version does not change with the policy


def mixture_of_experts(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=3, **sizes)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


WRITERS = [lambda folder: tiny.write(folder, "gpt_neox", False), mixture_of_experts]


@pytest.mark.parametrize("write", WRITERS, ids=["renamed", "experts"])
def test_under_the_names_of_a_checkpoint_they_are_those_of_the_file(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    """Where transformers joins the experts in memory, and splits them for the file."""
    folder = write(tmp_path / "m")
    policy = loading.load_policy(folder, "float32")
    named = policy.to_hf_names(gathered(policy, torch.float32))
    packed = weights.pack(named.items(), 1, "float32")
    stored = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert {name: tuple(tensor.shape) for name, tensor in received(packed).items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert all(torch.equal(tensor, stored[name]) for name, tensor in received(packed).items())
