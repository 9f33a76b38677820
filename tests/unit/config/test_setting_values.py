"""Every default and every bound of every setting, as they are promised: tests/unit/config/setting_values.txt has a line for each.

A changed default is another experiment under the same file, so it has to be meant: after a change on purpose,

    python tests/unit/config/test_setting_values.py

writes the table again, and the difference is there to be read.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from setting_blocks import sections

TABLE = Path(__file__).with_name("setting_values.txt")
BOUNDS = ("gt", "ge", "lt", "le", "min_length", "max_length", "pattern")


def bounds(field: FieldInfo) -> dict[str, Any]:
    """What pydantic was told of the values, the annotated types inside included."""
    result: dict[str, Any] = {}
    for item in field.metadata:
        result |= {name: getattr(item, name) for name in BOUNDS if getattr(item, name, None) is not None}
    return result


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return type(value).__name__ if isinstance(value, BaseModel) else json.dumps(value)


def lines() -> list[str]:
    """`Block.setting = default  bound value ...`, sorted."""
    result = []
    for block, section in sections().items():
        for name, field in section.model_fields.items():
            limits = "".join(f"  {bound} {json.dumps(value)}" for bound, value in bounds(field).items())
            result.append(f"{block}.{name} = {default(field)}{limits}")
    return sorted(result)


def test_defaults_and_bounds_are_those_of_the_table() -> None:
    promised = TABLE.read_text(encoding="utf8").splitlines()
    assert lines() == promised, "meant? then: python tests/unit/config/test_setting_values.py"


NUMERIC = [
    (block, name, bound, value)
    for block, section in sections().items()
    for name, field in section.model_fields.items()
    for bound, value in bounds(field).items()
    if bound in ("gt", "ge", "lt", "le")
]


@pytest.mark.parametrize(("block", "name", "bound", "value"), NUMERIC, ids=[f"{b}.{n}-{x}" for b, n, x, _ in NUMERIC])
def test_a_bound_is_kept_at_the_number_itself(block: str, name: str, bound: str, value: float) -> None:
    """At the bound, and one step to the wrong side of it: the smallest there is for a float, 1 for an integer."""
    field = sections()[block].model_fields[name]
    adapter = TypeAdapter(field.rebuild_annotation())
    step = 1 if "int" in str(field.annotation) and "float" not in str(field.annotation) else 1e-9 * max(1, abs(value))
    outside = value - step if bound in ("gt", "ge") else value + step
    refused = [outside] + [value] * (bound in ("gt", "lt"))
    for number in refused:
        with pytest.raises(ValidationError, match=r"should be (less|greater) than"):
            adapter.validate_python(number)
    if bound in ("ge", "le"):
        assert adapter.validate_python(value) == value


if __name__ == "__main__":
    TABLE.write_text("".join(f"{line}\n" for line in lines()), encoding="utf8")
