"""Scale a model configuration down to small sizes that compute the same kind of function.

What a forward pass can get wrong lies in the architecture, the layer pattern, windows, scales, caps, rotary settings
and norms, not in widths. A scaled-down model keeps all of the former and is built and run in a fraction of a
second, so that the model's own forward pass can be compared with Keel's before a run starts.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

from keel.errors import KeelError
from keel.learner import layer_patterns, scaled_down_sizes, size_names
from keel.learner.layer_patterns import LayerError, Values
from keel.learner.scaled_down_sizes import WINDOW
from keel.text import one_line

FIRST_ORDINARY_TOKEN = 16
"""Special tokens of a scaled-down model have smaller ids; every id from here on is an ordinary token."""
MOST_LAYERS = 6
MOST_PARAMETERS = 16_000_000

_RECOMPUTED = ("qk_head_dim", "attention_layers", "layers_num_experts", "num_query_groups", "hybrid_layer_ids")
_NOT_KEPT = ("quantization_config", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map")
_REFUSALS = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What classes of configurations and models raise where settings do not fit together."""


_NOISE = ("dropout", "pdrop", "layerdrop", "drop_path", "jitter")
"""Parts of the names under which configurations keep what is random in training: units, layers or routing."""


class ScaleDownError(KeelError):
    """A configuration cannot be scaled down; the message says why."""


def keep_attention_caps(config: Any) -> Any:
    """The configuration, set to attention that applies its cap on attention logits where it has one (Gemma 2).

    Transformers' default, scaled dot product attention, leaves the cap out without a word; vLLM applies it.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"
    return config


def scale_down(config: Any, longest_row: int | None = None) -> Any:
    """A configuration with small sizes and everything that changes the computed function, of the class that is loaded.

    Of an image family that is the whole model where transformers lists it as a causal language model (Gemma 3), else
    the language model. `longest_row`: tokens of the longest row of a run. Rotary embeddings that change beyond a
    length (longrope, dynamic) do so within the rows of the scaled-down model only if they do within the run's. Raises
    ScaleDownError.
    """
    whole = text_architecture(config)
    loaded = config if getattr(whole, "config_class", None) is type(config) else config.get_text_config()
    try:
        with _refused(f"{loaded.model_type}: its small configuration is refused"):
            return keep_attention_caps(_smaller(loaded, longest_row))
    except LayerError as error:
        raise ScaleDownError(f"{loaded.model_type}: {error}") from None


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Raise ScaleDownError where a class of transformers refuses the settings."""
    try:
        yield
    except _REFUSALS as error:
        raise ScaleDownError(f"{what} ({one_line(error)[:200] or type(error).__name__})") from None


def _smaller(config: Any, longest_row: int | None) -> Any:
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_KEPT}
    parts = {name: getattr(config, name, None) for name in config.sub_configs if name not in scaled_down_sizes.NESTED}
    sized = {name: part for name, part in parts.items() if part is not None and scaled_down_sizes.width(part.to_dict())}
    if scaled_down_sizes.width(values):
        values |= layer_patterns.cut(values, MOST_LAYERS)
        values |= scaled_down_sizes.small(values)
        values |= _rotary(config, values, longest_row)
    elif not sized:
        raise ValueError("it names no hidden size")
    values |= without_noise(values) | _special_tokens(values)
    values |= {name: _smaller(part, longest_row) for name, part in sized.items()}
    return type(config)(**{name: value for name, value in values.items() if name not in _RECOMPUTED})


def build(config: Any, seed: int = 0, architecture: Any = None) -> Any:
    """A random fp32 model of a scaled-down configuration, in evaluation mode; `architecture`: of this class.

    Weights are spread further than at initialization: at its usual 0.02 attention is uniform and caps are never
    reached, so that a lost window or cap would hardly show. Raises ScaleDownError where it cannot be built.
    """
    import torch

    architecture = architecture or text_architecture(config)
    if architecture is None:
        raise ScaleDownError(f"{config.model_type}: transformers has no causal language model of it")
    with _refused(f"{config.model_type}: its scaled-down model cannot be built"), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            model = architecture._from_config(copy.deepcopy(config))
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > MOST_PARAMETERS:
            what = f"its scaled-down model has {size:,} parameters, over {MOST_PARAMETERS:,}"
            raise ScaleDownError(f"{config.model_type}: {what}")
        torch.manual_seed(seed)
        model = architecture._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        _spread(model)
    return model


def text_architecture(config: Any) -> Any:
    """The class as which AutoModelForCausalLM loads a model folder of this configuration; None where it has none.

    None for most image families (LLaVA, Mistral 3, Qwen-VL): their text configuration alone names a class, too, but
    one whose parameters are called differently than the checkpoint's, so that all of them would stay random.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    family = type(config).__module__.rsplit(".", 1)[-1].removeprefix("configuration_")
    if family not in CONFIG_MAPPING or CONFIG_MAPPING[family] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    listed = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    return listed if getattr(listed, "config_class", None) is type(config) else None


def _spread(model: Any, deviation: float = 0.2) -> None:
    """Widen narrow weight matrices, and give biases and norms, which all start alike, values of their own."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.float().std()) if parameter.numel() > 1 else deviation
            if parameter.ndim > 1 and 0.0 < spread < deviation:
                parameter.mul_(deviation / spread)
            elif parameter.ndim == 1 and spread == 0.0:
                parameter.add_(torch.randn_like(parameter), alpha=deviation / 2)


def row_tokens(config: Any) -> int:
    """Tokens of a row that is longer than every window and chunk of a scaled-down model, several times the longest.

    Linear attention cuts rows into chunks of 64 tokens in transformers' own code, whatever the configuration says.
    """
    values = config.get_text_config().to_dict()
    longest = max([WINDOW] + [values[name] for name in size_names.WINDOWS if isinstance(values.get(name), int)])
    return max(3 * longest, 80 if any(name.startswith("linear_") for name in values) else 0)


def without_noise(values: Values) -> Values:
    """The settings of what is random in training, set to none of it."""
    noisy = [name for name in values if any(part in name for part in _NOISE)]
    return {name: 0.0 for name in noisy if isinstance(values[name], float)}


_MARKS = ("unk_index", "mask_index", "pad_index", "eos_index", "bos_index")
"""XLM's names of special tokens."""


def _special_tokens(values: Values) -> Values:
    """Ids of special tokens below FIRST_ORDINARY_TOKEN: small ids stay, each other id takes a free one."""
    names = [name for name in values if name.endswith(("_token_id", "_token_index")) or name in _MARKS]
    listed = [values[name] if isinstance(values[name], list) else [values[name]] for name in names]
    ids = dict.fromkeys(number for numbers in listed for number in numbers if isinstance(number, int) and number >= 0)
    free = [number for number in range(FIRST_ORDINARY_TOKEN) if number not in ids]
    places = {number: number if number < FIRST_ORDINARY_TOKEN else free.pop(0) if free else 0 for number in ids}
    moved = {}
    for name, numbers in zip(names, listed, strict=True):
        inside = [places.get(number, number) for number in numbers]
        moved[name] = inside if isinstance(values[name], list) else inside[0]
    return moved


def _rotary(text: Any, values: Values, longest_row: int | None) -> Values:
    """Rotary settings for the small heads; lengths at which they change are crossed where the run crosses them."""
    settings = copy.deepcopy(values.get("rope_parameters"))
    changes: Values = {"rope_parameters": settings} if isinstance(settings, dict) else {}
    for part in scaled_down_sizes.rotary_settings(changes):
        _resize(part, values)
        kind = str(part.get("rope_type", part.get("type", "default")))
        if kind == "default":
            continue
        lengths = _trained_length(part, text, kind), text.max_position_embeddings
        if "llama_4_scaling_beta" in part or (kind in _BY_LENGTH and longest_row and longest_row > lengths[0]):
            _keep_attention_factor(part, kind, lengths)
            lengths = _CROSSED, max(_CROSSED + 1, round(_CROSSED * lengths[1] / lengths[0]))
        if "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = lengths[0]
        if "original_max_position_embeddings" in values:
            changes["original_max_position_embeddings"] = lengths[0]
        changes["max_position_embeddings"] = lengths[0] if kind == "dynamic" else lengths[1]
    return changes


_BY_LENGTH = ("longrope", "dynamic")
"""Rotary embeddings whose angles depend on the longest row of a batch."""
_CROSSED = 24


def _trained_length(part: Values, text: Any, kind: str) -> int:
    """The number of positions beyond which the angles change."""
    trained = part.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return int(text.max_position_embeddings if kind == "dynamic" or not trained else trained)


def _keep_attention_factor(part: Values, kind: str, lengths: tuple[int, int]) -> None:
    """Longrope's scale of attention follows from the trained length, which is about to change: write it down."""
    factor = part.get("factor") or lengths[1] / lengths[0]
    if kind == "longrope" and part.get("attention_factor") is None and factor > 1.0:
        part["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(lengths[0]))


def _resize(part: Values, values: Values) -> None:
    """Lists with an entry for every pair of rotated dimensions: factors of longrope, sections of multimodal ones."""
    if not {"short_factor", "long_factor", "mrope_section"} & set(part):
        return
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    pairs = int(head * part.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if part.get(name):
            part[name] = [part[name][place * len(part[name]) // pairs] for place in range(pairs)]
    sections = part.get("mrope_section")
    if sections:
        ends = [round(sum(sections[: place + 1]) * pairs / sum(sections)) for place in range(len(sections))]
        part["mrope_section"] = [end - start for start, end in zip([0, *ends], ends, strict=False)]
