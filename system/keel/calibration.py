"""A short run of a configuration that only measures: one worker of each role, one batch a step, nobody in the way."""

import tempfile
from pathlib import Path

from keel import config, measurement, preflight, train
from keel.rates import Rates
from keel.recorder import Display
from keel.settings import Settings

STEPS = 5
"""The first warms up, the last evaluates: three are measured."""


def settings_of(settings: Settings, directory: Path) -> Settings:
    """The configuration with its own sizes, one worker of each role, and evaluations of half a step's rows.

    Evaluations are the second size of batch from which the fixed part of a stage's time is known.
    """
    tree = settings.model_dump(mode="json")
    rows = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt
    tree["run"] |= {"steps": STEPS, "directory": str(directory), "name": f"{settings.run.name}-calibration"}
    tree["prompts"]["held_out"] = min(settings.prompts.held_out, max(1, rows // 2))
    tree["buffer"] |= {"max_staleness": 0, "groups_per_batch": None}
    for role in ("generators", "scorers", *(["reference"] if settings.reference else [])):
        tree[role]["count"] = 1
    tree["evaluation"]["every_steps"] = tree["checkpoint"]["every_steps"] = 0
    tree["metrics"] |= {"port": 0, "discovery_directory": None}  # it is nobody's experiment: neither Prometheus
    tree["tracking"]["trackers"] = []  # nor a tracker hears of it
    return config.parse(tree)


def run(settings: Settings, display: Display) -> Rates:
    """Rates of this machine. Raises whatever a run raises."""
    with tempfile.TemporaryDirectory(prefix="keel-plan-") as folder:
        directory = Path(folder) / "run"
        train.run(preflight.prepare(settings_of(settings, directory)), display)
        source = f"measured here on {STEPS} steps of {settings.run.name}"
        return measurement.measured([directory]).model_copy(update={"source": source})
