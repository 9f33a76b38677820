"""Settings of how a run is watched: its metrics endpoint, and the experiment trackers that get its metrics."""

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from keel.config.base import Seconds, Section

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # longer ones no resolver takes


def is_address(text: str) -> bool:
    """Whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _host(text: str) -> str:
    if not is_address(text) and not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", text):
        raise PydanticCustomError("no_host", "expected a host name or an IP address, without a port")
    return text


class MetricsSettings(Section):
    """The HTTP endpoint with the metrics of a run, and how Prometheus finds it."""

    host: Annotated[str, AfterValidator(_host)] = Field(
        "127.0.0.1", description="address the endpoint listens on; 0.0.0.0 or ::: every address of this machine"
    )
    port: int = Field(
        9464,
        ge=0,
        le=65535,
        description="port of the endpoint; 0: a free one, which discovery_directory tells",
    )
    advertise: Annotated[str, AfterValidator(_host)] | None = Field(
        None,
        description="host name or address by which others reach the run; null: host, or this machine's own address"
        " where host is every address",
    )
    discovery_directory: str | None = Field(
        None, min_length=1, description="folder that Prometheus' file discovery reads; null: none"
    )


class TrackingSettings(Section):
    """Experiment trackers that get the metrics of a run, beside metrics.jsonl, which is always written.

    Accounts and servers are set by the libraries' own environment variables.
    """

    trackers: list[TrackerName] = Field(
        [], description="trackers; each needs the extra of its name, such as keel-rlhf[wandb]"
    )
    project: str = Field("keel", min_length=1, description="project, or MLflow experiment, of the run")
    tags: list[str] = Field([], description="tags of the run, where the library has them")
    tensorboard_directory: str | None = Field(
        None, description="folder of the event files; {name} is replaced; null: RUN_DIR/tensorboard"
    )
    finish_seconds: Seconds = Field(30, description="longest wait at the end of a run for trackers to send the rest")
