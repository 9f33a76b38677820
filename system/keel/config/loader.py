"""From a YAML file and `a.b=c` overrides to frozen settings, or to one line that says what is wrong.

Every user mistake found before Ray starts is a `ConfigError`; the command line prints it and exits with 2.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from keel import __version__
from keel.config.base import Section, blocks_of
from keel.config.run import Settings
from keel.errors import ConfigError

Model = TypeVar("Model", bound=Section)


SECRET = "headers"
"""The setting whose values are shown nowhere, also not where they are wrong: the user may have typed a secret."""


RENAMED = {
    "regulariser": "regularizer",
    "normalise_reward": "normalize_reward",
    "normalise_advantage": "normalize_advantage",
    "centre": "center",
    "centre_penalty": "center_penalty",
    "room_seconds": "placement_seconds",
}
"""Settings of Keel 0.1.0 that have another name since 0.2.0."""
_READ_SINCE = (0, 2)
"""The first version, as major and minor number, whose run directories this one reads."""
_HEADER = "# written by keel {version}; sha256 of the resolved settings: {digest}"
_HEADER_PATTERN = re.compile(_HEADER.format(version=r"(?P<version>\d+\.\d+\S*)", digest=r"(?P<digest>\S+)"))
_HEADER_OF_0_1_0 = "# sha256 of the resolved settings: "

OF_THE_PLACE = frozenset({"metrics", "tracking", "cluster", "deadlines"})
"""Blocks that say where a run lives and how it is watched; they change no number."""
MAY_CHANGE_ON_RESUME = OF_THE_PLACE | {"run.directory", "run.steps"}
"""What a resumed run may have otherwise than before; run.steps only where no learning rate depends on it."""
INTERRUPTED = 130
"""Exit code of a run that a signal or `keel stop` ended; bad input, ConfigError, is 2."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings of an online run from a YAML file with `a.b=c` overrides. Raises ConfigError as `load_as`."""
    return load_as(Settings, path, overrides)


def load_as(model: type[Model], path: str | Path, overrides: Sequence[str] = ()) -> Model:
    """Settings of a command from a YAML file, overrides applied, checked field by field and across fields.

    Raises ConfigError with one line for an unreadable file, an unknown key (with the nearest valid name),
    a wrong type or a broken rule.
    """
    return parse_as(model, read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of a YAML file with overrides applied, unchecked. Raises ConfigError."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ConfigError(
            f"config {path}: no such file; expected a YAML file, for instance configs/quickstart.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 30th of February, 10**5 digits
        raise ConfigError(f"config {path}: not YAML: {_problem(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: {type(tree).__name__} at the top; expected blocks such as policy:, prompts:")
    return changed(tree, overrides)


def changed(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with `a.b=c` overrides applied to it, unchecked. Raises ConfigError."""
    for override in overrides:
        _apply(tree, override)
    return tree


def parse(tree: dict[str, Any]) -> Settings:
    return parse_as(Settings, tree)


def parse_as(model: type[Model], tree: dict[str, Any]) -> Model:
    """Settings from a parsed tree; the first mistake becomes a ConfigError."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error, model)) from None


def stored_config(directory: Path, name: str, kind: str = "a run", any_version: bool = False) -> Path:
    """The config.yaml in a run's directory, which messages call `name`.

    Raises ConfigError where there is none, and for a run of a version whose files this one does not read.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{name}: no config.yaml in it; expected the directory of {kind}")
    version = _version_that_wrote(path)
    if not any_version and version and tuple(int(part) for part in version.split(".")[:2]) < _READ_SINCE:
        raise ConfigError(
            f"{name}: was written by Keel {version}; this is Keel {__version__}, whose settings, metrics and"
            f" checkpoints have other names; expected a run of this version: resume it with Keel {version}, or"
            f" start a new run with the renamed settings ({', '.join(RENAMED.values())})"
        )
    return path


def stored_digest(path: Path) -> str:
    """The digest in the first line of a config.yaml; the line itself where it is not one that Keel writes."""
    line = first_line(path)
    header = _HEADER_PATTERN.fullmatch(line)
    return header["digest"] if header else line


def _version_that_wrote(path: Path) -> str | None:
    """The version of Keel in the first line of a config.yaml; None for a file that Keel did not write."""
    line = first_line(path)
    header = _HEADER_PATTERN.fullmatch(line)
    return header["version"] if header else "0.1.0" if line.startswith(_HEADER_OF_0_1_0) else None


def first_line(path: Path) -> str:
    """The first line of a config.yaml, its header where Keel wrote the file."""
    with path.open(encoding="utf8", errors="replace") as file:
        return file.readline().rstrip("\n")


def dump(settings: Section) -> str:
    """The resolved configuration as YAML; the first line has the version of Keel and the digest."""
    body = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"{_HEADER.format(version=__version__, digest=digest(settings))}\n{body}"


def digest(settings: Section) -> str:
    """Hash of every setting that can change a step; those that may change on resume are left out."""
    tree = settings.model_dump(mode="json")
    for name in _may_change(settings):
        block, _, setting = name.partition(".")
        if setting:
            tree.get(block, {}).pop(setting, None)
        else:
            tree.pop(block, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _may_change(settings: Section) -> frozenset[str]:
    """The blocks and settings that this run may have otherwise when it is resumed."""
    depends = isinstance(settings, Settings) and settings.learners.rate_depends_on_steps
    return MAY_CHANGE_ON_RESUME - ({"run.steps"} if depends else set())


def difference(stored: dict[str, Any], settings: Section) -> str:
    """The settings in which a stored tree differs and may not, for one line."""
    pairs = leaves(stored), leaves(settings.model_dump(mode="json"))
    free = _may_change(settings)
    names = [key for key in {**pairs[0], **pairs[1]} if key not in free and key.partition(".")[0] not in free]
    changed = [key for key in names if pairs[0].get(key) != pairs[1].get(key)]
    shown = [f"{key}: {pairs[0].get(key)} there, {pairs[1].get(key)} here" for key in changed[:2]]
    return "; ".join(shown) + (f"; {len(changed) - 2} more" if len(changed) > 2 else "")


def leaves(node: Any) -> dict[str, Any]:
    """Values of a tree of settings by their name, as overrides write it."""
    return {name.removeprefix("."): value for name, value in dotted(node)}


def dotted(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """List the settings of a tree as (name behind a dot, value), in order."""
    if isinstance(node, dict | list) and node:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from dotted(child, f"{path}.{key}")
    else:
        yield path, node


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=c` (list entries by index or by their `name`: rewards.vader.weight=2)."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"override {_quoted(override)}: expected key.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {_quoted(override)}: the value is not YAML") from None
    if value == text:  # unquoted; YAML 1.1 reads 6e-5 as text, the number is meant
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = _child(node, key, ".".join(parents[: depth + 1]), override)
    if not isinstance(node, dict):
        raise ConfigError(f"override {_quoted(override)}: {'.'.join(parents)} is not a block; expected key.key=value")
    node[last] = value


def _quoted(override: str) -> str:
    """The override, without what follows the name of a secret setting."""
    path, secret, _ = override.partition(SECRET)
    return repr(f"{path}{secret}..." if secret else override)


def _problem(error: Exception) -> str:
    """Describe what is wrong with a YAML text and where, without the text, which may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{error.problem or error.context}, {place}"
    return str(error) if isinstance(error, yaml.YAMLError) else f"a value that cannot be read ({type(error).__name__})"


def _child(node: Any, key: str, where: str, override: str) -> Any:
    if isinstance(node, dict):
        return node[key]
    if isinstance(node, list):
        blocks = [item for item in node if isinstance(item, dict)]
        named = [item for position, item in enumerate(blocks) if key in (str(position), item.get("name"))]
        if named:
            return named[0]
        names = ", ".join(str(item.get("name")) for item in blocks) or "nothing: its entries are no blocks"
        raise ConfigError(f"override {_quoted(override)}: no entry {where}; expected one of {names}")
    raise ConfigError(f"override {_quoted(override)}: {where} is not a block; expected key.key=value")


def _one_line(error: ValidationError, model: type[Section]) -> str:
    """The first mistake of a validation as `setting=value: what was expected`."""
    errors = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part not in _tags())
    if SECRET in first["loc"]:
        return f"{where[: where.index(SECRET)]}{SECRET}: {first['msg']} (not shown here); expected NAME: ${{VARIABLE}}"
    if first["type"] == "extra_forbidden":
        *parents, key = first["loc"]
        names = list(_fields_at(model, parents))
        if RENAMED.get(str(key)) in names:
            return f"{where}: is called {RENAMED[str(key)]} since Keel 0.2.0; expected {RENAMED[str(key)]}"
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
        return f"{' '.join(where.split())}: unknown setting; {hint}"
    if first["type"] == "union_tag_invalid":
        return f"{where}.kind={first['ctx']['tag']}: expected one of {first['ctx']['expected_tags']}"
    if first["type"] == "missing":
        return f"{where}: missing; expected a value"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}.{message}" if where else message
    expected = message[0].lower() + message[1:]
    return f"{where}={first['input']!r}: {expected}"


@functools.cache
def _tags() -> frozenset[str]:
    """Kinds of objective: pydantic puts the kind that it chose into the location of an error."""
    return frozenset(_kinds(Settings.model_fields["objective"].annotation))


def _kinds(annotation: Any) -> dict[str, type[Section]]:
    """The blocks of a union by their `kind`."""
    return {get_args(block.model_fields["kind"].annotation)[0]: block for block in blocks_of(annotation)}


def _fields_at(root: type[Section], location: list[Any]) -> dict[str, Any]:
    """Field names of the block at a location of the settings tree."""
    model: Any = root
    annotation: Any = None
    for part in location:
        if part in _tags():
            model = _kinds(annotation)[part]
        elif not isinstance(part, int):
            annotation = model.model_fields[part].annotation
            model = next(iter(blocks_of(annotation)), None)
    return model.model_fields
