"""The user's own code, named in the configuration as module:name."""

import importlib
from collections.abc import Callable
from typing import Any

from keel.config import ConfigError
from keel.printable import one_line


def load(source: str, setting: str) -> Callable[..., Any]:
    """The function or class at module:name. Raises ConfigError, naming the setting, when it cannot be imported."""
    module, _, name = source.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        reason = one_line(error)
        raise ConfigError(f"{setting}={source}: cannot be imported ({reason}); expected module:name") from None
    if not callable(found):
        raise ConfigError(f"{setting}={source}: a {type(found).__name__}; expected a function or a class")
    return found
