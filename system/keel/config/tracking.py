"""Settings of experiment trackers: libraries that show a run beside others while it goes."""

from typing import Literal

from pydantic import Field

from keel.config.base import Seconds, Section

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackingSettings(Section):
    """Beside metrics.jsonl, which is always written. Accounts and servers: the libraries' own environment variables."""

    trackers: list[TrackerName] = Field([], description="each needs the extra of its name: keel-rlhf[wandb]")
    project: str = Field("keel", min_length=1, description="project, or MLflow experiment, that runs are put under")
    tags: list[str] = Field([], description="tags of the run, where the library has them")
    tensorboard_directory: str | None = Field(
        None, description="folder of the event files; {name} is replaced; null: RUN_DIR/tensorboard"
    )
    finish_seconds: Seconds = Field(30, description="at the end of a run, wait for trackers to send what is left")
