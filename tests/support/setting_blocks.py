"""Every block of settings that keel.config defines."""

import importlib
import inspect
from pathlib import Path

from keel import config
from keel.config.base import Section


def sections() -> dict[str, type[Section]]:
    """Every block of settings, by the name of its class."""
    blocks = {}
    for path in sorted(Path(config.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"keel.config.{path.stem}")
        for name, block in inspect.getmembers(module, inspect.isclass):
            if issubclass(block, Section) and block.__module__ == module.__name__:
                blocks[name] = block
    return blocks
