"""Text that somebody else wrote breaks neither a file nor the terminal nor a picture: it is shown, never obeyed."""

import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from keel import schema
from keel.analysis import frontier_plot
from keel.cli import main, summary
from keel.config import loader
from keel.config.prompts import PromptSettings
from keel.config.rewards import EnsembleSettings, RewardSettings
from keel.config.run import Settings
from keel.config.workers import ScorerSettings
from keel.errors import ConfigError
from keel.learner import export
from keel.observability.console import Terminal, progress_display
from keel.rollout import datasets, scorers
from keel.text import printable
from rollouts import generated, prompts

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
"""Also half surrogate pairs, NUL and everything else that Python's text can hold."""
HOSTILE = [
    "\x1b]0;title\x07\x1b[31;1mred\x1b[2J",
    "\x9b31m and \x8d",
    "[bold red]markup[/bold red] [/] [link=http://x]",
    "<script>alert(1)</script>&amp;",
    "\u202egnp.exe\u202c \u2066x\u2069 \u200b\ufeff",
    "half \ud800 a pair \udfff",
    "NUL \x00 BEL \x07 BS \x08\x08 CR \rover DEL \x7f",
    "line\nend\u2028end\u2029end\x85end\x0b\x0c",
    "$\\frac{1}{$ $x^2$ \\$",
    ":smile: :no_such:",
    "%s %(x)s {} {0.__class__} ${HOME}",
    "x" * 10**6,
    "\x1b" * 10**6,
    "",
]
SLOW_MACHINE = settings(deadline=None)
SPARSE = [text for text in HOSTILE if len(text) < 1000]


def shows(text: str) -> bool:
    """A terminal shows every character of it: none is a control, a format, a surrogate or a line end."""
    return all(character.isprintable() for character in text)


@SLOW_MACHINE
@given(ANY_TEXT)
def test_any_text_becomes_one_line_that_is_shown(text: str) -> None:
    line = printable(text)
    assert shows(line) and printable(line) == line
    line.encode()
    assert line == text or not shows(text)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_text_becomes_one_line_that_is_shown(text: str) -> None:
    line = printable(text)
    assert shows(line) and len(line) < 10 * 2000 + 100
    assert printable(text, limit=len(text)).count("x") >= text.count("x")


def test_what_is_shown() -> None:
    assert printable("Grüße, 你好 👋") == "Grüße, 你好 👋"
    assert printable("a\u00a0b\tc\n\x1b[1m\u202e\ud800") == "a b\\tc\\n\\x1b[1m\\u202e\\ud800"
    assert printable("abcdefghij", limit=4) == "ab [... 6 characters ...] ij"
    assert printable("abcd", limit=4) == "abcd" and printable("abcde", limit=3) == "a [... 3 characters ...] e"


# ---- the terminal


def shown(*renderables: Any, terminal: bool = True) -> str:
    """What reaches the terminal, without the colors that rich itself puts there."""
    file = io.StringIO()
    console = Terminal(file=file, width=100_000, force_terminal=terminal, color_system=None)
    for each in renderables:
        console.print(each)
    console.rule(renderables[0] if isinstance(renderables[0], str) else "")
    return file.getvalue()


@pytest.mark.parametrize("text", SPARSE, ids=lambda text: ascii(text[:20]))
def test_the_terminal_shows_what_a_text_holds(text: str) -> None:
    table = Table(text, title=text)
    table.add_row(text)
    output = shown(f"file {text}", table)
    output.encode()
    assert all(shows(line) for line in output.split("\n"))
    for part in text.split("\n"):
        assert f"file {printable(text.split(chr(10))[0])}" in output and printable(part) in output


@pytest.mark.parametrize("tty", [True, False])
def test_a_note_and_a_status_show_what_a_text_holds(tty: bool) -> None:
    for text in SPARSE:
        file = io.StringIO()
        console = Terminal(file=file, width=100_000, force_terminal=tty, color_system=None)
        with progress_display(console, 3) as display:
            display.note(f"note {text}")
            display.doing(f"starting {text}")
        own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()) if tty else file.getvalue()  # of rich's live table
        assert f"note {printable(text)}" in own and f"starting {printable(text)}" in own
        assert all(shows(line) for line in own.replace("\r", "").split("\n"))


def test_answers_of_a_model_show_what_they_hold() -> None:
    for text in SPARSE[:-1]:
        hostile = schema.build(
            pa.schema(
                [schema.PROMPT.field("prompt"), schema.GENERATE.field("completion"), schema.SCORE.field("reward")]
            ),
            {"prompt": [text], "completion": [text], "reward": [1.0]},
        )
        answer = summary._answer(hostile, hostile, 0, 0, 10)
        assert all(shows(line) for line in answer.plain.split("\n")) and answer.plain.count("\n") == 4


def test_an_error_line_shows_what_it_quotes() -> None:
    for text in HOSTILE:
        line = str(ConfigError(f"policy.model={text}: no such folder"))
        assert shows(line) and line.startswith("policy.model=") and line.endswith(": no such folder")
        assert len(line) < 20_200


def test_a_command_line_with_escapes_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {"policy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": [{"name": "a", "source": "a:b"}]}
        )
    )
    for text in SPARSE:
        for arguments in (
            ["train", text],
            ["train", str(path), f"run.name={text}"],
            ["train", str(path), text],
            [text],
        ):
            monkeypatch.setattr(sys, "argv", ["keel", *arguments])
            with pytest.raises(SystemExit, match=r"\A\d*\Z") as stop:
                main.main()
            output = capfd.readouterr()
            assert stop.value.code == 2 and output.out == ""
            assert output.err.startswith("keel: ") and shows(output.err[:-1]), arguments


# ---- files


@SLOW_MACHINE
@given(st.lists(ANY_TEXT, min_size=1, max_size=5))
@example(HOSTILE)
def test_any_text_survives_an_arrow_file(texts: list[str]) -> None:
    own = schema.build(pa.schema([pa.field("text", pa.string())]), {"text": texts})
    own.validate(full=True)
    again = schema.from_bytes(schema.to_bytes(own))
    again.validate(full=True)
    assert again.column("text").to_pylist() == [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]


def test_nulls_beside_half_a_pair_stay_nulls() -> None:
    own = schema.build(pa.schema([pa.field("text", pa.string())]), {"text": [None, "\ud800", "a"]})
    assert own.column("text").to_pylist() == [None, "\ufffd", "a"]


def rows_of(path: Path) -> list[datasets.SourceRow] | None:
    """Rows, or None where they are refused with one line."""
    try:
        return datasets.read_rows(PromptSettings(source=str(path)))
    except ConfigError as error:
        assert shows(str(error)) and str(error).startswith("prompts.")
        return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
WITHIN_A_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@WITHIN_A_FOLDER
@given(prompt=ANY_TEXT | JSON, further=JSON, ascii_only=st.booleans())
def test_any_json_row_loads_or_is_one_line(tmp_path: Path, prompt: Any, further: Any, ascii_only: bool) -> None:
    row = {"prompt": prompt, "answer": further}
    text = json.dumps(row, ensure_ascii=ascii_only)
    (tmp_path / "p.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    rows = rows_of(tmp_path / "p.jsonl")
    if rows is not None:
        assert rows[0].prompt == prompt or isinstance(prompt, list)
        rows[0].further.encode()
        pa.array([rows[0].text, rows[0].further], pa.string())


@WITHIN_A_FOLDER
@given(st.binary(max_size=80))
def test_any_bytes_load_or_are_one_line(tmp_path: Path, content: bytes) -> None:
    for name in ("p.jsonl", "p.json", "p.parquet"):
        (tmp_path / name).write_bytes(content)
        rows_of(tmp_path / name)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_prompts_load_or_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text, text[:50] or "x": text}) + "\n")
    rows = rows_of(tmp_path / "p.jsonl")
    assert (rows is None) == ("\ud800" in text or not text.strip())
    if rows is not None:
        assert rows[0].prompt == text
        pq.write_table(pa.table({"prompt": [text], "more": [text]}), tmp_path / "p.parquet")
        assert datasets.read_rows(PromptSettings(source=str(tmp_path / "p.parquet")))[0].prompt == text


@pytest.mark.parametrize(
    "content",
    [b'{"prompt": "x", "a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", b'{"prompt": "\xff"}',
     b'{"prompt": "\xed\xa0\x80"}'],
)  # fmt: skip
def test_rows_that_cannot_be_read_are_one_line(tmp_path: Path, content: bytes) -> None:
    for name in ("p.jsonl", "p.json"):
        (tmp_path / name).write_bytes(b"[" + content + b"]" if name == "p.json" else content)
        assert rows_of(tmp_path / name) is None


def test_a_parquet_file_with_bytes_that_are_no_text_is_one_line(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "p.parquet")
    assert rows_of(tmp_path / "p.parquet") is None


# ---- settings


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.dates() | st.binary(max_size=4)
KEYS = (
    st.sampled_from([*Settings.model_fields, "kind", "name", "source", "headers", "model", "options", "steps"])
    | ANY_TEXT
    | st.integers()
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
VALID = {"policy": {"model": "m"}, "prompts": {"source": "p"}, "rewards": [{"name": "a", "source": "a:b"}]}


def loads(path: Path, *overrides: str) -> None:
    """Settings that can be written and read again, or one line."""
    try:
        own = loader.load(path, overrides)
    except ConfigError as error:
        assert shows(str(error)) and len(str(error)) < 20_200
        return
    path.with_name("again.yaml").write_text(loader.dump(own), encoding="utf8")
    assert loader.load(path.with_name("again.yaml")) == own


@WITHIN_A_FOLDER
@given(tree=TREES, block=st.sampled_from(["", *Settings.model_fields]))
def test_any_yaml_tree_is_settings_or_one_line(tmp_path: Path, tree: Any, block: str) -> None:
    whole = {**VALID, block: tree} if block else tree
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(whole), encoding="utf8")
    loads(tmp_path / "c.yaml")


@WITHIN_A_FOLDER
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("[]{}:,-&*!|>'\"%@`#?\n ax1", max_size=30)
)
@example("a: 2020-13-45")
@example("[" * 5000)
@example("a: " + "9" * 5000)
@example("a: &x [*x]")
@example("policy: &x {model: *x}")
@example("? {a: b}\n: 3")
@example("\x00")
def test_any_text_is_settings_or_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf8")
    loads(tmp_path / "c.yaml")


@WITHIN_A_FOLDER
@given(
    path=st.lists(KEYS.map(str) | st.sampled_from(["a", "0", "headers", "X"]), min_size=1, max_size=4).map(".".join),
    value=ANY_TEXT
    | TREES.map(lambda tree: json.dumps(tree, default=str))
    | st.text("[]{}:,-&*!|>'\"%@`#?", max_size=8),
    separator=st.sampled_from(["=", "=", "=", ""]),
)
@example("prompts.options.x", "2020-13-45", "=")
@example("prompts.options.x", "&x [*x]", "=")
@example("prompts.options.x", "!!binary /w==", "=")
@example("prompts.options.x", "!!set {a, b}", "=")
@example("prompts.options.x", ".nan", "=")
@example("prompts.options.x", '"\\ud800"', "=")
@example("prompts.options", "{1: 2}", "=")
def test_any_override_is_settings_or_one_line(tmp_path: Path, path: str, value: str, separator: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(VALID))
    loads(tmp_path / "c.yaml", f"{path}{separator}{value}")


# ---- rewards


class Given:
    """A reward function that returns what a test says."""

    values: Any = None
    error: BaseException | None = None


def given_values(completions: list[str], **columns: Any) -> Any:
    if Given.error is not None:
        raise Given.error
    return Given.values


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | ANY_TEXT
    | st.just(10**400)
    | st.just([1])
    | st.just(np.float64("nan"))
)


@SLOW_MACHINE
@given(
    values=VALUES
    | st.lists(VALUES, min_size=2, max_size=2)
    | st.lists(VALUES, max_size=3)
    | st.dictionaries(st.integers(), VALUES, max_size=2)
)
def test_whatever_a_reward_function_returns_is_a_number_or_a_counted_failure(values: Any) -> None:
    Given.values, Given.error = values, None
    scorer = scorers.RewardScorer(
        [RewardSettings(name="r", source=f"{__name__}:given_values")], EnsembleSettings(), ScorerSettings(), "s"
    )
    try:
        answer, receipt = scorer.score(generated(prompts([0])))
    except ValueError as error:  # nobody can say which value is whose
        assert re.search(r"\d values for 2 completions", str(error)) and len(values) != 2
        return
    schema.check(answer)
    found, reasons = answer.column("reward").to_pylist(), answer.column("failure").to_pylist()
    assert all((value is None) == (reason is not None) for value, reason in zip(found, reasons, strict=True))
    assert all(value is None or math.isfinite(value) for value in found)
    assert sum(receipt.failures.values()) == answer.column("reward").null_count


@pytest.mark.parametrize("name", ["x" * 10**6, "a b", "[bold]", "\x1b[1m", "\u202e", "Größe", 'a"b\n'])
def test_a_failure_is_a_short_plain_word(name: str) -> None:
    Given.error = type(name, (Exception,), {})("\x1b[2J" * 1000)
    scorer = scorers.RewardScorer(
        [RewardSettings(name="r", source=f"{__name__}:given_values")], EnsembleSettings(), ScorerSettings(), "s"
    )
    _, receipt = scorer.score(generated(prompts([0])))
    assert dict(receipt.failures) == {"r_Exception": 2}


# ---- pictures and model cards


FRONTIER = [{"step": step, "kl_nats": 0.1 * step, "stderr": 0.1, "proxy": step, "gold": 1.0} for step in (0, 1)]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_names_of_runs_are_drawn_as_they_are(tmp_path: Path, suffix: str) -> None:
    names = [text or "_hidden" for text in HOSTILE]
    frontier_plot.draw(dict.fromkeys(names, FRONTIER), tmp_path / f"all{suffix}")
    content = (tmp_path / f"all{suffix}").read_bytes()
    if suffix == ".svg":
        assert b"<script" not in content and b"alert" in content  # the comment beside the drawn text is escaped
        import xml.etree.ElementTree as tree

        tree.fromstring(content)


@pytest.mark.parametrize("text", [text for text in SPARSE if "\ud800" not in text], ids=lambda text: ascii(text[:20]))
def test_a_model_card_holds_one_name(text: str) -> None:
    own = loader.parse({**VALID, "policy": {"model": f"{text}\n---\n# Another\n"}})
    card = export._card(own, 3, {})
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == printable(own.policy.model)
    assert [line for line in body.split("\n") if line.startswith("#")] == ["# run, step 3"]


def test_rich_text_of_our_own_is_left_alone() -> None:
    assert "ok" in shown(Text("ok", style="green"))
