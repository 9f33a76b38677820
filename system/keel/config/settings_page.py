"""The reference page of all settings, generated from the blocks: `keel settings` prints it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from keel.config.base import Section, blocks_of
from keel.config.commands import CONFIGURATIONS

_READ_BY = {
    "online": """
        RunSettings CheckpointSettings ParitySettings DivergenceSettings DisagreementSettings SlopeSettings
        CurvatureSettings EntropyDriftSettings ReferenceNllSettings LengthDriftSettings RepetitionSettings
        TemplateCollapseSettings GradNormSettings RaiseKlSettings LowerLrSettings
    """,
    "online, observability": "GuardSettings",
    "stages": "RunIdentity LabelRun PipelineRun StageEntry StageCheckpointSettings TrainingSettings MemberSettings",
    "learner, rollout": "PolicySettings",
    "rollout": "PromptSettings ColumnSettings MembersSettings EnsembleSettings NoiseSettings",
    "rollout, learner": "SamplingSettings RewardSettings CompletionSettings TextSettings",
    "algorithms": """
        PolicyGradientSettings EntropyAdvantageSettings PreferenceSettings PairSettings WeightedLikelihoodSettings
        LogitsConvexitySettings CustomObjectiveSettings RegularizerSettings KLSettings ControllerSettings
        EntropySettings ChiSquaredSettings AnswerEntropySettings TermSettings CovarianceSettings ShapingSettings
    """,
    "algorithms, learner": "CriticSettings DenseSettings",
    "online, stages": "FailureSettings EvaluationSettings",
    "online, rollout": "BufferSettings",
    "rollout, cluster": "GeneratorSettings ReferenceSettings ScorerSettings",
    "cluster": "WorkerSettings ClusterSettings",
    "learner, cluster": "LearnerSettings",
    "observability": "MetricsSettings TrackingSettings",
    "online, cluster, learner": "DeadlineSettings",
    "stages, learner": "CenterSettings",
}
READ_BY = {block: packages for packages, blocks in _READ_BY.items() for block in blocks.split()}
"""The packages of system/keel/ that read a block, by the name of its class."""
_UNITS = {
    "seconds": "s", "bytes": "bytes", "tokens": "tokens", "nats": "nats", "samples": "completions", "rows": "rows",
    "groups": "prompts", "steps": "steps", "share": "share", "staleness": "weight versions",
    "completions": "completions", "threads": "CPU threads", "cpus": "CPUs", "gpus": "GPUs", "held": "prompts",
}  # fmt: skip
"""Word of a setting's name -> its unit."""
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

_COMMANDS: dict[str, type[Section]] = {
    command: section for command, section in CONFIGURATIONS.items() if command != "evaluate"
}
"""`keel evaluate` reads the configuration of `keel train`."""


@dataclass
class _Block:
    """One block of settings and every place where a configuration has it."""

    section: type[Section]
    paths: dict[str, list[str]] = field(default_factory=dict)
    """As overrides write it -> the commands."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Path -> defaults that differ there from those of the block."""


def page() -> str:
    """Render all settings as Markdown: a table a command, then a table a block."""
    blocks = _blocks()
    titles = _titles(blocks)
    lines = ["## Commands", ""]
    for command, section in _COMMANDS.items():
        lines += [f"### keel {command}", "", *_table(section, titles)]
    lines += ["## Blocks", ""]
    for section, block in blocks.items():
        lines += [f"### {titles[section]}", "", *_introduction(block), "", *_table(section, titles)]
    return "\n".join(lines).rstrip("\n")


def _blocks() -> dict[type[Section], _Block]:
    """Collect the blocks below the commands, in the order in which configurations have them."""
    blocks: dict[type[Section], _Block] = {}
    for command, configuration in _COMMANDS.items():
        for path, child, default in _below(configuration, ""):
            block = blocks.setdefault(child, _Block(child))
            block.paths.setdefault(path, []).append(command)
            if isinstance(default, Section) and (changed := default.model_dump(exclude_defaults=True)):
                block.defaults[path] = ", ".join(f"`{name}` is {_code(value)}" for name, value in changed.items())
    return blocks


def _below(section: type[Section], path: str) -> Iterator[tuple[str, type[Section], Any]]:
    """Path, class and default of every block in a block, at any depth."""
    for name, info in section.model_fields.items():
        for child in blocks_of(info.annotation):
            place = f"{path}{name}.NAME" if get_origin(info.annotation) is list else f"{path}{name}"
            yield place, child, info.default
            yield from _below(child, f"{place}.")


def _titles(blocks: dict[type[Section], _Block]) -> dict[type[Section], str]:
    """The heading of every block: its first path, with its kind, and with its commands where a path is used twice."""
    firsts = {section: _first(block) for section, block in blocks.items()}
    several = {title for title in firsts.values() if list(firsts.values()).count(title) > 1}
    titles = {}
    for section, title in firsts.items():
        commands = ", ".join(next(iter(blocks[section].paths.values())))
        titles[section] = f"{title} of keel {commands}" if title in several else title
    return titles


def _first(block: _Block) -> str:
    path = next(iter(block.paths))
    kinds = get_args(block.section.model_fields["kind"].annotation) if "kind" in block.section.model_fields else ()
    return f"{path}, kind {kinds[0]}" if len(kinds) == 1 else path


def _introduction(block: _Block) -> list[str]:
    """Describe a block: what it is, where it is, and which packages read it."""
    summary = (block.section.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()
    places = "; ".join(f"`{path}` of {', '.join(commands)}" for path, commands in block.paths.items())
    lines = [_text(re.sub(r"\s+", " ", summary)), "", f"In {places}. Read by {READ_BY[block.section.__name__]}."]
    lines += [f"In `{path}`, {changed}." for path, changed in block.defaults.items()]
    return lines


def _table(section: type[Section], titles: dict[type[Section], str]) -> list[str]:
    """A row a setting."""
    properties = section.model_json_schema()["properties"]
    rows = []
    for name, info in section.model_fields.items():
        linked = dict.fromkeys(titles[child] for child in blocks_of(info.annotation))
        values = ", ".join(f"[{title}](#{_anchor(title)})" for title in linked) or _values(properties[name])
        unit = _unit(name) if "number" in values else ""
        cells = (f"`{name}`", _text(info.description or ""), unit, values, _default(info))
        rows.append(f"| {' | '.join(cells)} |")
    return ["| setting | meaning | unit | values | default |", "|---|---|---|---|---|", *rows, ""]


def _anchor(title: str) -> str:
    """The anchor that Markdown gives a heading."""
    return re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")


def _unit(name: str) -> str:
    if name.endswith(("_ratio", "_seed")):
        return "share" if name.endswith("_ratio") else ""
    return next((unit for word, unit in _UNITS.items() if word in name.split("_")), "")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    return "" if isinstance(info.default, Section) else _code(info.default)


def _code(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _text(text: str) -> str:
    """A description with the characters escaped that Markdown reads."""
    return re.sub(r"([|*$<])", r"\\\1", text)


def _values(schema: dict[str, Any]) -> str:
    """Type and bounds of a setting, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_values, schema["anyOf"])))
    if options := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{option}`" for option in options)
    if schema["type"] == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        return f"list of: {_values(items)}"
    if schema["type"] in ("object", "null"):
        return {"object": "block of NAME: value", "null": "`null`"}[schema["type"]]
    bounds = ", ".join(f"{sign} {schema[bound]:.15g}" for bound, sign in _BOUNDS.items() if bound in schema)
    return ", ".join(filter(None, (_TYPES[schema["type"]], bounds)))
