"""Completions that a judge has ordered."""

import itertools
from typing import Any

import pyarrow as pa

from keel.config import loader
from keel.config.label import LabelSettings
from rollouts import generated, prompts, scored


def settings_for(**blocks: Any) -> LabelSettings:
    tree = {"runs": ["a"], "judge": {"name": "gold", "source": "tests:gold"}, "pairs": {"selection": "all"}}
    return loader.parse_as(LabelSettings, {**tree, **blocks})


def replaced(batch: pa.RecordBatch, **columns: list[Any]) -> pa.RecordBatch:
    for name, values in columns.items():
        place = batch.schema.get_field_index(name)
        field = batch.schema.field(name)
        array = pa.array(values)
        batch = batch.set_column(place, field, array if array.type == field.type else array.cast(field.type))
    return batch


def judged(texts: list[list[str]], rewards: list[list[float | None]], cut: tuple[tuple[int, int], ...] = ()) -> Any:
    """Rollouts with these completions of tickets 0, 1, ...; `cut` (ticket, sample) ended at the budget."""
    samples = len(texts[0])
    rows = [(ticket, sample) for ticket in range(len(texts)) for sample in range(samples)]
    batch = scored(generated(prompts(range(len(texts)), samples)), list(itertools.chain(*rewards)))
    reasons = ["length" if row in cut else "stop" for row in rows]
    return replaced(batch, completion=list(itertools.chain(*texts)), finish_reason=reasons)
