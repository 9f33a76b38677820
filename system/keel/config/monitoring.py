"""Where a run answers over HTTP, and how a Prometheus finds that place."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from keel.config.base import Section

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
    host: Annotated[str, AfterValidator(_host)] = Field(
        "127.0.0.1", description="address the endpoint listens on; 0.0.0.0 or ::: every address of this machine"
    )
    port: int = Field(
        9464,
        ge=0,
        le=65535,
        description="0: any free port, for several runs on a machine; discovery_directory says which",
    )
    advertise: Annotated[str, AfterValidator(_host)] | None = Field(
        None,
        description="host name or address by which others reach the run; null: host, or this machine's own address"
        " where host is every address",
    )
    discovery_directory: str | None = Field(
        None, min_length=1, description="folder that Prometheus' file discovery reads; null: none"
    )
