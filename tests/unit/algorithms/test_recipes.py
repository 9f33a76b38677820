"""The recipes of docs/use/algorithms.md: each published algorithm by its exact switches, as configs/objectives has it."""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from keel.config import loader
from keel.config.objective import PolicyGradientSettings
from shipped import FOLDER

ROOT = FOLDER.parent
SWITCHES = {
    "objective": None,
    "regularizer": None,
    "shaping": None,
    "buffer": ["dynamic_sampling_refills"],
    "reference": ["ref_policy", "iteration_steps"],
    "sampling": ["stored_ratio"],
}
"""Settings that recipes set: whole blocks, or some of a block."""


class Recipe(NamedTuple):
    name: str
    paper: str
    switches: dict[str, Any]
    file: str


def recipes() -> list[Recipe]:
    text = (ROOT / "docs" / "use" / "algorithms.md").read_text(encoding="utf8")
    lines = text.partition("\n## Recipes\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    return [
        Recipe(name, paper, yaml.safe_load("\n".join(switches.strip("`").split("` `"))), file.strip("`"))
        for name, paper, switches, file in cells
    ]


RECIPES = recipes()
IDS = [recipe.name for recipe in RECIPES]


def tree_with(recipe: Recipe) -> dict[str, Any]:
    """The recipe's file, else the quickstart, without its own switches and with those of the recipe."""
    path = FOLDER / "objectives" / recipe.file if recipe.file else FOLDER / "quickstart.yaml"
    tree = loader.read(path)
    for block, names in SWITCHES.items():
        for name in names or ():
            tree.get(block, {}).pop(name, None)
        if names is None:
            tree.pop(block, None)
    for block, switches in deepcopy(recipe.switches).items():
        tree[block] = tree.get(block, {}) | switches
    return tree


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_the_switches_of_a_recipe_load(recipe: Recipe) -> None:
    settings = loader.parse(tree_with(recipe))
    assert set(recipe.switches) <= set(SWITCHES)
    for name, value in recipe.switches["objective"].items():
        written = settings.objective.model_dump(mode="json")[name]
        assert value.items() <= written.items() if isinstance(value, dict) else written == value


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.file], ids=lambda recipe: recipe.name)
def test_the_file_of_a_recipe_has_its_switches_and_names_its_paper(recipe: Recipe) -> None:
    path = FOLDER / "objectives" / recipe.file
    assert loader.parse(tree_with(recipe)) == loader.load(path)
    assert recipe.paper in path.read_text(encoding="utf8").partition("\nrun:")[0]


def test_every_file_is_a_recipe_and_every_advantage_has_one() -> None:
    assert {path.name for path in (FOLDER / "objectives").glob("*.yaml")} == {r.file for r in RECIPES if r.file}
    objectives = [loader.parse(tree_with(recipe)).objective for recipe in RECIPES]
    advantages = {subject.advantage for subject in objectives if isinstance(subject, PolicyGradientSettings)}
    assert advantages >= {"rloo", "none", "reinforce_pp", "reinforce_pp_baseline", "gae", "grpo", "dr_grpo"}


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.paper], ids=lambda recipe: recipe.name)
def test_the_code_names_the_paper(recipe: Recipe) -> None:
    modules = Path(ROOT / "system" / "keel" / "algorithms").glob("*.py")
    assert any(recipe.paper in module.read_text(encoding="utf8") for module in modules)
