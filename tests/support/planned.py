"""Rates, configurations and run directories of `keel plan` whose every second follows from the rates."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

import rollouts
from fakes import settings_for
from keel import files, schema
from keel.analysis.plan import Machine, shape_of
from keel.analysis.rates import Rates, waves
from keel.analysis.simulation import Simulation
from keel.cluster.capacity import configured
from keel.config import loader
from keel.config.run import Settings
from keel.observability import evaluations

GIVEN: dict[str, Any] = {
    "tokens_per_sequence": 100,
    "generator": {"fixed_seconds": 1.0, "sequence_seconds": 0.25},
    "reference": {"fixed_seconds": 0.5, "sequence_seconds": 0.0},
    "scorer": {"fixed_seconds": 0.25, "sequence_seconds": 0.125},
    "learner": {"fixed_seconds": 1.0, "sequence_seconds": 0.5},
    "weights": {"publish_seconds": 0.125, "load_seconds": 0.25},
}
APART = Machine()


def rates(**blocks: Any) -> Rates:
    return Rates.model_validate({name: {**value, **blocks.get(name, {})} if isinstance(value, dict) else value for name, value in GIVEN.items()})  # fmt: skip


def settings(staleness: int = 0, groups: int = 4, steps: int = 8, **blocks: Any) -> Settings:
    buffer = {"groups_per_step": groups, "groups_per_batch": None}
    return settings_for(steps, staleness, **{"buffer": buffer, "evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": 0}} | blocks)  # fmt: skip


def written(folder: Path, settings: Settings, rates: Rates, held_out: int = 2, quick_step: int = 3) -> Path:
    """The files of a run with these rates, as far as rates are read from them.

    Of a late run generators are busy at every load but that of `quick_step`.
    """
    counts = configured(settings)
    shape = shape_of(settings, rates, counts, APART, settings.run.steps)
    line = Simulation(shape, Exactly(rates, settings, held_out)).run()
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(loader.dump(settings))
    samples = settings.sampling.samples_per_prompt
    totals: dict[str, Counter[str]] = {}
    for step, counted in enumerate(line.counted, 1):
        for name, values in counted.items():
            totals.setdefault(name, Counter()).update(values)
        ended, driver, weights = 1000.0 * step, rates.driver, rates.weights
        at = {
            "score": ended - 20 - driver.take_seconds - driver.add_seconds,
            "accept": ended - 20 - driver.take_seconds,
        }
        at |= {"take": ended - 20, "step": ended - 10, "publish": ended - 10 + weights.publish_seconds}
        late = settings.buffer.max_staleness
        at |= {"load": at["publish"] + weights.load_seconds + (2.5 if late and step != quick_step else 0.0)}
        sync = {"weight_sync_seconds": weights.publish_seconds + weights.load_seconds}
        progress = {
            "progress_timestamp_seconds": at,
            "workers": {"learner": 1.0},
            "max_staleness_versions": float(late),
        }
        files.append_json(folder / "metrics.jsonl", {"step": step, **sync, **progress, **{name: dict(values) for name, values in totals.items()}})  # fmt: skip
        groups = settings.buffer.groups_per_step
        tickets = range((step - 1) * groups, step * groups)
        files.write(folder / "rollouts" / f"step-{step:06d}.arrow", schema.to_bytes(rows(tickets, samples, rates, settings, settings.groups_per_batch)))  # fmt: skip
    for step in (0, settings.run.steps):
        evaluations.store(folder, step, rows(range(held_out), 1, rates, settings, held_out))
    return folder


def rows(tickets: range, samples: int, rates: Rates, settings: Settings, size: int) -> pa.RecordBatch:
    """Scored rows in generator batches of `size` tickets, with the seconds of the rates."""
    batches = []
    for start in range(tickets.start, tickets.stop, size):
        part = rollouts.prompts(range(start, min(start + size, tickets.stop)), samples)
        scored = rollouts.scored(rollouts.referenced(rollouts.generated(part)), [0.5] * part.num_rows)
        for name in ("generator", "scorer"):
            column = f"{'generate' if name == 'generator' else 'score'}_seconds"
            place = scored.schema.get_field_index(column)
            seconds = mean_seconds(rates, settings, name, part.num_rows) + 1e-4 * (start % 7)
            scored = scored.set_column(place, scored.schema.field(place), pa.array([seconds] * part.num_rows, pa.float32()))  # fmt: skip
        batches.append(scored)
    return schema.concat(batches)


def mean_seconds(rates: Rates, settings: Settings, role: str, sequences: int) -> float:
    together = settings.generators.max_sequences if role == "generator" else sequences
    return rates.of(role).seconds(sequences, waves(sequences, together))


class Exactly:
    """Mean seconds of the rates, nothing drawn."""

    def __init__(self, rates: Rates, settings: Settings, held_out: int) -> None:
        self.rates, self.settings, self.held_out = rates, settings, held_out

    def stage(self, role: str, tickets: Any) -> float:
        sequences = len(tickets) * self.settings.sampling.samples_per_prompt or self.held_out
        return mean_seconds(self.rates, self.settings, role, sequences)

    def step(self, version: int) -> float:
        return self.rates.learner.seconds(self.settings.buffer.groups_per_step * self.settings.sampling.samples_per_prompt)  # fmt: skip

    def load(self, version: int, worker: int) -> float:
        return self.rates.weights.load_seconds

    def driver(self, what: str) -> float:
        weights, driver = self.rates.weights, self.rates.driver
        return {"publish": weights.publish_seconds, "add": driver.add_seconds, "take": driver.take_seconds, "advance": driver.advance_seconds, "checkpoint": 0.0}[what]  # fmt: skip


DRIVEN = {"driver": {"add_seconds": 0.03, "take_seconds": 0.02, "advance_seconds": 0.04}}
