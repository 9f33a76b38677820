"""Every setting is described for people and for editors: docs/use/settings.md and configs/schema/ are what the code says."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from keel.config import settings_page
from keel.config.commands import CONFIGURATIONS
from setting_blocks import sections
from shipped import FILES, FOLDER, identity, settings_class

ROOT = Path(__file__).parents[3]
SCHEMAS = {section: command for command, section in CONFIGURATIONS.items() if command != "evaluate"}
"""The class of a configuration -> the name of its file in configs/schema/."""


def schema(path: Path) -> Path:
    """The schema that a configuration is written by."""
    return FOLDER / "schema" / f"{SCHEMAS[settings_class(path)]}.json"  # type: ignore[index]


def test_every_setting_is_described() -> None:
    described = {
        f"{block}.{name}": field.description
        for block, section in sections().items()
        for name, field in section.model_fields.items()
        if not block.endswith("Spec")  # of the code alone, no user writes them
    }
    assert [name for name, description in described.items() if not description] == []


def test_the_page_of_settings_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "use" / "settings.md").read_text(encoding="utf8")
    assert page.endswith(f"\n\n{settings_page.page()}\n"), "meant? then put the output of keel settings there"


def test_every_block_says_which_packages_read_it() -> None:
    packages = {
        package: "".join(path.read_text(encoding="utf8") for path in (ROOT / "system" / "keel" / package).glob("*.py"))
        for package in {name for names in settings_page.READ_BY.values() for name in names.split(", ")}
    }
    for block, names in settings_page.READ_BY.items():
        settings = sections()[block].model_fields
        for package in names.split(", "):
            assert any(f".{name}" in packages[package] for name in settings), f"{package} reads nothing of {block}"


@pytest.mark.parametrize("command", SCHEMAS.values())
def test_the_shipped_schema_is_the_one_that_is_printed(command: str) -> None:
    shipped = (FOLDER / "schema" / f"{command}.json").read_text(encoding="utf8")
    printed = json.dumps(CONFIGURATIONS[command].model_json_schema(), indent=2)
    assert shipped == f"{printed}\n", f"meant? then: keel schema {command} > configs/schema/{command}.json"


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_a_shipped_configuration_names_its_schema_and_fits_it(path: Path) -> None:
    first = path.read_text(encoding="utf8").splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert named != first and (path.parent / named).resolve() == schema(path)
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf8")), json.loads(schema(path).read_text()))
