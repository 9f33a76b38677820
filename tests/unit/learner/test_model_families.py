"""The table of model families in docs/use/models.md is what the script says, and no family's code ends the script."""

import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from keel.learner import forward_contract
from keel.learner.forward_contract import Verdict

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    import model_families
    from model_families import DEFAULTS, Outcome
    from public_models import PUBLIC

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "use" / "models.md").read_text(encoding="utf8")
TABLE = PAGE.split(model_families.START)[1].split(model_families.END)[0]
ROWS = [line for line in TABLE.splitlines() if re.match(r"\| [\w-]+ \|", line) and not line.startswith("| family")]
SAMPLE = [
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "granite",
    "cohere2",
    "falcon",
    "bloom",
    "gpt_neo",
    "lfm2",
    "jamba",
    "xlnet",
]


@pytest.mark.timeout(1200)
def test_the_page_has_what_the_script_says_of_a_sample() -> None:
    made = model_families.rows(model_families.outcomes(SAMPLE, 1100.0))
    assert made == [line for family in SAMPLE for line in ROWS if line.startswith(f"| {family} |")]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_page_has_what_the_script_says() -> None:
    results = model_families.outcomes(model_families.families(), 2300.0)
    assert model_families.rows(results) == ROWS
    assert TABLE.startswith(model_families.summary(results))


def test_every_family_and_public_model_is_listed_and_more_than_45_pass() -> None:
    listed = {line.split(" | ")[0].removeprefix("| ") for line in ROWS}
    assert listed == set(model_families.families())
    tried = ", ".join(line.split(" | ")[1] for line in ROWS).split(", ")
    assert set(PUBLIC) - set(tried) == set()
    built = {line.split(" | ")[0] for line in ROWS if " | yes | " in line}
    fast = {line.split(" | ")[0] for line in ROWS if " | yes | yes | yes | " in line}
    assert len(built) > 100 and len(fast) > 45
    assert all(line.split(" | ")[5].strip(" |") for line in ROWS if " | yes | yes | yes | " not in line), "no reason"


@pytest.mark.parametrize("error", [RuntimeError("a | b\nc"), AssertionError("no"), ZeroDivisionError()])
def test_an_error_of_a_family_is_its_row(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> Verdict:
        raise error

    monkeypatch.setattr(forward_contract, "of_config", fail)
    [line] = model_families.rows([model_families.outcome("gpt2", DEFAULTS, {"model_type": "gpt2"})])
    words = " ".join(str(error).replace("|", " ").split())
    assert re.sub(
        " +", " ", line
    ) == f"| gpt2 | {DEFAULTS} | - | - | - | does not run: {type(error).__name__}: {words} |".replace(":  |", ": |")


def test_settings_that_fit_no_model_are_a_row() -> None:
    result = model_families.outcome("gpt2", "nothing", {"model_type": "gpt2", "n_layer": "many"})
    assert result.passes == ("-", "-", "-") and "does not run: " in result.note and "n_layer" in result.note


def test_a_family_that_takes_too_long_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_contract, "of_config", lambda config: time.sleep(60))
    monkeypatch.setattr(model_families, "FAMILY_SECONDS", 1)
    start = time.monotonic()
    result = model_families.outcome("gpt2", DEFAULTS, {"model_type": "gpt2"})
    assert result.note == "does not run: TooLong: took over 1 s"
    assert time.monotonic() - start < 30
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 1, "pytest's own limit is put back"


def test_what_the_time_does_not_reach_is_listed_as_not_tried() -> None:
    [result] = model_families.outcomes(["gpt2"], -1.0)
    assert result == Outcome("gpt2", "GPT-2", ("-", "-", "-"), "not tried within -1 s")


def test_configurations_with_the_same_outcome_share_a_row() -> None:
    passing, failing = ("yes", "yes", "yes"), ("yes", "no", "no")
    results = [Outcome("a", "x", passing, ""), Outcome("a", "y", failing, "why"), Outcome("a", "z", passing, "")]
    assert model_families.rows(results) == ["| a | x, z | yes | yes | yes |  |", "| a | y | yes | no | no | why |"]


def test_write_puts_the_table_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "models.md"
    page.write_text(f"before\n{model_families.START}old\n{model_families.END}\nafter\n", encoding="utf8")
    monkeypatch.setattr(model_families, "PAGE", page)
    monkeypatch.setattr(
        model_families, "outcomes", lambda wanted, seconds: [Outcome("gpt2", "x", ("yes", "yes", "yes"), "")]
    )
    monkeypatch.setattr(sys, "argv", ["model_families.py", "--write"])
    model_families.main()
    text = page.read_text(encoding="utf8")
    assert "old" not in text and text.startswith("before\n") and text.endswith(f"{model_families.END}\nafter\n")
    assert "| gpt2 | x | yes | yes | yes |  |" in text
