"""The modules of Keel as syntax trees, and what they import."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2] / "system" / "keel"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module but __main__, by its name behind `keel.`."""
    paths = [path for path in ROOT.rglob("*.py") if path.parent != ROOT or not path.name.startswith("__")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf8")) for path, name in names.items()}


def imports(tree: ast.Module) -> set[str]:
    """Full names of all modules and names imported anywhere in a file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
