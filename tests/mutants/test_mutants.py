"""What is changed, what is left alone, and that the working tree is not touched."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")

import mutants
from mutants import ROOT, Group

SOURCE = '''"""Twice 2."""
import os as system
Number = dict[str, int | None]

class Block:
    size: int = Field(1, ge=1, description=f"{1 + 1} bytes" + "more")

    @property
    def double(self, *, factor: int | None = 3) -> int | str:
        """Return 2 * x."""
        assert self.size > 0, f"{self.size + 1}"
        for place, other in zip([1], [2], strict=True):
            pass
        if self.size == 4:
            raise ValueError(f"size={self.size - 1}", 7)
        return self.size * 2
'''
OPERATORS, GROUPS = mutants.configuration()


@pytest.fixture
def changed(tmp_path: Path) -> dict[int, set[str]]:
    """What is changed of the source, by line."""
    (tmp_path / "file.py").write_text(SOURCE)
    result: dict[int, set[str]] = {}
    for spec in mutants.mutants(Path("file.py"), OPERATORS, tmp_path):
        result.setdefault(spec.start_pos[0], set()).add(spec.operator_name.removeprefix("core/"))
    return result


def test_text_annotations_and_messages_are_left_alone(changed: dict[int, set[str]]) -> None:
    assert changed == {
        6: {"NumberReplacer"},  # the default and the bound, not the description
        9: {"NumberReplacer"},  # of the default: the annotations have an operator, too
        11: {"AddNot", "NumberReplacer", "ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_Gt_LtE"},
        12: {"NumberReplacer", "ZeroIterationForLoop"},
        14: {"AddNot", "NumberReplacer", "ReplaceComparisonOperator_Eq_NotEq"},
        16: {"NumberReplacer", "ReplaceBinaryOperator_Mul_Div"},
    }


def test_a_sample_has_a_mutant_a_line_and_follows_from_its_seed() -> None:
    path = Path("system/keel/algorithms/advantages.py")
    specs = list(mutants.mutants(path, OPERATORS, ROOT))
    drawn = [mutants.sample(specs, 12, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    lines = [spec.start_pos[0] for spec in drawn[0]]
    assert len(set(lines)) == 12 and lines == sorted(lines)
    whole = mutants.sample(specs, 10**6, 0)
    assert {spec.start_pos[0] for spec in whole} == {spec.start_pos[0] for spec in specs} and len(whole) > 12


def test_every_mutant_is_a_program_that_differs_from_the_original() -> None:
    path = Path("system/keel/algorithms/reward_shaping.py")
    source = (ROOT / path).read_text(encoding="utf8")
    for spec in mutants.mutants(path, OPERATORS, ROOT):
        operator = mutants.plugins.get_operator(spec.operator_name)()
        made = mutants.mutate_code(source, operator, spec.occurrence)
        assert made is not None and made != source
        ast.parse(made)
        assert mutants.difference(source, made).count("\n+ ") == 1


@pytest.mark.parametrize("group", GROUPS, ids=[group.name for group in GROUPS])
def test_a_group_has_modules_and_tests_that_are_there(group: Group) -> None:
    assert group.modules and all((ROOT / path).is_file() for path in group.modules)
    assert group.tests and all((ROOT / "tests" / name).is_file() for name in group.tests)
    assert not any("integration" in name for name in group.tests)


def test_the_groups_cover_what_is_promised_and_no_module_twice() -> None:
    paths = [str(path.relative_to(mutants.PACKAGE)) for group in GROUPS for path in group.modules]
    assert len(set(paths)) == len(paths)
    wanted = {
        "learner/networks",
        "learner/packing",
        "rollout/buffer",
        "checkpoint",
        "online/controller",
        "cluster/pool",
    }
    assert {f"{name}.py" for name in wanted | {"config/run", "analysis/compare"}} <= set(paths)
    algorithms = {f"algorithms/{path.name}" for path in (ROOT / mutants.PACKAGE / "algorithms").glob("*.py")}
    assert algorithms <= set(paths)


def test_a_mutant_is_judged_in_the_copy_which_is_put_back(tmp_path: Path) -> None:
    """One that a test notices, one that none does, one that never ends."""
    tree = tmp_path / "tree"
    (tree / "tests").mkdir(parents=True)
    source = "def size(x):\n    while x > 9:\n        x = x - 1\n    return x + 0\n"
    (tree / "module.py").write_text(source)
    (tree / "tests" / "test_module.py").write_text(
        "import pathlib\nspace = {}\nexec(pathlib.Path('module.py').read_text(), space)\n"
        "def test_size():\n    assert space['size'](12) == 9\n"
    )
    outcomes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        for spec in mutants.mutants(Path("module.py"), OPERATORS, tree):
            change = f"{spec.start_pos[0]} {spec.operator_name.removeprefix('core/')} {spec.occurrence}"
            if spec.operator_name.endswith(("Gt_GtE", "Sub_Add", "Add_Sub")):
                result = mutants.judge(
                    tree, spec, ["test_module.py"], 30.0 if spec.operator_name.endswith("Add_Sub") else 15.0
                )
                outcomes[change] = (result.is_killed, result.output.split(":")[0])  # type: ignore[union-attr]
            assert (tree / "module.py").read_text() == source
    assert outcomes == {
        "2 ReplaceComparisonOperator_Gt_GtE 0": (True, "failed"),
        "3 ReplaceBinaryOperator_Sub_Add 0": (True, "timeout"),
        "4 ReplaceBinaryOperator_Add_Sub 0": (False, "passed"),
    }
