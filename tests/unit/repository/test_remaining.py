"""How the tests are run: what is left is told by time, long files begin first, CI runs what README.md says, in random order."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import remaining
from remaining import LongFilesFirst, Remaining

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[3]
UNIT = [f"tests/test_a.py::test_{n}" for n in range(1000)]
REAL = [f"tests/integration/test_pool.py::test_{n}" for n in range(30)]  # of 5 s each, as long as all the others


def after(done: list[str], seconds: float, failed: int = 0) -> str:
    """The line after some of the tests."""
    left = Remaining(SimpleNamespace())  # type: ignore[arg-type]
    left.begin([*UNIT, *REAL])
    for test in done:
        left.pytest_runtest_logreport(SimpleNamespace(failed=left.failed < failed))  # type: ignore[arg-type]
        left.pytest_runtest_logfinish(test)
    return left.line(seconds)


def test_what_is_left_is_told_by_time_and_not_by_number() -> None:
    assert after(REAL, 300.0) == "30 of 1030 tests done in 5 min, none failed; about 5 min left"
    assert after(UNIT, 300.0, failed=2) == "1000 of 1030 tests done in 5 min, 2 failed; about 5 min left"
    assert after(UNIT + REAL[:15], 60.0) == "1015 of 1030 tests done in 60 s, none failed; about 20 s left"
    assert after(UNIT[:3], 60.0) == "3 of 1030 tests done in 60 s, none failed"  # too few to tell


@pytest.mark.parametrize(
    ("test", "seconds"),
    [
        ("tests/test_a.py::test_x", remaining.UNIT_SECONDS),
        (
            "tests/integration/test_runs.py::test_x[integration/test_pool.py]",
            remaining.SECONDS["integration/test_runs"],
        ),
        ("tests/integration/test_new.py::test_x", remaining.SECONDS["integration/"]),
        ("tests/chaos/test_chaos.py::test_x", remaining.SECONDS["chaos/"]),
    ],
)
def test_a_file_counts_before_its_folder(test: str, seconds: float) -> None:
    assert remaining.cost(test) == seconds


def test_every_file_that_has_a_time_is_there() -> None:
    names = [name for name in remaining.SECONDS if not name.endswith("/")]
    assert [name for name in names if not (ROOT / "tests" / f"{name}.py").exists()] == []


def test_long_files_begin_first_and_others_stay_where_they_are() -> None:
    files = ["test_b", "integration/test_pool", "test_a", "integration/test_two_runs", "chaos/test_chaos", "test_c"]
    items = [SimpleNamespace(nodeid=f"tests/{file}.py::test_1", path=Path(file)) for file in files]
    LongFilesFirst().pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [str(item.path) for item in items] == [
        "chaos/test_chaos", "integration/test_two_runs", "test_b", "integration/test_pool", "test_a", "test_c",
    ]  # fmt: skip


def commands(*arguments: str) -> list[str]:
    """The pytest commands that make would run."""
    printed = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in printed.splitlines() if " -m pytest " in line]


def test_ci_runs_what_the_page_says_and_then_what_it_leaves_out() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    called = re.findall(r"^make (test.*)$", script, re.M)
    assert called == ["test", 'test-rest MARKS="not exhaustive"']
    assert "\nmake test " in (ROOT / "README.md").read_text()
    quick, rest = commands("test"), commands("test-rest")
    assert len(quick) == len(rest) == 1 and commands("test-all") == quick + rest
    assert '-m "not slow"' in quick[0] and '-m "slow and (slow)"' in rest[0]
    assert '-m "slow and (not exhaustive)"' in commands("test-rest", "MARKS=not exhaustive")[0]


def test_what_ci_leaves_out_is_not_in_make_test(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """In random order, whose seed is printed and gives the same order again."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"), prepend=":")
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\nmarkers = ['slow', 'exhaustive', 'integration']\n")
    marked = "@pytest.mark.exhaustive\ndef test_more(): assert True\n@pytest.mark.slow\ndef test_slow(): assert True\n"
    plain = "@pytest.mark.parametrize('n', range(30))\ndef test_plain(n): assert True\n"
    pytester.makepyfile(test_it=f"import pytest\n{marked}{plain}")
    orders = []
    for seed in (3, 3, 4):
        result = pytester.runpytest_subprocess("-m", "not slow", "-v", f"--randomly-seed={seed}")
        result.assert_outcomes(passed=30, deselected=2)
        result.stdout.fnmatch_lines([f"Using --randomly-seed={seed}"])
        orders.append(re.findall(r"test_plain\[(\d+)\] PASSED", result.stdout.str()))
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(orders[2]) and orders[0] != orders[2]
