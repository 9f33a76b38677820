"""The pages name only what exists (files, links, commands, options), say what they are for, and are written plainly."""

import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperCommand, TyperGroup

from keel.cli.main import app
from keel.config import loader

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf8")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "configs", "requirements") for page in (ROOT / folder).rglob("*.md")),
    ]
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
HISTORY = {"CHANGELOG.md", "docs/develop/log.md"}
"""Pages that speak of earlier versions."""
page_of_today = pytest.mark.parametrize(
    "page",
    [page for page in PAGES if str(page.relative_to(ROOT)) not in HISTORY],
    ids=lambda page: str(page.relative_to(ROOT)),
)
FOLDERS = ["system/keel", "tests", "benchmarks", "configs", "deploy", "docs", "requirements"]
FILES = {
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if "__pycache__" not in path.parts
}
OF_USERS = re.compile(r"my_\w+\.py|yaml\.py")
"""Python files that examples have a user write."""
MADE = {"deploy/prometheus/discovery"}
"""Folders that a command of a page makes."""
PRIVATE_WORDS = re.compile(r"\b(nobody|whoever|whom|anew|goes on|so many)\b", re.IGNORECASE)
PLAIN = [
    "Makefile",
    "benchmarks/*.py",
    "configs/**/*.yaml",
    "deploy/**/*.yml",
    "deploy/*/*.s*",
    "requirements/*",
    "system/keel/**/*.py",
]
"""Files other than pages that are free of them, as patterns."""


def test_the_readme_is_short() -> None:
    assert len(README.encode("utf8")) <= 12_000


def test_the_settings_of_the_readme_are_those_of_a_run() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert loader.parse(yaml.safe_load(text)).run.name == "mine" and len(text.splitlines()) <= 10


def test_the_architecture_has_every_package() -> None:
    text = (ROOT / "docs/understand/architecture.md").read_text(encoding="utf8")
    packages = {path.parent.name for path in (ROOT / "system/keel").glob("*/__init__.py")}
    assert set(re.findall(r"^\*\*(\w+)\*\*", text, re.MULTILINE)) == packages


def test_the_architecture_names_what_exists() -> None:
    """Classes, their methods and functions in its tables are defined in Keel."""
    text = (ROOT / "docs/understand/architecture.md").read_text(encoding="utf8")
    code = "".join(path.read_text(encoding="utf8") for path in (ROOT / "system/keel").rglob("*.py"))
    defined = set(re.findall(r"^\s*(?:async def|def|class) (\w+)|^([A-Z]\w+) = ", code, re.MULTILINE))
    names = {name for pair in defined for name in pair}
    for span in re.findall(r"`([A-Z]\w+(?:\.\w+)?|\w+\.\w+)`", text):
        if not span.endswith((".py", ".jsonl", ".json")):
            assert set(span.split(".")) <= names, span


def test_the_map_has_every_page() -> None:
    """Runbooks have a map of their own."""
    text = (ROOT / "docs/README.md").read_text(encoding="utf8")
    listed = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", text)}
    runbooks = ROOT / "docs/runbooks"
    pages = {page for page in (ROOT / "docs").rglob("*.md") if runbooks not in page.parents}
    assert {page.resolve() for page in pages - {ROOT / "docs/README.md"}} <= listed


@pytest.mark.parametrize("page", [page for page in PAGES if not page.name.startswith("keel-")], ids=str)
def test_a_page_says_first_what_it_is_for(page: Path) -> None:
    title, first, *_ = [block for block in page.read_text(encoding="utf8").split("\n\n") if block.strip()]
    assert re.fullmatch(r"# .+", title.strip()), title
    assert re.match(r"[\w`*\[]", first) and first.rstrip()[-1] in ".:", first


@page_of_today
def test_a_path_exists(page: Path) -> None:
    """Those from the root of the repository, and the module names of every other mention of a Python file."""
    text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf8"))
    rooted = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w(?![\w{{*])", text)
    assert set(rooted) - FILES - MADE == set()
    for name in set(re.findall(r"`([\w/]+\.py)\b", text)):
        assert OF_USERS.fullmatch(name) or any(f"/{file}".endswith(f"/{name}") for file in FILES), name


@page_of_today
def test_an_import_of_a_page_works(page: Path) -> None:
    """Those from Keel itself, and the modules of Keel that a page names with dots."""
    text = page.read_text(encoding="utf8")
    for module, names in re.findall(r"from (keel[\w.]*) import ([\w, ]+)", text):
        for name in names.replace(" ", "").split(","):
            assert importable(f"{module}.{name}"), (module, name)
    for name in re.findall(r"`(keel(?:\.[a-zA-Z]\w*)+)`", text):
        assert importable(name), name


def importable(name: str) -> bool:
    """Whether a dotted name is a module of Keel, or a name in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@page_of_today
def test_a_page_is_written_plainly(page: Path) -> None:
    lines = page.read_text(encoding="utf8").splitlines()
    assert [line for line in lines if PRIVATE_WORDS.search(line)] == []


@pytest.mark.parametrize("pattern", PLAIN)
def test_code_is_written_plainly(pattern: str) -> None:
    files = [path for path in ROOT.glob(pattern) if path.is_file()]
    assert files
    for path in files:
        lines = path.read_text(encoding="utf8").splitlines()
        assert [line for line in lines if PRIVATE_WORDS.search(line)] == [], path


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)", page.read_text(encoding="utf8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_a_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        to = page.parent / path if path else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


def command_of(words: list[str]) -> TyperCommand | TyperGroup | None:
    """The command that a line calls; None where the first word is none of Keel's."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if not isinstance(command, TyperGroup):
            break
        if word not in command.commands:
            return None
        command = command.commands[word]
    return command


def calls(text: str) -> list[str]:
    """Every `keel ...` of a page's code, without its first word; a continued line is one."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for code in [*blocks, *spans] for line in code.replace("\\\n", " ").splitlines()]
    return [call for line in lines for call in re.findall(r"(?<!from )(?<![\w.-])keel ([a-z][^|;#&>`]*)", line)]


@every_page
def test_a_command_and_its_options_exist(page: Path) -> None:
    for call in calls(page.read_text(encoding="utf8")):
        command = command_of(call.replace(",", " ").split())
        assert command, f"keel {call}"
        options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", call)) <= options | {"--help"}, f"keel {call}"


def test_calls_are_found() -> None:
    called = calls(
        "`keel scale RUN_DIR --learners 2`\n```\n$ keel plan a.yaml \\\n  --gpus 8 | less\n.venv/bin/keel sft b\n```\n"
    )
    assert [call.split()[0] for call in called] == ["plan", "sft", "scale"] and "--gpus 8" in called[0]


def test_the_table_of_commands_has_all_of_them() -> None:
    table = README.partition("| command | what it does |")[2].partition("\n\n")[0]
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    missing = {name for name in root.commands if not re.search(rf"`keel {name}[ `]", table)}
    assert missing == set()


def test_the_table_of_events_has_all_of_them() -> None:
    table = (
        (ROOT / "docs/operate/reliability.md")
        .read_text(encoding="utf8")
        .partition("| event | when |")[2]
        .partition("\n\n")[0]
    )
    sources = [path.read_text(encoding="utf8") for path in (ROOT / "system/keel").rglob("*.py")]
    written = {name for text in sources for name in re.findall(r'(?:\.event\(\s*|"event": )"(\w+)"', text)}
    listed = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert listed == written and len(written) > 10
