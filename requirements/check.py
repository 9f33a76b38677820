"""Is the environment what the list of pins says? Reads metadata only, imports nothing heavy.

python check.py requirements/cpu.txt
"""

import sys
from importlib.metadata import distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

HERE = Path(__file__).parent


def lines(path: Path) -> list[Requirement]:
    """The requirements in a file, without comments."""
    texts = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(text) for text in texts if text]


def problems(pins: Path) -> list[str]:
    """Everything that is wrong, one line each."""
    found = []
    installed = {canonical(d.metadata["Name"]): d for d in distributions()}
    left_out = {
        canonical(requirement.name)
        for file in (HERE / "overrides.txt", HERE / f"overrides-{pins.stem}.txt")
        if file.exists()
        for requirement in lines(file)
    }
    for pin in lines(pins):
        here = installed.get(canonical(pin.name))
        if here is None:
            found.append(f"{pin} is not installed")
        elif not pin.specifier.contains(here.version, prereleases=True):
            found.append(f"{pin} is wanted, {here.version} is installed")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if find_spec(name):
            found.append(f"{name} is installed; its builds do not fit this torch (requirements/README.md)")
    if "keel-rlhf" not in installed:
        found.append("keel-rlhf is not installed")

    environment = {**default_environment(), "extra": ""}
    wanted = {canonical(r.name) for r in lines(pins)} | {"keel-rlhf"}
    for name in sorted(wanted & installed.keys()):
        for text in distribution(name).requires or ():
            need = Requirement(text)
            key = canonical(need.name)
            if key in left_out or (need.marker and not need.marker.evaluate(environment)):
                continue
            if key not in installed:
                found.append(f"{name} needs {need}, which is not installed")
            elif not need.specifier.contains(installed[key].version, prereleases=True):
                found.append(f"{name} needs {need}, {installed[key].version} is installed")
    return found


if __name__ == "__main__":
    errors = problems(Path(sys.argv[1]))
    print("\n".join(f"setup: {error}" for error in errors), end="\n" if errors else "", file=sys.stderr)
    sys.exit(1 if errors else 0)
