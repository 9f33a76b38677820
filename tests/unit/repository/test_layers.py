"""Imports go one way through ten packages, heavy libraries stay behind one package or file, files stay small."""

import ast
import graphlib
import subprocess
import sys

import pytest

from source_tree import ROOT, imports, modules

PACKAGES = [
    "config", "algorithms", "observability", "learner", "rollout", "cluster", "online", "analysis", "stages", "cli",
]  # fmt: skip
"""From the ground up: a package imports from those before it and from the modules beside them, never from one behind."""
HEAVY = {
    "ray": {"cluster"},
    "vllm": {"rollout.generator", "learner.weights"},
    "deepspeed": {"learner"},
    "prometheus_client": {"observability"},
    "wandb": {"observability"},
    "mlflow": {"observability"},
    "trackio": {"observability"},
}


def imported_modules(name: str) -> set[str]:
    """Keel's modules that a module imports, also inside functions."""
    return {full.removeprefix("keel.") for full in imports(modules()[name])} & set(modules()) - set(PACKAGES)


def height(name: str) -> int:
    """Place of a module's package from the ground up; 0: beside the packages."""
    package = name.split(".")[0]
    return PACKAGES.index(package) + 1 if package in PACKAGES else 0


def test_there_are_ten_packages_and_each_says_what_it_is_for() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == set(PACKAGES)
    for package in PACKAGES:
        tree = modules()[package]
        assert len((ast.get_docstring(tree) or "").splitlines()) >= 5, package
        assert len(tree.body) == 1, f"{package}/__init__.py imports or runs something; its actors would pay for that"


def test_imports_say_where_from() -> None:
    """What the next tests look for: no relative import, no module loaded by a name put together at run time."""
    for name, tree in modules().items():
        assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), name
        assert "__import__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}, name
    assert imports(ast.parse((ROOT / "__init__.py").read_text(encoding="utf8"))) == set()  # runs before all of them


def test_a_module_imports_from_its_package_and_those_below() -> None:
    upwards = [
        f"{name} imports {other}"
        for name in modules()
        for other in imported_modules(name)
        if height(other) > height(name)
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    order = graphlib.TopologicalSorter({name: imported_modules(name) for name in modules()}).static_order()
    assert set(order) == set(modules())  # a circle raises CycleError, which names it


@pytest.mark.parametrize("library", list(HEAVY))
def test_heavy_libraries_stay_in_their_place(library: str) -> None:
    users = {name for name, tree in modules().items() if library in {full.split(".")[0] for full in imports(tree)}}
    outside = {name for name in users if not {name, name.split(".")[0]} & HEAVY[library]}
    assert users and outside == set()


def test_files_are_small_and_named_after_something() -> None:
    sizes = {path: len(path.read_text(encoding="utf8").splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: size for path, size in sizes.items() if size > 400} == {}
    words = {
        word for path in sizes for part in path.relative_to(ROOT).with_suffix("").parts for word in part.split("_")
    }
    assert not {"utils", "util", "manager", "data", "info", "helpers", "misc", "common"} & words


def test_functions_are_short() -> None:
    long = [
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _body_lines(node) > 40
    ]
    assert long == []


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(node) is not None and len(node.body) > 1
    first = node.body[1].lineno if documented else node.lineno
    return (node.end_lineno or first) - first + 1


def test_no_except_without_a_name() -> None:
    for name, tree in modules().items():
        handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        assert all(handler.type is not None for handler in handlers), name


@pytest.mark.parametrize("name", ["rollout.scorers", "rollout.buffer", "cluster.control"])
def test_actors_that_compute_nothing_start_without_torch(name: str) -> None:
    """Two seconds of processor time and 190 MB of a scorer whose rewards are functions."""
    code = f"import sys, keel.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
