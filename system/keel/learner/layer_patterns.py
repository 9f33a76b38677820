"""Layer patterns of a configuration: what distinguishes its layers, and the same pattern on fewer of them.

A configuration says in many ways which layer is of which kind: a list with an entry a layer (`layer_types`), a list
of layer numbers (`full_attn_idxs`), a period and an offset (Jamba), a count of leading or trailing layers (DeepSeek's
dense ones), a list that is repeated (RecurrentGemma). Each of them is a column here: its value at every layer, and
how to write the values of a choice of layers back.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from keel.errors import KeelError

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
"""Names of the number of layers that a causal model runs, the first one that a configuration has."""
_OTHER_COUNTS = ("encoder_layers", "num_encoder_layers")
_INDICES = (
    "full_attn_idxs",
    "attn_layer_indices",
    "cross_attention_layers",
    "moe_layers",
    "mlp_only_layers",
    "local_layer_ids",
    "ple_layer_ids",
)
_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers")
_TRAILING, _LAST = "num_kv_shared_layers", "moe_layer_end_index"
_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
_STEPS = ("decoder_sparse_step", "moe_layer_interval", "moe_layer_freq", "full_attention_interval")
_CYCLES = ("block_types",)
_OTHER_FIRST_LAYER = ("modernbert", "modernbert-decoder")
"""Families whose code, not their configuration, makes the first layer another one than the rest of its type."""

Values = dict[str, Any]
Layers = Sequence[int]


@dataclass(frozen=True)
class Column:
    """One thing that differs from layer to layer, and the settings that say so for a choice of layers, if any can."""

    values: list[Any]
    write: Callable[[Layers], Values | None]


class LayerError(KeelError):
    """The layers of a configuration cannot be cut to a few without losing a kind of them."""


def cut(values: Values, most: int) -> Values:
    """The same pattern on about `most` layers. Raises LayerError where no choice of layers has every kind."""
    count = _number_of_layers(values)
    if count is None or count <= most:
        return {}
    columns = list(_columns(values, count))
    kinds = [tuple(repr(column.values[layer]) for column in columns) for layer in range(count)]
    for layers in _choices(kinds, most):
        written = [part for column in columns if (part := column.write(layers)) is not None]
        if len(written) == len(columns):
            sizes = {name: len(layers) for name in COUNTS + _OTHER_COUNTS if isinstance(values.get(name), int)}
            return functools.reduce(operator.or_, written, sizes)
    raise LayerError(f"no choice of its {count} layers has all {len(set(kinds))} kinds of them")


def _number_of_layers(values: Values) -> int | None:
    """The number that a configuration names, or that of a list with an entry a layer."""
    named = [int(values[name]) for name in COUNTS if isinstance(values.get(name), int)]
    listed = [len(values[name]) for name in ("layer_types", "layers_block_type") if values.get(name)]
    return next(iter(named + listed), None)


def _choices(kinds: Sequence[tuple[str, ...]], most: int) -> Iterator[list[int]]:
    """Choices of layers with every kind: a period, the first layers, the first of each kind (and the next), more."""
    count, firsts = len(kinds), {kinds.index(kind) for kind in set(kinds)}
    for period in range(1, most + 1):
        if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds)):
            yield list(range(max(period, 2)))
            break
    needed = max(firsts) + 1
    if needed <= most:
        yield list(range(min(count, max(needed + 1, 2))))
        yield list(range(needed))
    followed = firsts | {layer + 1 for layer in firsts if layer + 1 < count}
    yield from (sorted(layers) for layers in (followed, firsts) if len(layers) <= 2 * most)
    yield from (list(range(length)) for length in range(needed, min(count, 4 * most) + 1))


def _columns(values: Values, count: int) -> Iterator[Column]:
    for form in (_listed, _numbered, _periodic):
        yield from form(values, count)
    if str(values.get("model_type")).startswith("zamba"):
        yield _shared_blocks(values)
    if values.get("model_type") in _OTHER_FIRST_LAYER:
        yield Column([layer == 0 for layer in range(count)], lambda layers: {})


def _listed(values: Values, count: int) -> Iterator[Column]:
    """Lists with an entry a layer, settings of single layers, lists that are repeated, GPT-Neo's nested list."""
    for name, value in values.items():
        if name in _INDICES:
            continue
        if name in _CYCLES and value:
            yield _list_column(name, [value[layer % len(value)] for layer in range(count)])
        elif isinstance(value, list) and len(value) == count:
            yield _list_column(name, value)
    overrides = values.get("per_layer_config")
    if isinstance(overrides, dict):
        listed = {int(layer): override for layer, override in overrides.items()}
        yield _overrides_column([listed.get(layer) for layer in range(count)])
    if values.get("attention_types"):
        kinds = [kind for group, times in values["attention_types"] for _ in range(times) for kind in group]
        yield Column(kinds, lambda layers: {"attention_types": [[[kinds[layer] for layer in layers], 1]]})


def _list_column(name: str, listed: list[Any]) -> Column:
    return Column(listed, lambda layers: {name: [listed[layer] for layer in layers]})


def _overrides_column(overrides: list[Any]) -> Column:
    def write(layers: Layers) -> Values:
        chosen = {str(place): overrides[layer] for place, layer in enumerate(layers)}
        return {"per_layer_config": {place: override for place, override in chosen.items() if override}}

    return Column(overrides, write)


def _numbered(values: Values, count: int) -> Iterator[Column]:
    """Lists of layer numbers, counts of leading or trailing layers, the last layer with experts."""
    for name in _INDICES:
        if isinstance(values.get(name), list):
            yield _index_column(name, [layer in values[name] for layer in range(count)])
    for name in (*_LEADING, _TRAILING, _LAST):
        number = values.get(name)
        if isinstance(number, int) and number >= 0:
            first, end = {_TRAILING: (count - number, count), _LAST: (0, number + 1)}.get(name, (0, number))
            yield _count_column(name, [first <= layer < end for layer in range(count)], -1 if name == _LAST else 0)


def _index_column(name: str, members: list[bool]) -> Column:
    return Column(members, lambda layers: {name: [place for place, layer in enumerate(layers) if members[layer]]})


def _count_column(name: str, members: list[bool], offset: int) -> Column:
    return Column(members, lambda layers: {name: sum(members[layer] for layer in layers) + offset})


def _periodic(values: Values, count: int) -> Iterator[Column]:
    """A period with an offset; a step, at whose last layer the kind changes."""
    for period, offset in _PERIODS:
        if isinstance(values.get(period), int) and isinstance(values.get(offset), int):
            members = [layer % values[period] == values[offset] for layer in range(count)]
            yield _period_column(period, offset, members)
    for step in _STEPS:
        if isinstance(values.get(step), int) and values[step] > 0:
            yield _period_column(step, None, [(layer + 1) % values[step] == 0 for layer in range(count)])


def _period_column(period: str, offset: str | None, members: list[bool]) -> Column:
    def write(layers: Layers) -> Values | None:
        wanted = [members[layer] for layer in layers]
        for length in range(1, len(layers) + 2):
            for start in range(length) if offset else (length - 1,):
                if wanted == [place % length == start for place in range(len(layers))]:
                    return {period: length} | ({offset: start} if offset else {})
        return None

    return Column(members, write)


def _shared_blocks(values: Values) -> Column:
    """Zamba's attention blocks, which serve several layers: each of them once, and one of them twice."""
    blocks, seen, ordinals = values.get("num_mem_blocks", 1), 0, []
    for kind in values["layers_block_type"]:
        hybrid = kind == "hybrid"
        ordinals.append(None if not hybrid else seen if seen <= blocks else seen % blocks)
        seen += hybrid
    return Column(ordinals, lambda layers: {})
