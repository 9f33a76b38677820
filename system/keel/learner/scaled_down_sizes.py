"""Small sizes for a model configuration, in the relations that its family relies on.

Everything here is driven by names of settings, which families share, and by the relations between their values: heads
divide the width, groups divide heads, an inner width is a multiple of the width. What one family alone does is in
`_of_family`.
"""

import math
from collections.abc import Iterable
from typing import Any

from keel.learner import size_names
from keel.learner.layer_patterns import Values

VOCABULARY = 128
WINDOW = 16
POSITIONS = 512


NESTED = ("attn_config", "ffn_config")
"""Parts of one model's configuration, MPT's and DBRX's, rather than configurations of models of their own."""
_REFUSED_PARTS = ("_name_or_path", "output_attentions")
"""What a nested configuration writes and does not read."""
_VOCABULARIES = ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input")


def width(values: Values) -> int | None:
    """The width of the model; None where the settings name none."""
    return next(iter(_sizes(values, size_names.WIDTHS).values()), None)


def small(values: Values) -> Values:
    """The settings of small sizes for a configuration's settings, which name a width."""
    wide, heads = width(values), next(iter(_sizes(values, size_names.HEADS).values()), None)
    assert wide is not None
    few, head = few_heads(heads or 4), _head_width(values)
    narrow = few * head
    changes = _widths(values, wide, narrow)
    all_heads = _sizes(values, size_names.HEADS + size_names.OTHER_HEADS)
    changes |= {name: few_heads(size) for name, size in all_heads.items()}
    changes |= _attention(values, wide // (heads or 4), head, heads)
    changes |= {name: _related(size, wide, narrow) for name, size in _sizes(values, size_names.OTHER_WIDTHS).items()}
    changes |= _experts(values) | _recurrent(values, wide, narrow) | _linear_attention(values)
    limits = size_names.AT_MOST | dict.fromkeys(_VOCABULARIES, VOCABULARY)
    limits |= dict.fromkeys(size_names.WINDOWS, WINDOW) | dict.fromkeys(size_names.LENGTHS, POSITIONS)
    limits |= {name: 16 for name in values if name.endswith("rank") and name not in changes}
    changes |= {name: min(size, limits[name]) for name, size in _sizes(values, limits).items()}
    for name in NESTED:
        if isinstance(values.get(name), dict):
            parts = {key: value for key, value in values[name].items() if key not in _REFUSED_PARTS}
            key_heads = {key: _few_key_heads(n, heads or 4) for key, n in _sizes(parts, size_names.KEY_HEADS).items()}
            changes[name] = parts | key_heads | _experts(parts) | _widths(parts, wide, narrow)
    return changes | _of_family(values | changes)


def few_heads(heads: int) -> int:
    """4 heads, or 6 where their number is no power of two: ALiBi has another rule for its slopes then."""
    return heads if heads <= 4 else 4 if heads & (heads - 1) == 0 else 6


def _sizes(values: Values, names: Iterable[str]) -> dict[str, int]:
    """Those of the named settings that are sizes: positive whole numbers."""
    return {name: values[name] for name in names if type(values.get(name)) is int and values[name] > 0}


def _widths(values: Values, wide: int, narrow: int) -> Values:
    inner = {name: _inner(name, values[name], wide, narrow) for name in size_names.INNER_WIDTHS if values.get(name)}
    return inner | {name: narrow for name in size_names.WIDTHS if values.get(name)}


def rotary_settings(values: Values) -> list[Values]:
    """The rotary settings of a configuration: one, or one for each type of layer."""
    settings = values.get("rope_parameters")
    if not isinstance(settings, dict):
        return []
    return [part for part in settings.values() if isinstance(part, dict)] or [settings]


def _head_width(values: Values) -> int:
    """Width of a head: 16, or what keeps every rotated part of it a whole even number."""
    factors = [part.get("partial_rotary_factor") for part in (values, *rotary_settings(values))]
    parts = [factor for factor in factors if isinstance(factor, int | float) and 0 < factor <= 1]
    for width in (16, 24, 32, 48, 64):
        rotated = [int(width * scale * part) for part in parts for scale in (1, 2)]
        if all(size >= 2 and size % 2 == 0 for size in rotated):
            return width
    raise ValueError(f"no small head has an even rotated part for partial_rotary_factor={parts}")


def _attention(values: Values, derived: int, head: int, heads: int | None) -> Values:
    """Heads of keys and values, widths of heads, the part of a head that is rotated."""
    changes: Values = {name: _few_key_heads(n, heads or n) for name, n in _sizes(values, size_names.KEY_HEADS).items()}
    head_widths = _sizes(values, size_names.HEAD_WIDTHS)
    changes |= {name: head if size == derived else 2 * head for name, size in head_widths.items()}
    special = _sizes(values, ("rotary_dim", "v_head_dim", "qk_rope_head_dim"))
    if "rotary_dim" in special:
        whole = values.get("head_dim") or derived
        changes["rotary_dim"] = max(2, changes.get("head_dim", head) * special["rotary_dim"] // whole // 2 * 2)
    if "v_head_dim" in special:
        changes["v_head_dim"] = 16 if special["v_head_dim"] == values.get("qk_nope_head_dim") else 24
    if "qk_rope_head_dim" in special and "head_dim" in values:
        changes["head_dim"] = 8 if values["head_dim"] == special["qk_rope_head_dim"] else 24
    listed = values.get("num_attention_heads_per_layer")
    if listed:
        changes["num_attention_heads_per_layer"] = [few_heads(heads or 4) * (1 + (size != heads)) for size in listed]
    return changes


def _few_key_heads(key_heads: int, heads: int) -> int:
    few = few_heads(heads)
    return few if key_heads == heads else 1 if key_heads == 1 else max(1, few // 2)


def _related(size: int, wide: int, narrow: int) -> int:
    return narrow if size == wide else 2 * narrow if size > wide else narrow // 2


def _inner(name: str, size: Any, wide: int, narrow: int) -> Any:
    if isinstance(size, list):
        return [_inner(name, part, wide, narrow) for part in size]
    if size == wide:
        return narrow
    return narrow // 2 if "moe" in name or "expert" in name else 2 * narrow


def _experts(values: Values) -> Values:
    """A few experts with the same form of routing: one, some or all of them a token, in groups or not."""
    numbers, grouped = (_sizes(values, names) for names in (size_names.EXPERTS, size_names.EXPERT_GROUPS))
    if not numbers:
        return {}
    experts, groups = next(iter(numbers.values())), next(iter(grouped.values()), 1)
    few = min(experts, 8 if groups > 1 else 4)
    chosen = _sizes(values, size_names.EXPERTS_A_TOKEN)
    changes: Values = dict.fromkeys(numbers, few)
    changes |= {name: few if number == experts else min(number, 2) for name, number in chosen.items()}
    if groups > 1:
        changes |= dict.fromkeys(grouped, 2) | {"topk_group": 2 if values.get("topk_group") == groups else 1}
    return changes


def _recurrent(values: Values, wide: int, narrow: int) -> Values:
    """State space layers: heads times their width is the inner width, groups divide heads."""
    expand = values.get("mamba_expand") or values.get("expand") or 1
    inner, changes = int(expand * narrow), {}
    for heads, head, groups in size_names.SSM_HEADS:
        sizes = _sizes(values, (heads, groups))
        if heads not in sizes:
            continue
        most = min(sizes[heads], 8 if head in values else 2)
        changes[heads] = next(few for few in range(most, 0, -1) if inner % few == 0)
        if head in values:
            changes[head] = inner // changes[heads]
        if groups in sizes:
            changes[groups] = 2 if sizes[groups] > 1 and changes[heads] % 2 == 0 else 1
    changes |= dict.fromkeys(_sizes(values, ("mamba_d_ssm",)), inner)
    if values.get("intermediate_size") == expand * wide and "expand" in values:
        changes["intermediate_size"] = inner
    ranks = _sizes(values, ("time_step_rank", "mamba_dt_rank"))
    return changes | {n: math.ceil(narrow / 16) if r == math.ceil(wide / 16) else 2 for n, r in ranks.items()}


def _linear_attention(values: Values) -> Values:
    """Gated delta rules: as many or more heads of values than of keys."""
    numbers = list(_sizes(values, ("linear_num_key_heads", "linear_num_value_heads")).values())
    if len(numbers) < 2:
        return {}
    few, square = min(numbers[0], 2), values.get("linear_key_head_dim") == values.get("linear_value_head_dim")
    return {
        "linear_num_key_heads": few,
        "linear_num_value_heads": few * min(numbers[1] // numbers[0], 2),
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16 if square else 32,
    }


def _of_family(values: Values) -> Values:
    """What a single family needs beside; `values` hold the small sizes already."""
    match values.get("model_type"):
        case "mamba2":
            return {"num_heads": 8, "head_dim": values["expand"] * values["hidden_size"] // 8, "n_groups": 2}
        case "rwkv":  # weights are divided at every such layer in evaluation: let it happen in a few layers
            return {"rescale_every": min(values["rescale_every"], 1)}
        case "xlstm":  # widths of queries and values are rounded up to multiples of 64
            return {"num_blocks": values["num_hidden_layers"], "hidden_size": 128, "embedding_dim": 128}
        case "hrm_text":
            return {"num_layers_per_stack": None, "num_hidden_layers": 2}
        case "deepseek_v4":
            return {"compress_rates": {k: min(rate, 8) for k, rate in values["compress_rates"].items()}, "o_groups": 2}
    return {}
