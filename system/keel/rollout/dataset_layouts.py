"""Which columns of a data set are what: the layouts that other projects write, or those that `prompts.columns` names.

column names --recognize--> roles (prompt, chosen, ...) --read--> of every row its prompt and its answers

Only documented layouts are guessed (docs/use/stages.md has the table); what may be read in two ways is refused with the
name of the setting that decides it.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.config.prompts import PromptSettings
from keel.errors import ConfigError
from keel.rollout.conversations import head_of, joined, turns

ANSWERS = "keel.answers"
"""Key, beside a row's columns, of its answers where they are not under TRL's names in TRL's form."""
CONVERSATIONS = ("messages", "conversations", "conversation")
_CANONICAL = ("chosen", "responses", "completion", "messages")
"""Which column's answers are read where a row has several, without the key."""
_KINDS: dict[int, list[tuple[str, ...]]] = {
    1: [("completion",), ("messages",)],
    2: [("chosen", "rejected"), ("responses", "rewards")],
}
_EXPECTED = {1: "prompt and completion, or messages", 2: "prompt, chosen and rejected, or responses and rewards"}


@dataclass(frozen=True)
class Reading:
    """What a row holds."""

    prompt: Any
    """Text or messages, unchecked."""
    column: str
    """Where the layout comes from, for the text of an error."""
    explicit: bool
    """All of `prompt` is the prompt; else a conversation that ends with its answer."""
    conversational: bool
    answers: dict[str, Any] | None = None
    """`given`, `rewards`, `finished`, `problem`; None where they are under TRL's names in TRL's form."""


@dataclass(frozen=True)
class DatasetLayout:
    """Roles of the columns of one source."""

    roles: Mapping[str, str]
    names: Sequence[str]
    samples: int
    """Answers of a row: 0 where only prompts are read."""
    kind: tuple[str, ...] = ()
    """Roles of the answers."""
    named: frozenset[str] = field(default_factory=frozenset)
    """Roles that the configuration names."""
    within: bool = False
    """The prompt is text, and stands in a conversation of the row, which is read instead (UltraFeedback)."""

    def read(self, columns: Mapping[str, Any]) -> Reading:
        """The prompt of a row, and its answers where `samples` asks for any."""
        if not self.samples:
            return self._prompt_alone(columns)
        given, rewards = self._answers(columns)
        conversations = [value for value in given if isinstance(value, list)]
        column, prompt = self._prompt(columns, any(len(value) > 1 for value in conversations))
        explicit, problem = column is not None, None
        if column is None:  # the answers' conversations begin with the prompt
            column = self.roles[self.kind[0]]
            prompt, problem = head_of(conversations) if conversations else (given[0] if given else None, None)
        elif conversations:
            prompt, problem = joined(prompt, conversations)
        conversational = bool(conversations) or isinstance(columns.get(column), list)
        return Reading(prompt, column, explicit, conversational, self._packed(columns, given, rewards, problem))

    def _prompt_alone(self, columns: Mapping[str, Any]) -> Reading:
        column, prompt = self._prompt(columns, True)
        if column is not None and not self.within:
            return Reading(prompt, column, True, isinstance(columns.get(column), list))
        column = self.conversation(columns)
        return Reading(turns(columns.get(column), self.within is False), column, False, True)

    def conversation(self, columns: Mapping[str, Any]) -> str:
        """The column whose conversation holds the prompt."""
        names = [self.roles[role] for role in ("messages", "chosen", "completion") if role in self.roles]
        assert names, self.roles
        return next((name for name in names if isinstance(turns(columns.get(name)), list)), names[0])

    def _prompt(self, columns: Mapping[str, Any], whole: bool) -> tuple[str | None, Any]:
        """Column and value of the prompt; no column where conversations (`whole`) hold prompt and answer."""
        column = self.roles.get("prompt")
        if column is None and "messages" in self.roles and self.kind != ("messages",) and not whole:
            return self.roles["messages"], turns(columns.get(self.roles["messages"]))
        if column is None:
            return None, None
        value = columns.get(column)
        value = turns(value) if not isinstance(value, str) else value
        more = columns.get(self.roles.get("input", ""))
        if isinstance(value, str) and isinstance(more, str) and more.strip():
            value = f"{value}\n\n{more}"
        system = columns.get(self.roles.get("system", ""))
        if isinstance(value, str) and "system" in self.roles:
            first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
            value = [*first, {"role": "user", "content": value}] if value.strip() else ""
        return column, value

    def _answers(self, columns: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """Texts or conversations of a row, and its rewards."""
        values = [columns.get(self.roles[role]) for role in self.kind]
        transcripts = "prompt" not in self.roles
        if self.kind == ("responses", "rewards"):
            given = values[0] if isinstance(values[0], list) else [values[0]]
            return [turns(value, transcripts) for value in given], values[1]
        label = columns.get(self.roles["label"]) if "label" in self.roles else 0.0
        good = float(label) if isinstance(label, bool | int | float) and label in (0, 1) else None
        rewards = [1.0, 0.0] if len(self.kind) == 2 else [good]
        return [turns(value, transcripts) for value in values], rewards

    def _packed(
        self, columns: Mapping[str, Any], given: list[Any], rewards: Any, problem: str | None = None
    ) -> dict[str, Any] | None:
        """The answers as stored_completions.py reads them; None where it finds the same under TRL's names."""
        first = next((name for name in _CANONICAL if name in self.names), None)
        same = all(self.roles[role] == role for role in self.kind) and first == self.kind[0]
        raw: Any = [columns.get(role) for role in self.kind]
        if self.kind == ("responses", "rewards"):
            raw = raw[0]
        if same and raw == given and problem is None and "label" not in self.roles:
            return None
        flags = ["chosen_finished", "rejected_finished"] if self.kind[0] == "chosen" else [""] * len(given)
        finished = [columns.get(name) is not False for name in flags]
        labeled = "label" in self.roles
        return {"given": given, "rewards": rewards, "finished": finished, "problem": problem, "labeled": labeled}


def recognize(names: Sequence[str], prompts: PromptSettings, samples: int) -> DatasetLayout:
    """Roles of these columns for rows with this number of answers. Raises ConfigError."""
    roles = _named(names, prompts)
    named = frozenset(roles)
    _guess_prompt(roles, names, prompts)
    if samples:
        kind = _answer_kind(roles, named, names, prompts, samples)
        if "prompt" not in roles and kind[0] == "chosen":  # axolotl: the prompt in messages of its own
            _guess(roles, "messages", [name for name in CONVERSATIONS if name in names], prompts, True)
        return DatasetLayout(roles, names, samples, kind, named)
    if prompts.column == "prompt":
        conversations = [name for name in CONVERSATIONS if name in names]
        _guess(roles, "messages", conversations, prompts, "prompt" not in roles)
        _guess(roles, "chosen", [name for name in ("chosen",) if name in names], prompts, False)
    if not {"prompt", "messages", "chosen", "completion"} & roles.keys():
        raise _no_prompt(names, prompts)
    return DatasetLayout(roles, names, 0, named=named)


def _named(names: Sequence[str], prompts: PromptSettings) -> dict[str, str]:
    """Roles that the configuration names."""
    roles = {role: name for role, name in prompts.columns if name is not None}
    for role, name in roles.items():
        if name not in names:
            raise ConfigError(f"prompts.columns.{role}={name}: {_no_column(names, prompts)}")
    if prompts.column != "prompt":
        if roles.get("prompt", prompts.column) != prompts.column:
            raise ConfigError(
                f"prompts.columns.prompt={roles['prompt']}: prompts.column={prompts.column} says another; expected one"
            )
        if prompts.column not in names:
            raise _no_prompt(names, prompts)
        roles["prompt"] = prompts.column
    return roles


def _no_prompt(names: Sequence[str], prompts: PromptSettings) -> ConfigError:
    near = difflib.get_close_matches(prompts.column, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"prompts.column={prompts.column}: {_no_column(names, prompts)}{hint}")


def _no_column(names: Sequence[str], prompts: PromptSettings) -> str:
    return f"no such column in {prompts.source}; expected one of {_listed(names)}"


def _guess_prompt(roles: dict[str, str], names: Sequence[str], prompts: PromptSettings) -> None:
    pair = ("chosen" in names and "rejected" in names) or "preferred_output" in names or "chosen" in roles
    answered = pair or "completion" in roles or any(name in names for name in ("completion", "output", "response"))
    if "prompt" in names:
        roles.setdefault("prompt", "prompt")
    elif "messages" not in roles:
        known = {"instruction": answered, "question": answered, "input": pair and "instruction" not in names}
        _guess(roles, "prompt", [name for name, present in known.items() if present and name in names], prompts, True)
    if roles.get("prompt") == "instruction" and "input" in names:
        roles.setdefault("input", "input")
    documented = ("instruction", "question", "input", *(["prompt"] if pair else []))
    if roles.get("prompt") in documented:
        present = [name for name in ("system", "system_prompt") if name in names]
        _guess(roles, "system", present, prompts, True)


def _guess(roles: dict[str, str], role: str, candidates: list[str], prompts: PromptSettings, needed: bool) -> None:
    """Give the role the one column there is. Raises ConfigError where it is needed and there are several."""
    if role in roles or not candidates:
        return
    if len(candidates) > 1 and needed:
        raise ConfigError(
            f"prompts.columns.{role}=null: {prompts.source} has {' and '.join(candidates)}, each of which it may be;"
            f" expected prompts.columns.{role}={candidates[0]}, or another of them"
        )
    roles[role] = candidates[0]


def _answer_kind(
    roles: dict[str, str], named: frozenset[str], names: Sequence[str], prompts: PromptSettings, samples: int
) -> tuple[str, ...]:
    """The roles that hold the answers; columns for them are added. Raises ConfigError, naming all that are missing."""
    alpaca = ("output", "response") if roles.get("prompt") in ("instruction", "question") else ()
    guesses: dict[str, tuple[str, ...]] = {
        "completion": ("completion", *alpaca),
        "messages": CONVERSATIONS,
        "chosen": ("chosen", "preferred_output"),
        "rejected": ("rejected", "non_preferred_output"),
        "responses": ("responses",),
        "rewards": ("rewards",),
    }
    kinds = _KINDS.get(samples, [("responses", "rewards")])
    kinds = sorted(kinds, key=lambda kind: -sum(role in named for role in kind))
    columns = {role: [name for name in guesses[role] if name in names] for kind in kinds for role in kind}
    for kind in kinds:
        apart = kind == ("completion",) and "prompt" not in roles and "completion" not in named
        if not apart and all(role in roles or columns[role] for role in kind):
            for role in kind:
                _guess(roles, role, columns[role], prompts, True)
            return kind
    kind = max(kinds, key=lambda kind: sum(role in roles or bool(columns[role]) for role in kind))
    missing = [role for role in kind if role not in roles and not columns[role]]
    if "prompt" not in roles and kind != ("messages",):
        missing.insert(0, "prompt")
    raise ConfigError(_missing(missing, names, prompts, samples))


def _missing(missing: Sequence[str], names: Sequence[str], prompts: PromptSettings, samples: int) -> str:
    hint = ""
    if samples == 1 and "chosen" in names:
        hint = " (columns.completion=chosen trains on the preferred answers)"
    elif samples > 1 and "completion" in names:
        hint = " (one answer a row makes no pair)"
    elif samples == 1 and "text" in names:
        hint = " (where the prompt ends in `text` cannot be told)"
    settings = ", ".join(f"prompts.columns.{role}=NAME" for role in missing)
    return (
        f"{prompts.source_setting}={prompts.source}: no column {' and '.join(missing)}; it has {_listed(names)}{hint};"
        f" expected {_EXPECTED.get(samples, f'prompt, responses and rewards, {samples} of each')}, or {settings}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "(it has no columns)"


def label_column(rows: Sequence[Mapping[str, Any]], layout: DatasetLayout) -> str | None:
    """The column of an unpaired preference: named, or `label` beside a completion where it is true or false in all."""
    if "label" in layout.roles:
        return layout.roles["label"]
    plain = layout.kind == ("completion",) and "label" in layout.names
    return "label" if plain and all(isinstance(row.get("label"), bool) for row in rows) else None
