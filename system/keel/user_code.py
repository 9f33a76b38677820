"""Import the user's own code, which the configuration names as module:name."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.errors import ConfigError
from keel.text import one_line


def import_symbol(source: str, setting: str) -> Callable[..., Any]:
    """The function or class at module:name. Raises ConfigError, naming the setting, when it cannot be imported."""
    module, _, name = source.partition(":")
    try:
        symbol = getattr(import_module(module), name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        problem = f"cannot be imported ({one_line(error)}); expected module:name{shadowed(module)}"
        raise ConfigError(f"{setting}={source}: {problem}") from None
    if not callable(symbol):
        raise ConfigError(f"{setting}={source}: a {type(symbol).__name__}; expected a function or a class")
    return symbol


def import_module(name: str) -> ModuleType:
    """Import a module that the configuration names, the current directory being the last place where it is looked for.

    Only here does the current directory get onto the path: commands that load no code of the user's never look there,
    and a file there cannot stand in for an installed module, or for one of Python's own.
    """
    with contextlib.suppress(FileNotFoundError):  # the current directory was removed
        here = os.getcwd()
        if name.partition(".")[0] != "keel" and here not in sys.path:
            sys.path.append(here)
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    return importlib.import_module(name)


def shadowed(name: str) -> str:
    """A hint where the current directory has a module of that name, and another was imported; else nothing."""
    top = name.partition(".")[0]
    loaded = getattr(sys.modules.get(top), "__file__", None)
    with contextlib.suppress(FileNotFoundError):
        here = Path.cwd()
        beside = next((path for path in (here / f"{top}.py", here / top / "__init__.py") if path.is_file()), None)
        if loaded and beside and Path(loaded).resolve() != beside.resolve():
            return f" ({top} is {loaded}; {beside} needs another name)"
    return ""
