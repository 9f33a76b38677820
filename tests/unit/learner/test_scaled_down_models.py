"""A scaled-down model is small and differs from its model in sizes only: layers, windows, scales, caps and rotary settings stay."""

import copy
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from keel.learner import layer_patterns, loading, scaled_down_models, size_names

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    from public_models import PUBLIC

SAMPLE = [
    "Llama 3.1 8B",
    "Mistral 7B v0.1",
    "Qwen 1.5 7B with its window",
    "Gemma 2 9B",
    "Phi 2",
    "Phi 3 mini 128k",
    "Granite 3.3 2B",
    "Command R7B",
    "Falcon RW 1B (ALiBi)",
    "Falcon 7B",
    "Falcon H1 1.5B",
    "Jamba v0.1",
    "LFM2 1.2B",
    "GPT-Neo 1.3B",
    "RecurrentGemma 2B",
    "DeepSeek V2",
    "GPT-OSS 20B",
    "BLOOM 560M",
]
ROW = 80
UNBUILT = {
    "blt": "parameters, over",
    "cohere_compass_text": "full_attention",
    "dbrx": "rope_theta",
    "deepseek_v2": "topk",
    "dots1": "empty",
    "gemma3n": "timm",
    "gemma4_assistant": "names no hidden size",
    "gemma4_unified_assistant": "names no hidden size",
    "hunyuan_v1_dense": "NoneType",
    "hunyuan_v1_moe": "NoneType",
    "lfm2_moe": "NoneType",
    "ministral": "NoneType",
    "nemotron": "NoneType",
    "qwen4_exp": "NoneType",
    "qwen4_exp_text": "NoneType",
    "reformer": "is_decoder",
    "xmod": "language",
}
"""Families whose class's own defaults give no model that runs, most of them at full size either, and the reason."""
SIZES = {
    *size_names.WIDTHS,
    *size_names.HEADS,
    *size_names.OTHER_HEADS,
    *size_names.KEY_HEADS,
    *size_names.HEAD_WIDTHS,
    *size_names.OTHER_WIDTHS,
    *size_names.INNER_WIDTHS,
    *size_names.LENGTHS,
    *size_names.WINDOWS,
    *size_names.EXPERTS,
    *size_names.EXPERTS_A_TOKEN,
    *size_names.EXPERT_GROUPS,
    *size_names.AT_MOST,
    *layer_patterns.COUNTS,
    *(name for triple in size_names.SSM_HEADS for name in triple),
}
SIZES |= {"vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "topk_group"}
SIZES |= {"encoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack", "num_query_groups"}
SIZES |= {"mamba_d_ssm", "time_step_rank", "mamba_dt_rank", "rotary_dim", "v_head_dim", "qk_head_dim", "compress_rates"}
SIZES |= {"linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "o_groups"}
LAYERS = {
    *("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "attention_types", "attention_layers"),
    *("no_rope_layers", "layer_rope_theta", "activation_sparsity_pattern", "num_attention_heads_per_layer"),
    *("moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers", "hybrid_layer_ids"),
    *("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_layer_end_index"),
    *("num_kv_shared_layers", "attn_layer_period", "attn_layer_offset", "expert_layer_period", "per_layer_config"),
    *("rescale_every", "final_w_init_variance_scale"),
}


def public(name: str) -> Any:
    settings = copy.deepcopy(PUBLIC[name])
    return CONFIG_MAPPING[settings.pop("model_type")].from_dict(settings)


def logits(config: Any) -> torch.Tensor:
    """Logits of two rows that are longer than every window of a scaled-down model, with the same weights for the same sizes."""
    model = scaled_down_models.build(config)
    vocabulary = config.get_text_config().vocab_size
    drawn = torch.Generator().manual_seed(1)
    tokens = torch.randint(scaled_down_models.FIRST_ORDINARY_TOKEN, vocabulary, (2, ROW), generator=drawn)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict) and path[-1:] != ("per_layer_config",) and path[-1:] != ("compress_rates",):
        for name, value in tree.items():
            yield from leaves(value, (*path, str(name)))
    else:
        yield path, tree


def changed(config: Any, small: Any) -> set[str]:
    """Names of the settings in which a scaled-down model differs, the last part of those that are nested."""
    before, after = dict(leaves(config.to_dict())), dict(leaves(small.to_dict()))
    return {path[-1] for path in before | after if before.get(path) != after.get(path)}


def kinds(config: Any) -> set[str]:
    """What the layers of a model are made of: modules, parameter names, and whether each has a window or rotates."""
    architecture = scaled_down_models.text_architecture(config)
    with torch.device("meta"):
        model = architecture._from_config(copy.deepcopy(config))
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    outer = [stack for stack in stacks if not any(stack is not other and _inside(stack, other) for other in stacks)]
    return {_kind(layer) for stack in outer for layer in stack}


def _inside(stack: torch.nn.Module, other: torch.nn.Module) -> bool:
    return any(module is stack for module in other.modules())


def _kind(layer: torch.nn.Module) -> str:
    facts = []
    for name, module in layer.named_modules():
        flags = [getattr(module, flag, None) for flag in ("sliding_window", "window_size", "attention_window_size")]
        switches = [
            str(getattr(module, flag, None)) for flag in ("use_rope", "is_sliding", "layer_type", "attention_type")
        ]
        windowed = [bool(flag) and flag != -1 for flag in flags]
        facts.append((re.sub(r"\d+", "#", name), type(module).__name__, windowed, switches))
        facts += [(re.sub(r"\d+", "#", name), key) for key, _ in module.named_parameters(recurse=False)]
    return str(sorted({str(fact) for fact in facts}))


def check_scaled_down(config: Any) -> None:
    small = scaled_down_models.scale_down(config)
    whole = {name for name in changed(config, small) if "dropout" not in name and "pdrop" not in name}
    rotary = {"original_max_position_embeddings", "short_factor", "long_factor", "mrope_section"}
    ignored = {"dtype", "router_jitter_noise", "layerdrop", "decoder_layerdrop", "encoder_layerdrop"}
    unexpected = {name for name in whole - SIZES - LAYERS - rotary - ignored if not name.endswith(("rank", "token_id"))}
    assert unexpected == set()
    assert kinds(small) == kinds(config)
    text, original = small.get_text_config().to_dict(), config.get_text_config().to_dict()
    for name in size_names.WINDOWS:
        size = original.get(name)
        assert (size is None or size <= 0) == (text.get(name) is None or text[name] <= 0), name
        assert not size or text[name] < scaled_down_models.row_tokens(small) <= ROW, name
    if hasattr(config.get_text_config(), "layer_types") and config.get_text_config().layer_types:
        assert set(small.get_text_config().layer_types) == set(config.get_text_config().layer_types)
    assert torch.isfinite(logits(small)).all()


@pytest.mark.parametrize("name", SAMPLE)
def test_a_scaled_down_model_differs_in_sizes_only_and_runs(name: str) -> None:
    check_scaled_down(public(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in SAMPLE])
def test_a_scaled_down_model_of_every_public_model_differs_in_sizes_only_and_runs(name: str) -> None:
    check_scaled_down(public(name))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family_of_transformers_can_be_scaled_down_or_has_a_reason(family: str) -> None:
    if family.startswith("musicgen"):
        pytest.skip("its configuration needs those of three other models")
    config = CONFIG_MAPPING[family]()
    if family not in UNBUILT:
        assert torch.isfinite(logits(scaled_down_models.scale_down(config))).all()
        return
    with pytest.raises(
        (scaled_down_models.ScaleDownError, AssertionError, TypeError, ValueError), match=UNBUILT[family]
    ):
        logits(scaled_down_models.scale_down(config))


@pytest.mark.parametrize(
    ("name", "setting", "neutral"),
    [
        ("Mistral 7B v0.1", "sliding_window", None),
        ("StarCoder 2 3B", "sliding_window", None),
        ("Phi 3 mini 4k", "sliding_window", None),
        ("Gemma 3 1B", "sliding_window", 512),
        ("Command R7B", "sliding_window", 512),
        ("Qwen 1.5 7B with its window", "sliding_window", 512),
        ("GPT-OSS 20B", "sliding_window", 512),
        ("Exaone 4 32B", "sliding_window", 512),
        ("GPT-Neo 1.3B", "window_size", 512),
        ("RecurrentGemma 2B", "attention_window_size", 512),
        ("Llama 4 Scout (text)", "attention_chunk_size", 512),
        ("Llama 4 Scout (text)", "floor_scale", 8192),
        ("Granite 3.3 2B", "logits_scaling", 1.0),
        ("Granite 3.3 2B", "embedding_multiplier", 1.0),
        ("Granite 3.3 2B", "residual_multiplier", 1.0),
        ("Granite 3.3 2B", "attention_multiplier", 1.0),
        ("Gemma 2 9B", "final_logit_softcapping", None),
        ("Gemma 2 9B", "query_pre_attn_scalar", 16),
        ("RecurrentGemma 2B", "logits_soft_cap", 0.1),
        ("Command R7B", "logit_scale", 1.0),
        ("Command R+", "use_qk_norm", False),
        ("Falcon RW 1B (ALiBi)", "alibi", False),
        ("Falcon RW 1B (ALiBi)", "parallel_attn", True),
        ("Pythia 410M", "use_parallel_residual", False),
        ("Falcon H1 1.5B", "lm_head_multiplier", 1.0),
        ("Falcon H1 1.5B", "key_multiplier", 1.0),
        ("MiniCPM 3 4B", "scale_depth", 1.0),
        ("OLMo 7B", "clip_qkv", 0.1),
        ("DeepSeek V2", "routed_scaling_factor", 1.0),
        ("SmolLM2 135M", "tie_word_embeddings", False),
        ("GPT-J 6B", "rotary_dim", 16),
        ("OPT 350M", "do_layer_norm_before", True),
    ],
)
def test_what_changes_the_function_is_kept_and_shows(name: str, setting: str, neutral: Any) -> None:
    """The scaled-down model has the model's own value, and its logits are others without it."""
    config = public(name)
    small = scaled_down_models.scale_down(config)
    if setting not in size_names.WINDOWS and setting not in SIZES:
        assert getattr(small, setting) == getattr(config, setting) != neutral
    other = copy.deepcopy(small)
    setattr(other, setting, neutral)
    assert (logits(small)[:, -1] - logits(other)[:, -1]).abs().max() > 1e-3 * logits(small)[:, -1].abs().max()


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("Gemma 3 1B", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}),
        ("Gemma 2 9B", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("SmolLM3 3B", {"no_rope_layers": [1, 1, 1, 0]}),
        ("LFM2 1.2B", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
        ("Bamba 9B", {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}),
        ("RecurrentGemma 2B", {"layers_block_type": ["recurrent", "recurrent", "attention"]}),
        ("GPT-Neo 1.3B", {"attention_layers": ["global", "local"]}),
        ("Mixtral 8x7B", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}),
        (
            "Jamba v0.1",
            {
                "layers_block_type": ["mamba"] * 4 + ["attention", "mamba"],
                "layers_num_experts": [1, 4, 1, 4, 1, 4],
            },
        ),
    ],
)
def test_the_layer_pattern_is_kept(name: str, listed: dict[str, Any]) -> None:
    small = scaled_down_models.scale_down(public(name))
    assert {setting: getattr(small, setting) for setting in listed} == listed


def test_heads_keep_their_grouping_and_alibi_its_other_rule() -> None:
    grouped, single, all_heads = (
        scaled_down_models.scale_down(public(name)) for name in ("Llama 3.1 8B", "Gemma 3 1B", "Llama 2 7B")
    )
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (4, 2)
    assert (single.num_attention_heads, single.num_key_value_heads) == (4, 1)
    assert (all_heads.num_attention_heads, all_heads.num_key_value_heads) == (4, 4)
    assert scaled_down_models.scale_down(public("Falcon 7B")).num_attention_heads == 6, (
        "71 heads are no power of two, nor are 6"
    )


@pytest.mark.parametrize("name", ["Phi 3 mini 128k", "Phi 4 mini", "Hunyuan 7B"])
def test_rotary_lengths_are_crossed_where_the_run_crosses_them(name: str) -> None:
    """Longrope and dynamic angles depend on the longest row of a batch, but only beyond the trained length."""
    config = public(name)
    trained = getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    short, longer = (
        scaled_down_models.scale_down(config, longest_row=trained),
        scaled_down_models.scale_down(config, longest_row=trained + 1),
    )
    assert scaled_down_models.scale_down(config).to_dict() == short.to_dict()
    crossed = [
        getattr(small, "original_max_position_embeddings", small.max_position_embeddings) for small in (short, longer)
    ]
    assert crossed == [trained, 24] and scaled_down_models.row_tokens(longer) > 24
    if "dynamic" not in str(config.rope_parameters):
        drawn = logits(short), logits(longer)
        assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def test_longrope_keeps_its_factors_and_its_scale_of_attention() -> None:
    config = public("Phi 3 mini 128k")
    small, crossing = scaled_down_models.scale_down(config), scaled_down_models.scale_down(config, longest_row=8192)
    assert small.rope_parameters["rope_type"] == crossing.rope_parameters["rope_type"] == "longrope"
    assert small.rope_parameters["long_factor"] == config.rope_parameters["long_factor"][::6]
    assert small.max_position_embeddings / small.original_max_position_embeddings == 32
    assert crossing.max_position_embeddings / crossing.original_max_position_embeddings == 32
    scales = [float(scaled_down_models.build(each).model.rotary_emb.attention_scaling) for each in (small, crossing)]
    assert scales == pytest.approx([1.1902380714238083] * 2), "sqrt(1 + ln 32 / ln 4096), as of the whole model"


def test_yarn_and_llama3_settings_stay_as_they_are() -> None:
    for name in ("Llama 3.1 8B", "DeepSeek V3", "GPT-OSS 20B", "OLMo 3 7B", "Exaone 4 32B"):
        config = public(name)
        small = scaled_down_models.scale_down(config)
        assert small.rope_parameters == config.rope_parameters
        assert small.max_position_embeddings == config.max_position_embeddings


def test_special_tokens_are_inside_and_stay_apart() -> None:
    config = public("Llama 3.1 8B")
    small = scaled_down_models.scale_down(config)
    ids = [small.bos_token_id, *small.eos_token_id]
    assert len(set(ids)) == 3 and all(0 <= number < scaled_down_models.FIRST_ORDINARY_TOKEN for number in ids)
    one = scaled_down_models.scale_down(public("Phi 4 mini"))
    assert one.bos_token_id == one.eos_token_id == one.pad_token_id < scaled_down_models.FIRST_ORDINARY_TOKEN
    kept = scaled_down_models.scale_down(CONFIG_MAPPING["llama"](bos_token_id=1, eos_token_id=2, pad_token_id=None))
    assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id) == (1, 2, None)


def test_dropout_is_off_and_the_model_untouched() -> None:
    config = CONFIG_MAPPING["gpt2"]()
    before = config.to_dict()
    small = scaled_down_models.scale_down(config)
    scaled_down_models.build(small)
    assert config.to_dict() == before
    assert (small.resid_pdrop, small.embd_pdrop, small.attn_pdrop) == (0.0, 0.0, 0.0)


def test_scaling_down_twice_changes_nothing() -> None:
    for name in SAMPLE:
        small = scaled_down_models.scale_down(public(name))
        assert scaled_down_models.scale_down(small).to_dict() == small.to_dict(), name


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    small = scaled_down_models.scale_down(public("Llama 2 7B"))
    torch.manual_seed(5)
    following = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (
        scaled_down_models.build(small),
        scaled_down_models.build(small),
        scaled_down_models.build(small, seed=1),
    )
    assert torch.equal(torch.rand(3), following)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(left, right) for left, right, _ in pairs)
    assert not any(torch.equal(left, right) for left, _, right in pairs)


@pytest.mark.parametrize(
    ("family", "listed"),
    [
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("llama4", "Llama4ForCausalLM"),
        ("qwen3_5", "Qwen3_5ForCausalLM"),
        ("emu3", "Emu3ForCausalLM"),
        ("llama", "LlamaForCausalLM"),
        ("mistral3", None),
        ("llava", None),
        ("qwen2_vl", None),
        ("qwen2_5_vl", None),
        ("qwen3_vl", None),
        ("smolvlm", None),
    ],
)
def test_image_families_are_loaded_as_transformers_lists_them_or_not_at_all(family: str, listed: str | None) -> None:
    architecture = scaled_down_models.text_architecture(CONFIG_MAPPING[family]())
    assert (architecture and architecture.__name__) == listed
    if listed and family != "emu3":
        assert (
            type(scaled_down_models.build(scaled_down_models.scale_down(CONFIG_MAPPING[family]()))).__name__ == listed
        )


def test_what_cannot_be_scaled_down_has_a_reason() -> None:
    with pytest.raises(scaled_down_models.ScaleDownError, match=r"gemma4_assistant: its small .* names no hidden size"):
        scaled_down_models.scale_down(CONFIG_MAPPING["gemma4_assistant"]())
    with pytest.raises(
        scaled_down_models.ScaleDownError, match=r"blt: its scaled-down model has .* parameters, over 16,000,000"
    ):
        scaled_down_models.build(scaled_down_models.scale_down(CONFIG_MAPPING["blt"]()))
    each = CONFIG_MAPPING["granite_swa"](num_hidden_layers=40, layer_rope_theta=[1e4 + layer for layer in range(40)])
    with pytest.raises(
        scaled_down_models.ScaleDownError, match="granite_swa: no choice of its 40 layers has all 40 kinds of them"
    ):
        scaled_down_models.scale_down(each)
    with pytest.raises(scaled_down_models.ScaleDownError, match="clip: transformers has no causal language model"):
        scaled_down_models.build(CONFIG_MAPPING["clip"]())


def same_by_any_attention(config: Any) -> bool:
    """Whether the attention that a scaled-down model runs with gives the logits of plain (eager) attention."""
    small = scaled_down_models.scale_down(config)
    eager = copy.deepcopy(small)
    eager._attn_implementation = "eager"
    return torch.allclose(logits(small).log_softmax(-1), logits(eager).log_softmax(-1), atol=1e-3)


@pytest.mark.parametrize("name", ["Gemma 2 9B", "Gemma 3 1B", "Llama 3.1 8B", "Granite 3.3 2B"])
def test_attention_leaves_no_setting_out(name: str) -> None:
    """Scaled dot product attention drops Gemma 2's cap on attention logits: such a model is run without it."""
    config = public(name)
    if name == "Gemma 2 9B":
        config.attn_logit_softcapping = 0.5  # so that it shows
    assert same_by_any_attention(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "Falcon RW 1B (ALiBi)"])  # eager adds ALiBi twice
def test_attention_of_no_public_model_leaves_a_setting_out(name: str) -> None:
    config = public(name)
    if getattr(config, "attn_logit_softcapping", None):
        config.attn_logit_softcapping = 0.5
    assert same_by_any_attention(config)


@pytest.fixture
def start_method() -> Iterator[None]:
    """Progress bars of the checkpoint readers choose how processes start."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("start_method")
@pytest.mark.parametrize("load", [loading.load_policy, loading.load_trunk])
def test_a_model_with_capped_attention_is_loaded_so_that_the_cap_acts(load: Any, tmp_path: Path) -> None:
    config = public("Gemma 2 9B")
    config.attn_logit_softcapping = 0.5
    small = scaled_down_models.scale_down(config)
    scaled_down_models.build(small).save_pretrained(tmp_path)
    loaded = load(tmp_path, "float32")
    loaded = getattr(loaded, "model", loaded)
    tokens = torch.arange(20, 60)[None]
    eager = type(loaded).from_pretrained(tmp_path, attn_implementation="eager")
    dropped = type(loaded).from_pretrained(tmp_path, attn_implementation="sdpa")
    with torch.no_grad():
        states = [model.eval()(input_ids=tokens)[0] for model in (loaded, eager, dropped)]
    assert torch.allclose(states[0], states[1], atol=1e-5)
    assert not torch.allclose(states[0], states[2], atol=1e-2)
