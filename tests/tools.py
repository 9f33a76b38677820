"""Programs that check scripts and image recipes, where they are installed."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def path_of(name: str) -> str:
    """The program of this Python's environment, or on the PATH; the test is skipped where there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
