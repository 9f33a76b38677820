"""A class for each library that shows experiments. Each imports its library when it is made, no sooner.

They run on a thread of their own (tracking.py), and may raise anything: a run continues without them.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from keel.config.monitoring import TrackerName

Outcome = Literal["finished", "failed", "interrupted"]
_PARAMETERS_AT_ONCE = 100  # MLflow's limit; that of metrics is 1000, which no step has


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows."""

    name: str
    identity: str
    """Id of the run directory: the same at every start in it, another one in every other."""
    project: str
    tags: tuple[str, ...]
    configuration: Mapping[str, Any]
    """Resolved settings by flat name, secrets left out."""
    version: int
    """The last step that stands; those after it are made from here on, perhaps again."""
    directory: Path
    """Folder of a library that writes files, unless its environment variable names another."""
    tensorboard_directory: Path
    finish_seconds: float


class Tracker(Protocol):
    """Making one starts the run, or continues it where an earlier process began it."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of a step by flat name. A step may come in several parts, with different names."""

    def rewind(self, version: int) -> None:
        """Steps after `version` are made again. Here and by default: nothing is taken back."""

    def finish(self, outcome: Outcome) -> None:
        """Send what is left and close the run."""


class TensorBoardTracker(Tracker):
    """Event files. Steps made again replace the earlier ones: a new file purges what came after its first step."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._make = run, SummaryWriter
        self._open(run.version)

    def _open(self, version: int) -> None:
        again = version + 1 if version else 0  # before the first step everything is, the evaluation at 0 too
        self._writer = self._make(str(self._run.tensorboard_directory), purge_step=again)
        rows = [f"| {name} | {str(value).replace('|', ' ')} |" for name, value in self._run.configuration.items()]
        table = "\n".join(["| setting | value |", "|---|---|", *rows])
        self._writer.add_text("configuration", table, version)
        self._writer.add_text("tags", ", ".join(self._run.tags), version)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rewind(self, version: int) -> None:
        self._writer.close()
        self._open(version)

    def finish(self, outcome: Outcome) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """Weights & Biases. It leaves out steps made again: its history only grows, the first numbers stay."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        quiet = {"silent": True, "console": "off"}  # the terminal is the progress display's
        wandb.setup(settings=wandb.Settings(**quiet))  # also: without a key it fails here, it does not ask for one
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.identity,
            resume="allow",
            tags=run.tags,
            config=dict(run.configuration),
            dir=os.environ.get("WANDB_DIR", str(run.directory)),
            settings=wandb.Settings(**quiet, finish_timeout=run.finish_seconds, reinit="create_new"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, outcome: Outcome) -> None:
        self._run.finish(exit_code={"finished": 0, "failed": 1, "interrupted": 130}[outcome])


class MlflowTracker(Tracker):
    """MLflow. Steps made again are kept beside the earlier ones: its history has no deletion; the newest counts."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses files, a database needs more of it
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.directory / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(run.project)
        experiment = known.experiment_id if known else self._client.create_experiment(run.project)
        earlier = self._client.search_runs([experiment], f"tags.keel_run = '{run.identity}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return  # its parameters are written and cannot be changed
        tags = {"keel_run": run.identity, **{f"keel_tag.{tag}": "true" for tag in run.tags}}
        self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        parameters = [Param(name, str(value)[:500]) for name, value in run.configuration.items()]
        for first in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=parameters[first : first + _PARAMETERS_AT_ONCE])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_milliseconds = int(time.time() * 1000)
        points = [self._metric(name, value, now_milliseconds, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=points)

    def finish(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[outcome]
        self._client.set_terminated(self._id, status=status)


class TrackioTracker(Tracker):
    """Trackio. Steps made again are kept beside the earlier ones. It names runs, so the identity is in the name."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.directory / "trackio"))  # read when it is imported
        import trackio

        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.identity}",
            resume="allow",
            config=dict(run.configuration),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, outcome: Outcome) -> None:
        self._run.finish()


TRACKERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}
"""Trackers by name, which is that of the setting, of the extra and of the package."""
