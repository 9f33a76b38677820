"""The recipes of the images: what they copy exists, what they run is the project's own set-up. No image is built here."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

import tools
from keel import __version__
from keel.cluster.kubernetes import USER

ROOT = Path(__file__).parents[3]
RECIPES = [ROOT / "deploy" / "docker" / f"Dockerfile.{target}" for target in ("cpu", "gpu")]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.suffix[1:])


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, its text) in order; lines that go on are one."""
    lines = [line for line in recipe.read_text(encoding="utf8").splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, text) for name, _, text in (line.partition(" ") for line in whole if line.strip())]


def texts(recipe: Path, name: str) -> list[str]:
    return [text for instruction, text in instructions(recipe) if instruction == name]


@each_recipe
def test_hadolint_finds_nothing(recipe: Path) -> None:
    answer = subprocess.run([tools.path_of("hadolint"), str(recipe)], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(RECIPES[0].read_text(encoding="utf8").replace("python:3.12-slim-trixie", "python"))
    answer = subprocess.run([tools.path_of("hadolint"), str(wrong)], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 1 and "DL3006" in answer.stdout


@each_recipe
def test_what_is_copied_exists_and_is_not_ignored(recipe: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for text in texts(recipe, "COPY") for source in text.split()[1:-1]]
    assert sorted(copied) == sorted(allowed)
    for source in copied:
        assert (ROOT / source).exists(), source


@each_recipe
def test_the_pins_are_installed_as_everywhere(recipe: Path) -> None:
    target = recipe.suffix[1:]
    setups = [text for text in texts(recipe, "RUN") if "setup.sh" in text]
    assert setups == [f"PYTHON=python3 ./requirements/setup.sh {target}"]
    assert (ROOT / "requirements" / f"{target}.txt").is_file()
    needed = {"gcc", "g++", "libnuma1", "wget"} | ({"python3-dev", "python3-venv"} if target == "gpu" else set())
    assert needed <= set(" ".join(texts(recipe, "RUN")).split())


@each_recipe
def test_nothing_runs_as_root(recipe: Path) -> None:
    steps = instructions(recipe)
    users = [text for name, text in steps if name == "USER"]
    assert users == [f"{USER}:{USER}"] and f"useradd --uid {USER}" in " ".join(texts(recipe, "RUN"))
    after = steps[steps.index(("USER", users[0])) :]
    assert ("ENTRYPOINT", '["keel"]') in after and any("setup.sh" in text for _, text in after)
    for name, text in after:
        assert name != "COPY" or text.startswith(f"--chown={USER}:{USER} "), text


@each_recipe
def test_the_label_is_the_version_and_nothing_else_is_told(recipe: Path) -> None:
    (label,) = texts(recipe, "LABEL")
    assert re.findall(r'image\.version="(.*?)"', label) == [__version__]
    assert not {"ARG", "ADD", "EXPOSE"} & {name for name, _ in instructions(recipe)}
    assert not re.search(r"https?://|token|password|secret", recipe.read_text(encoding="utf8"), re.IGNORECASE)


@each_recipe
def test_a_login_shell_finds_the_environment(recipe: Path, tmp_path: Path) -> None:
    """The line for /etc/profile.d, run as it is written, then read by a shell."""
    (run,) = [text for text in texts(recipe, "RUN") if "profile.d" in text]
    profile = tmp_path / "keel.sh"
    subprocess.run(["sh", "-c", run.partition(" && ")[0].replace("/etc/profile.d/keel.sh", str(profile))], check=True)
    answer = subprocess.check_output(["sh", "-c", f"PATH=/usr/bin; . {profile}; echo $PATH"], text=True)
    assert answer.strip() == "/opt/keel/.venv/bin:/usr/bin"


@each_recipe
def test_commands_are_well_formed(recipe: Path) -> None:
    for text in texts(recipe, "RUN"):
        assert subprocess.run(["sh", "-n", "-c", text]).returncode == 0, text


def test_the_context_is_small() -> None:
    """Runs, environments and history stay out: everything is ignored but what is named."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert not any(fnmatch(name, line[1:]) for name in (".venv", ".git", "runs", "tests") for line in lines[1:])
