"""Changes the code in one place at a time and looks whether the unit tests notice: `make mutants ARGS="--sample 200"`.

    sample      sites of cosmic-ray's operators that are not text or annotations, one a line, drawn by a seed
    one mutant  the module is changed in a copy of the tree; pytest of its group's files, in a fork of this process,
                which has the heavy libraries loaded already; killed: a test fails, or the time is up
    session     runs/mutants/NAME/session.sqlite, a work database of cosmic-ray (cr-report, cr-html read it): a second
                call continues where the first one ended; --again tries the survivors with the tests of now

What is changed and which tests belong to it: mutants.toml. The working tree itself is never written.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("system/keel")
PRELOADED = ("hypothesis", "numpy", "pyarrow", "pydantic", "pytest_asyncio", "pytest_timeout", "ray", "rich.table")
PRELOADED += (
    "scipy.optimize",
    "scipy.special",
    "scipy.stats",
    "torch",
    "torch.utils.checkpoint",
    "safetensors.torch",
    "xxhash",
)
PRELOADED += ("transformers.models.llama.modeling_llama", "transformers.models.gpt_neox.modeling_gpt_neox")
Position = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Modules that the same tests hold."""

    name: str
    modules: tuple[Path, ...]
    """Relative to the root."""
    tests: tuple[str, ...]
    """Relative to tests/."""


def configuration(root: Path = ROOT) -> tuple[list[str], list[Group]]:
    """Operators by cosmic-ray's names, and the groups of mutants.toml."""
    tree = tomllib.loads((root / "tests/mutants/mutants.toml").read_text(encoding="utf8"))
    groups = []
    for block in tree["groups"]:
        paths = [path for pattern in block["modules"] for path in sorted((root / PACKAGE).glob(pattern))]
        groups.append(Group(block["name"], tuple(path.relative_to(root) for path in paths), tuple(block["tests"])))
    return [f"core/{name}" for name in tree["operators"]], groups


def texts(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes in which a change means nothing to a program: annotations, decorators, descriptions, messages.

    Also zip's `strict`, which notices a mistake of the programmer and changes nothing where there is none.
    """
    for node in ast.walk(tree):
        match node:
            case ast.arg(annotation=note) | ast.AnnAssign(annotation=note) if note is not None:
                yield note
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from filter(None, [*node.decorator_list, node.returns])
            case ast.ClassDef():
                yield from node.decorator_list
            case ast.keyword(arg="description" | "strict", value=value):
                yield value
            case ast.Raise(exc=ast.Call(args=messages)):
                yield from messages
            case ast.Assert(msg=message) if message is not None:
                yield message
            case ast.JoinedStr() | ast.Import() | ast.ImportFrom():
                yield node
            case ast.Assign(value=ast.Subscript(value=ast.Name(id="Callable" | "dict" | "Annotated" | "Literal"))):
                yield node.value  # a type under a name


def span(node: ast.AST) -> tuple[Position, Position]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def mutants(path: Path, operators: Iterable[str], root: Path) -> Iterator[MutationSpec]:
    """Every mutant of a module that is not one of its texts alone."""
    source = (root / path).read_text(encoding="utf8")
    spared = [span(node) for node in texts(ast.parse(source))]
    bare = re.compile(r"(?:^\s*|[(,] ?)(\*),")  # the mark between parameters is no product
    lines = enumerate(source.splitlines(), 1)
    marks = {(number, result.start(1)) for number, line in lines for result in bare.finditer(line)}
    nodes = list(ast_nodes(get_ast(source)))
    for name in operators:
        operator = plugins.get_operator(name)()
        places = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(places):
            if start not in marks and not any(first <= start and end <= last for first, last in spared):
                yield MutationSpec(path, name, occurrence, start, end)


def sample(specs: Iterable[MutationSpec], size: int, seed: int) -> list[MutationSpec]:
    """At most one mutant a line, drawn by the seed, sorted by place; fewer where there are not as many lines."""
    by_line: dict[tuple[str, int], list[MutationSpec]] = defaultdict(list)
    for spec in specs:
        by_line[str(spec.module_path), spec.start_pos[0]].append(spec)
    draw = random.Random(seed)
    chosen = [draw.choice(by_line[line]) for line in sorted(by_line)]
    draw.shuffle(chosen)
    return sorted(chosen[:size], key=lambda spec: (str(spec.module_path), spec.start_pos))


def copy_tree(target: Path, *, modules: bool) -> None:
    """The files git would commit, as they are now; without `modules` only those under tests/."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *([] if modules else ["tests"])],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def preload(tree: Path) -> None:
    """Import what every test run would import, but for the code under test, and look for that in the copy."""
    paths = [str(tree / "system"), str(tree / "tests" / "support")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.path[:0] = paths
    for name in PRELOADED:
        importlib.import_module(name)
    assert not any(name == "keel" or name.startswith("keel.") for name in sys.modules)
    os.chdir(tree)


def run_tests(tests: Iterable[str], seconds: float, output: Path) -> tuple[str, float]:
    """`passed`, `failed` or `timeout` of these test files in a fork, and how long it took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            import pytest
            from hypothesis import Phase, settings

            phases = (
                Phase.explicit,
                Phase.generate,
            )  # that there is an example is enough: no smaller one is looked for
            settings.register_profile("mutants", settings.get_profile("ci"), phases=phases)
            for name in tests:  # one after the other: whatever the first file notices need not wait for the others
                arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
                arguments += ["--hypothesis-profile=mutants", "--tb=no"]
                if code := int(pytest.main([*arguments, str(Path("tests") / name)])):
                    break
        finally:
            os._exit(code)
    while time.monotonic() - began < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            assert code != 5, f"no test in {list(tests)}"
            return "failed" if code else "passed", time.monotonic() - began
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - began


def write(path: Path, text: str) -> None:
    """A module's text, and no byte code of another: two of a second and a size look alike to the cache."""
    path.write_text(text, encoding="utf8")
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def judge(tree: Path, spec: MutationSpec, tests: Iterable[str], seconds: float) -> WorkResult:
    """Change the module in the copy, run the tests, and put the module back."""
    path = tree / spec.module_path
    source = path.read_text(encoding="utf8")
    changed = mutate_code(source, plugins.get_operator(spec.operator_name)(), spec.occurrence)
    assert changed is not None, spec
    output = tree.parent / "output.txt"
    try:
        write(path, changed)
        ended, _ = run_tests(tests, seconds, output)
    finally:
        write(path, source)
    outcome = TestOutcome.SURVIVED if ended == "passed" else TestOutcome.KILLED
    last = [line for line in output.read_text(encoding="utf8", errors="replace").splitlines() if line.strip()][-1:]
    return WorkResult(WorkerOutcome.NORMAL, f"{ended}: {''.join(last)}", outcome, difference(source, changed))


def difference(before: str, after: str) -> str:
    """The lines that a mutant changed."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    return "\n".join(f"- {old.strip()}\n+ {new.strip()}" for old, new in pairs if old != new)


def session(directory: Path, size: int, seed: int, names: list[str]) -> tuple[WorkDB, list[Group]]:
    """The work database of a session, filled with its sample when it is new, and the groups."""
    operators, groups = configuration()
    new = not (directory / "session.sqlite").exists()
    directory.mkdir(parents=True, exist_ok=True)
    copy_tree(directory / "tree", modules=new)
    if new:
        shutil.copytree(directory / "tree" / PACKAGE, directory / "unchanged")
    shutil.rmtree(directory / "tree" / PACKAGE)  # an earlier call may have ended in between
    shutil.copytree(directory / "unchanged", directory / "tree" / PACKAGE)
    groups = [group for group in groups if group.name in names or not names]
    database = WorkDB(directory / "session.sqlite", WorkDB.Mode.create)
    if new:
        paths = [path for group in groups for path in group.modules]
        specs = [spec for path in paths for spec in mutants(path, operators, directory / "tree")]
        items = [
            WorkItem.single(f"{spec.module_path}:{spec.start_pos[0]}:{spec.operator_name}:{spec.occurrence}", spec)
            for spec in sample(specs, size, seed)
        ]
        database.add_work_items(items)
        print(f"{len(items)} of {len(specs)} mutants, seed {seed}")
    return database, groups


def work(directory: Path, database: WorkDB, groups: list[Group], *, again: bool) -> None:
    """Judge what has no result yet, or the survivors again, group by group."""
    tree = directory / "tree"
    preload(tree)
    survivors = {item.job_id: item for item, result in database.completed_work_items if not result.is_killed}
    todo = list(survivors.values()) if again else list(database.pending_work_items)
    for group in groups:
        items = sorted(
            (item for item in todo if item.mutations[0].module_path in group.modules), key=lambda i: i.job_id
        )
        if not items:
            continue
        ended, seconds = run_tests(group.tests, 600, directory / "output.txt")
        if ended != "passed":
            sys.exit(f"{group.name}: its tests do not pass unchanged, see {directory / 'output.txt'}")
        print(f"{group.name}: {len(items)} mutants, tests take {seconds:.1f} s", flush=True)
        for item in items:
            result = judge(tree, item.mutations[0], group.tests, 20 + 4 * seconds)
            database.set_result(item.job_id, result)
            print(f"  {result.test_outcome.value:9} {item.job_id}  {result.output}", flush=True)  # type: ignore[union-attr]


def report(database: WorkDB, groups: list[Group]) -> None:
    """Killed and survived by module, then every survivor with its change."""
    completed = database.completed_work_items
    total = [0, 0]
    for group in groups:
        for path in group.modules:
            results = [result for item, result in completed if item.mutations[0].module_path == path]
            killed = sum(result.is_killed for result in results)
            total = [total[0] + killed, total[1] + len(results)]
            if results:
                print(f"{group.name:12} {path.relative_to(PACKAGE)!s:36} {killed:4} of {len(results):4} killed")
    print(
        f"{total[0]} of {total[1]} killed ({total[0] / max(1, total[1]):.1%}), {len(database.pending_work_items)} to do"
    )
    for item, result in sorted(completed, key=lambda pair: pair[0].job_id):
        if not result.is_killed:
            print(f"\n{item.job_id}\n{result.diff}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="how many mutants a new session draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="*", default=[], help="of mutants.toml; all")
    parser.add_argument("--session", help="name of the session; seed-N")
    parser.add_argument("--again", action="store_true", help="try the survivors again with the tests of now")
    parser.add_argument("--report", action="store_true", help="only print what there is")
    options = parser.parse_args()
    directory = ROOT / "runs" / "mutants" / (options.session or f"seed-{options.seed}")
    database, groups = session(directory, options.sample, options.seed, options.groups)
    if not options.report:
        work(directory, database, groups, again=options.again)
    report(database, groups)


if __name__ == "__main__":
    main()
