"""Attention masks of sequences that hold several rows, made through transformers' own mask functions.

A model builds one mask per kind of layer (full, sliding window, chunked) and per attention implementation. It does so
by calling a mask interface with a function of two token indices: may query q see key k? For rows that share a
sequence that function is asked about the places of the tokens in their own rows, where a row on its own would have
them, and its answer holds for two tokens of one row alone. Windows and chunks keep their meaning that way, and
`eager`, `sdpa` and `flex_attention` each get the mask in the form that they read.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from keel.learner.packing import SequenceLayout

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""Attention implementations of transformers whose masks are functions of two indices."""

MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""Of batch, head, query and key indices -> may the query see the key."""


@contextlib.contextmanager
def of_rows(layout: SequenceLayout) -> Iterator[None]:
    """Every mask that a model builds inside this block is that of the layout's rows, each on its own."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as INTERFACES

    for name in IMPLEMENTATIONS:
        INTERFACES[name] = _row_mask(INTERFACES[name], layout)
    try:
        yield
    finally:
        for name in IMPLEMENTATIONS:
            del INTERFACES[name]


def _row_mask(interface: Callable[..., Any], layout: SequenceLayout) -> Callable[..., Any]:
    """The mask interface for rows of a layout in place of whole sequences."""

    def make(*, mask_function: MaskFunction, allow_is_causal_skip: bool = False, **arguments: Any) -> Any:
        def of_places(batch: Any, head: Any, query: Any, key: Any) -> Any:
            places = layout.places
            seen = mask_function(batch, head, places[batch, query], places[batch, key])
            return seen & layout.same_row(batch, query, key)

        return interface(mask_function=of_places, allow_is_causal_skip=False, **arguments)

    return make
