"""A short run of a configuration that only measures: one batch a step, one worker a stage, nothing concurrent.

Where learner ranks would share the cores of this machine there is one of them, too: several would slow each other
down while they are measured, and once more in the simulation. One needs no more memory than all of them do. On GPUs or
in a cluster there are as many as configured, since ZeRO may have to divide the model among them.
"""

import tempfile
from pathlib import Path

from keel.analysis import measurement
from keel.analysis.rates import Rates
from keel.config import loader
from keel.config.run import Settings
from keel.observability.console import Display
from keel.online import preflight, train

STEPS = 5
"""The first warms up, the last evaluates: three are measured."""


def settings_of(settings: Settings, directory: Path) -> Settings:
    """The configuration with its own sizes, one worker of each stage, and evaluations of half a step's rows.

    Evaluations are the second size of batch from which the fixed part of a stage's time is known, so they are less than
    one of several waves, too.
    """
    tree = settings.model_dump(mode="json")
    rows = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt
    tree["run"] |= {"steps": STEPS, "directory": str(directory), "name": f"{settings.run.name}-calibration"}
    together = min(rows, settings.generators.max_sequences)
    tree["prompts"]["held_out"] = min(settings.prompts.held_out, max(1, together // 2))
    tree["buffer"] |= {"max_staleness": 0, "groups_per_batch": None}
    for role in ("generators", "scorers", *(["reference"] if settings.reference else [])):
        tree[role]["count"] = 1
    if not settings.learners.gpus and settings.cluster.address_to_join is None:
        tree["learners"]["count"] = 1
    tree["evaluation"]["every_steps"] = tree["checkpoint"]["every_steps"] = 0
    tree["metrics"] |= {"port": 0, "discovery_directory": None}  # a calibration is no experiment:
    tree["tracking"]["trackers"] = []  # neither Prometheus nor a tracker shows it
    return loader.parse(tree)


def folder_for(settings: Settings) -> Path | None:
    """Choose the folder of the files: in a cluster beside the run directory, which its nodes share; None: the default.

    Raises ConfigError where nothing can be written.
    """
    if settings.cluster.address_to_join is None:
        return None
    folder = Path(settings.run_directory).resolve().parent
    preflight.check_directory(folder / "keel-plan", settings)
    return folder


def run(settings: Settings, display: Display) -> Rates:
    """Rates of this machine or cluster; the files of the run are removed. Raises whatever a run raises.

    What another node still holds open on shared storage stays: it is no reason to lose what was measured.
    """
    if beside := folder_for(settings):
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="keel-plan-", dir=beside, ignore_cleanup_errors=True) as folder:
        directory = Path(folder) / "run"
        train.run(preflight.prepare(settings_of(settings, directory)), display)
        source = f"measured here on {STEPS} steps of {settings.run.name}"
        return measurement.measured([directory]).model_copy(update={"source": source})
