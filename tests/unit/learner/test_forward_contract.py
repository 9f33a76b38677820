"""Keel's passes against the plain forward of many model families: alone, behind a shared prompt, packed."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from keel.errors import ConfigError
from keel.learner import (
    attention_masks,
    forward_contract,
    loading,
    packing,
    scaled_down_models,
    score_contract,
    states_to_logits,
    tiny,
)
from keel.learner.forward_contract import Verdict
from keel.learner.networks import Policy

ALL, ALONE = (True, True, True), (True, False, False)
SMALL = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"max_position_embeddings": 256, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
LLAMA = SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[bool, bool, bool]]] = {
    "llama": ("llama", LLAMA, ALL),
    "window in every layer": ("mistral", LLAMA | {"sliding_window": 16}, ALL),
    "window in one layer of two": ("gemma2", LLAMA | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}, ALL),
    "window in all layers but the first": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, ALL),
    "chunks": ("llama4_text", LLAMA | {"head_dim": 8, "attention_chunk_size": 16, "num_hidden_layers": 4, "intermediate_size_mlp": 64, "num_local_experts": 2}, ALL),
    "sinks and a window": ("gpt_oss", LLAMA | {"head_dim": 8, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, ALL),
    "logits divided": ("granite", LLAMA | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}, ALL),
    "logits multiplied": ("cohere", LLAMA | {"logit_scale": 0.0625}, ALL),
    "experts": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}, ALL),
    "learned positions": ("gpt2", {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": 1, "bos_token_id": 2}, ALL),
    "a decoder inside the trunk": ("opt", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 256, "dropout": 0.0}, None),
    "positions from a mask": ("bloom", {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}, ALONE),
    "a window by index": ("gpt_neo", {"vocab_size": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256, "eos_token_id": 1, "bos_token_id": 2}, ALONE),
    "recurrent": ("mamba", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, ALONE),
    "convolutions": ("lfm2", LLAMA | {"layer_types": ["conv", "full_attention"]}, ALONE),
    "recurrent beside attention, logits multiplied": ("falcon_h1", LLAMA | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "lm_head_multiplier": 0.04}, ALONE),
}  # fmt: skip
ROW = 40


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of(name: str) -> Any:
    family, values, _ = FAMILIES[name]
    return CONFIG_MAPPING[family](**values)


def verdict_of(name: str, implementation: str | None = None) -> Verdict:
    config = config_of(name)
    if implementation:
        config._attn_implementation = implementation
    return forward_contract.of_seeds(lambda seed: scaled_down_models.build(config, seed), ROW)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_is_the_models_own_or_is_known_not_to_be(name: str) -> None:
    result = verdict_of(name)
    expected = FAMILIES[name][2]
    if expected is None:
        assert result.alone
    else:
        assert (result.alone, result.shared, result.packed) == expected, result.reasons
    assert set(result.reasons) == {part for part in ("alone", "shared", "packed") if not getattr(result, part)}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "window in every layer", "window in one layer of two", "chunks"])
def test_each_attention_implementation_gets_the_mask_it_reads(name: str, implementation: str) -> None:
    """Eager attention adds its mask: True in place of 0 would let rows see one another."""
    assert verdict_of(name, implementation).reasons == {}


# ---- the faults that were there: each must be seen


def one_mask_for_all_layers(layout: Any) -> Any:
    return contextlib.nullcontext()


def by_index(layout: packing.SequenceLayout) -> Any:
    """Windows counted along the sequence in place of along the row."""
    places = torch.arange(layout.places.shape[1]).expand_as(layout.places)
    return ORIGINAL(packing.SequenceLayout(places, layout.prompts, layout.completions))


ORIGINAL = attention_masks.of_rows


@pytest.mark.parametrize("name", ["llama", "window in every layer", "logits divided"])
def test_rows_that_see_one_another_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_masks, "of_rows", one_mask_for_all_layers)
    result = verdict_of(name)
    assert (result.alone, result.shared, result.packed) == ALONE, result.reasons


@pytest.mark.parametrize("name", ["window in every layer", "window in one layer of two", "chunks"])
def test_a_window_along_the_sequence_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_masks, "of_rows", by_index)
    assert not verdict_of(name).packed


@pytest.mark.parametrize("name", ["logits divided", "logits multiplied", "window in one layer of two"])
def test_a_head_taken_for_the_whole_map_to_logits_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "logits", lambda policy, states, head=None: policy.head(states))
    assert not verdict_of(name).alone


def test_noise_in_training_is_noticed_and_switched_off(tmp_path: Path) -> None:
    noisy = CONFIG_MAPPING["mixtral"](**FAMILIES["experts"][1] | {"router_jitter_noise": 0.5, "attention_dropout": 0.2})
    assert not forward_contract.of_seeds(lambda seed: scaled_down_models.build(noisy, seed), ROW).alone
    noisy.save_pretrained(tmp_path)
    quiet = loading.without_dropout(tmp_path)
    assert (quiet.router_jitter_noise, quiet.attention_dropout) == (0.0, 0.0)
    assert forward_contract.of_seeds(lambda seed: scaled_down_models.build(quiet, seed), ROW).alone


# ---- rows alone, padded


@pytest.mark.parametrize("name", ["llama", "learned positions", "logits divided"])
def test_padding_makes_no_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unlike lengths, each its own sequence: attention stays causal and grouped, without a dense mask."""
    seen: list[tuple[bool, bool]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments: Any, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> Any:
        seen.append((attn_mask is None, is_causal))
        return attend(*arguments, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = scaled_down_models.build(config_of(name))
    rows = forward_contract._rows(128, 10, seed=0)
    units = packing.plan(rows, 1, packing.TokenBudget(10_000, 0, 64)).micro_batches[0]
    assert len(units) == 1 and len(units[0]) == rows.num_rows, "one padded micro-batch"
    expected = forward_contract._plain(model, rows)
    seen.clear()
    micro = packing.tensors(rows, units[0])
    logprobs = Policy(model)(micro, 1.0)[0].detach().numpy()
    assert seen and set(seen) == {(True, True)}
    assert logprobs == pytest.approx(expected[micro.items], abs=1e-4)


# ---- between trunk and head


@pytest.mark.parametrize("name", ["logits divided", "window in one layer of two", "a decoder inside the trunk"])
def test_logits_of_states_are_the_models_own_and_so_are_their_gradients(name: str) -> None:
    model = scaled_down_models.build(config_of(name))
    policy = Policy(model)
    ids = torch.randint(16, 128, (1, 12), generator=torch.Generator().manual_seed(3))
    weights = torch.randn(12, 128)
    whole = model(input_ids=ids).logits[0]
    (whole * weights).sum().backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    states = policy.trunk(input_ids=ids).last_hidden_state[0]
    pieces = torch.cat([policy.logits(states[:5]), policy.logits(states[5:])])
    (pieces * weights).sum().backward()
    assert torch.allclose(pieces, whole, atol=1e-5)
    outcome = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert outcome.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.allclose(outcome[parameter], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6), parameter


def test_another_head_reads_for_one_call_only() -> None:
    policy = Policy(scaled_down_models.build(config_of("logits divided")))
    states = torch.randn(3, 32)
    before = policy.logits(states)
    other = torch.nn.Linear(32, 128, bias=False)
    assert torch.allclose(policy.logits(states, other), other(states) / 8.0, atol=1e-6)
    assert torch.equal(policy.logits(states), before)
    assert not any(isinstance(module, states_to_logits.GivenStates) for module in policy.modules())


def test_a_failing_forward_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(scaled_down_models.build(config_of("llama")))
    trunk = policy.trunk
    with pytest.raises((RuntimeError, IndexError), match=r"shape|dimension"):
        policy.logits(torch.randn(3, 7))
    assert policy.trunk is trunk and policy.model.model is trunk


# ---- what a stage does with a verdict


def folder_of(name: str, folder: Path) -> Path:
    config_of(name).save_pretrained(folder)
    return folder


def test_a_family_that_fails_alone_is_refused_in_one_line(tmp_path: Path) -> None:
    CONFIG_MAPPING["bert"](**SMALL | {"num_hidden_layers": 2}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"policy\.model=.*bert are not the model's own.*; expected") as caught:
        forward_contract.require({"policy.model": tmp_path}, 64)
    assert "\n" not in str(caught.value)


def test_a_family_that_needs_rows_of_their_own_is_named_once(tmp_path: Path) -> None:
    hybrid, llama = folder_of("convolutions", tmp_path / "a"), folder_of("llama", tmp_path / "b")
    folders = {"policy.model": hybrid, "reference.model": hybrid, "objective.dense.teacher": llama}
    (line,) = forward_contract.require(folders, 64)
    assert line.startswith("policy.model: lfm2 takes one row a sequence (shared: log-probs differ by up to")


def test_a_verdict_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("convolutions", tmp_path / "m")
    first = forward_contract.verdict(folder, 64)
    monkeypatch.setattr(scaled_down_models, "build", lambda *arguments, **options: pytest.fail("made again"))
    assert forward_contract.verdict(folder, 64) == first and not first.shared
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"rms_norm_eps": 0.5, "norm_eps": 0.5}))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        forward_contract.verdict(folder, 64)


def test_a_cache_that_cannot_be_written_to_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "file" / "cache"))
    folder = folder_of("convolutions", tmp_path / "m")
    assert forward_contract.verdict(folder, 64) == forward_contract.verdict(folder, 64) != Verdict()


def test_a_copy_of_a_model_has_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run is longer: the scaled-down model, and so the verdict, is the same."""
    first = forward_contract.verdict(folder_of("convolutions", tmp_path / "one"), 64)
    monkeypatch.setattr(scaled_down_models, "build", lambda *arguments, **options: pytest.fail("made again"))
    copy = folder_of("convolutions", tmp_path / "two")
    assert forward_contract.verdict(copy, 65) == forward_contract.verdict(copy) == first


def test_a_family_whose_own_forward_fails_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, rows: Any) -> Any:
        raise RuntimeError("shape of\nnothing")

    monkeypatch.setattr(forward_contract, "_plain", broken)
    with pytest.raises(ConfigError, match="its own forward fails: RuntimeError: shape of nothing"):
        forward_contract.require({"policy.model": folder_of("llama", tmp_path)}, 64)


def test_a_model_that_cannot_be_scaled_down_is_tried_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(config: Any, longest_row: int | None = None) -> Any:
        raise scaled_down_models.ScaleDownError("of no size")

    monkeypatch.setattr(scaled_down_models, "scale_down", none)
    tried: list[tuple[str, int]] = []
    check = forward_contract.check

    def spy(model: Any, tokens_per_row: int, seed: int = 0) -> Verdict:
        tried.append((model.config.model_type, tokens_per_row))
        return check(model, tokens_per_row, seed)

    monkeypatch.setattr(forward_contract, "check", spy)
    assert forward_contract.verdict(tiny.write(tmp_path / "m", "qwen2"), 40) == Verdict()
    assert tried == [("qwen2", 40 - 19)], "no row is longer than the run's longest"


def test_what_holds_for_two_models_holds_for_their_micro_batches() -> None:
    one, other = Verdict(shared=False, reasons={"shared": "a"}), Verdict(packed=False, reasons={"packed": "b"})
    assert one.both(other) == Verdict(True, False, False, {"shared": "a", "packed": "b"})
    assert other.both(Verdict()) == other


# ---- reward models


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert", "roberta", "gemma2", "qwen3"])
def test_scores_of_padded_rows_are_the_classifiers_own(family: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    assert score_contract.score_difference(loading.without_dropout(tmp_path)) == ""


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_scores_that_are_not_its_own_refuse_a_classifier(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keel.learner.reward_models import RewardModel

    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    forward = RewardModel.forward
    full = lambda model, ids, lengths, seconds: forward(model, ids, torch.full_like(lengths, ids.shape[1]), seconds)  # noqa: E731
    monkeypatch.setattr(RewardModel, "forward", full)  # padding taken for text
    with pytest.raises(ConfigError, match=rf"judge=.*scores that Keel computes for {family} are not the model's own"):
        score_contract.check_scores(tmp_path, "judge")
