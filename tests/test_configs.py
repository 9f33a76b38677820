"""The shipped configurations load, and say what their file name says."""

from pathlib import Path

import pytest

from keel import config

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_under_its_own_name(path: Path) -> None:
    assert config.load(path).run.name == path.stem
    assert path.read_text().startswith("# ")  # what it is, in its first line


def test_the_quickstarts_differ_in_their_regulariser_alone() -> None:
    one, other = (config.load(FOLDER / f"{name}.yaml").model_dump() for name in ("quickstart", "quickstart-maxent"))
    assert {name for name in one if one[name] != other[name]} == {"run", "regulariser"}
    assert {name for name in one["run"] if one["run"][name] != other["run"][name]} == {"name"}
