"""What every block of settings is made of: the base model and the types that several blocks use."""

import functools
import json
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A block of settings: unknown keys are refused, values are frozen once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class RunDirectory(Section):
    """Where a command writes."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="run id")
    directory: str = Field("runs/{name}", description="run directory; {name} is replaced by run.name")


class RunIdentity(RunDirectory):
    """Name, directory and seed of a run."""

    name: str = Field(  # with what Ray and Keel put around it, still the name of a file
        "run", pattern=r"^[A-Za-z0-9._-]+$", max_length=200, description="run id: label of every metric and file"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the run: everything random is a function of it and of a ticket"
    )


class CommandSettings(Section):
    """The configuration of one command, which has a run directory."""

    run: RunDirectory = Field(description="name and directory of the run")

    @property
    def run_directory(self) -> str:
        return self.run.directory.replace("{name}", self.run.name)


def blocks_of(annotation: Any) -> list[type[Section]]:
    """Blocks of settings in the type of a field: itself, or those of a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [block for part in get_args(annotation) for block in blocks_of(part)]


def is_source(value: str) -> bool:
    """Whether a text names the user's own code as module:name."""
    module, _, name = value.partition(":")
    return all(part.isidentifier() for part in [*module.split("."), name])


def one_of(names: tuple[str, ...], value: str) -> str:
    """The value if it is one of the names or the user's module:name; a one-line validation error otherwise."""
    if value in names or is_source(value):
        return value
    raise PydanticCustomError(
        "unknown_name", f"expected {' or '.join([', '.join(names)] * bool(names) + ['module:name of your own'])}"
    )


Source = Annotated[str, AfterValidator(functools.partial(one_of, ()))]
"""module:name of the user's own code."""


def _as_written(value: dict[str, Any]) -> dict[str, Any]:
    """The value if config.yaml gives back the same: YAML also has dates, sets, bytes, and blocks inside themselves."""
    try:
        same = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise PydanticCustomError(
            "no_json", "expected texts, finite numbers, true, false, null, lists and blocks of them"
        )
    return value


Options = Annotated[dict[str, Any], AfterValidator(_as_written)]
"""Settings that only the user's own code reads."""
_OF_RENDERING = {"conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"}
_OF_RENDERING |= {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
_OF_RENDERING |= {"return_assistant_tokens_mask", "tokenizer_kwargs"}


def _of_template(value: dict[str, Any]) -> dict[str, Any]:
    """The value if no keyword of it is one that Keel itself gives to the tokenizer."""
    if taken := sorted(_OF_RENDERING & set(value)):
        message = "{name} is no option of a template but how it is called; expected others"
        raise PydanticCustomError("not_of_template", message, {"name": taken[0]})
    return value


TemplateOptions = Annotated[Options, AfterValidator(_of_template)]
"""Keywords of a chat template."""
