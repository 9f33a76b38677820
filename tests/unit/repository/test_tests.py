"""What every test owes: it asserts something, and a refusal it expects is told by its words.

A test asserts where `assert`, `pytest.raises` or `pytest.fail` stands in it, or in a function of tests/ that it calls,
at any depth. A call counts for the function it reaches: of the same file, imported from another file of tests/, or an
attribute of such a file's module; methods of an object do not, their names are those of many.
"""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[str, str]
"""Module and name of a function."""


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def imported(tree: ast.AST, modules: set[str]) -> dict[str, Place]:
    """Names in a file for a module of tests/ (its function is empty), or for something in one."""
    result = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {alias.asname or alias.name: (alias.name, "") for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            result |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return result


def reached(call: ast.AST, module: str, names: dict[str, Place]) -> Place | None:
    """The function that a call goes to, where the file says so."""
    match call:
        case ast.Call(func=ast.Name(id=name)):
            return names.get(name, (module, name))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
            return module, name
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
            return (names[owner][0], name) if names.get(owner, ("", "function"))[1] == "" else (owner, name)
    return None


PYTEST = {("pytest", "raises"), ("pytest", "warns"), ("pytest", "fail")}


def without_assertion(sources: dict[str, str]) -> list[str]:
    """Tests in these modules, by name, that assert nothing."""
    trees = {module: ast.parse(source) for module, source in sources.items()}
    calls: dict[Place, set[Place | None]] = {}
    asserting = set(PYTEST)
    for module, tree in trees.items():
        names = imported(tree, set(trees))
        for function in functions(tree):
            inside = list(ast.walk(function))
            calls.setdefault((module, function.name), set()).update(reached(node, module, names) for node in inside)
            if any(isinstance(node, ast.Assert) for node in inside):
                asserting.add((module, function.name))
    while more := {place for place, others in calls.items() if others & asserting} - asserting:
        asserting |= more
    return [
        f"{module}::{name}" for module, name in calls if name.startswith("test_") and (module, name) not in asserting
    ]


def without_match(sources: dict[str, str]) -> list[str]:
    """Places in these modules where `raises` or `warns` takes any message."""
    return [
        f"{module}:{node.lineno}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.raises", "pytest.warns", "raises")
        if not any(keyword.arg == "match" and not fits_everything(keyword.value) for keyword in node.keywords)
    ]


def fits_everything(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value in ("", ".", ".*", ".+", "^")


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf8") for path in files()}


def files() -> list[Path]:
    """All but pytest's own conftest.py, one a folder, which holds fixtures and no tests."""
    return sorted(path for path in HERE.rglob("*.py") if path.name != "conftest.py")


def test_files_have_names_of_their_own(sources: dict[str, str]) -> None:
    assert len(sources) == len(files())


def test_every_test_asserts_something(sources: dict[str, str]) -> None:
    assert without_assertion(sources) == []


def test_every_refusal_is_told_by_its_words(sources: dict[str, str]) -> None:
    assert without_match(sources) == []


def test_the_rules_find_what_they_look_for() -> None:
    """Helpers count, also through others and other files; calls of the product or of methods of an object do not."""
    helpers = "def check(x): assert x\ndef load(x): return x\ndef through(x): return check(x)"
    text = """
import helpers
from helpers import through as by
def local(x): return [by(each) for each in x]
def test_a(): assert True
def test_b(): local([1])
def test_c(): helpers.check(1)
def test_d(): helpers.load(1)
async def test_e(): await product.check()
def test_f():
    with pytest.raises(ValueError, match="x"):
        load("x")
def test_g():
    def inside(): assert 1
def test_h(run): run.through()
class TestThese:
    def ends(self): assert self
    def test_i(self): self.ends()
    def test_j(self): self.begins()
"""
    result = without_assertion({"file": text, "helpers": helpers})
    assert result == ["file::test_d", "file::test_e", "file::test_h", "file::test_j"]
    raising = "pytest.raises(A)\npytest.raises(A, match='')\npytest.raises(A, match='b')\nraises(A, f)\npytest.warns(B)"
    assert without_match({"file": raising}) == ["file:1", "file:2", "file:4", "file:5"]
