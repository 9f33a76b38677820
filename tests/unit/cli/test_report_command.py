"""`keel report`: where the page goes, what is refused; and a page that cannot be written is an event, no failed run."""

import json
import re
import signal
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

import report_runs
from keel.analysis import report_page
from keel.cli import main, summary

pytestmark = pytest.mark.usefixtures("restored_process")  # the command line has its process for itself


def keel(monkeypatch: pytest.MonkeyPatch, code: int, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["keel", *map(str, arguments)])
    with pytest.raises(SystemExit, match=f"^{code}$"):
        main.main()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return report_runs.online(tmp_path / "run", steps=2)


def test_one_run_has_its_report_in_its_directory_and_several_here(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = report_runs.online(tmp_path / "other", steps=2)
    monkeypatch.chdir(tmp_path)
    keel(monkeypatch, 0, "report", run)
    assert '"name":"run"' in (run / "report.html").read_text() and not (tmp_path / "report.html").exists()
    keel(monkeypatch, 0, "report", run, other)
    assert '"name":"other"' in (tmp_path / "report.html").read_text()
    keel(monkeypatch, 0, "report", run, "--output", tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").is_file()


def test_a_live_report_ends_well_by_ctrl_c(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ThreadingHTTPServer, "service_actions", lambda server: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without one
    try:
        keel(monkeypatch, 0, "report", run, "--live")
    finally:
        signal.signal(signal.SIGINT, before)
    printed = "".join(capsys.readouterr())
    assert "Report   http://127.0.0.1:" in printed and "interrupted" not in printed and "resume" not in printed


def test_bad_input_ends_with_2_and_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keel(monkeypatch, 2, "report", tmp_path / "nowhere")
    assert "nowhere: no config.yaml in it; expected the directory of a run" in "".join(capsys.readouterr()).replace(
        "\n", ""
    )
    keel(monkeypatch, 2, "report", run, "--output", tmp_path)
    assert "is a folder; expected a file" in "".join(capsys.readouterr())


def test_the_end_of_a_run_writes_the_page_or_says_why_not(run: Path) -> None:
    assert summary.write_report(run).endswith("(curves, frontier, rollouts; open it in a browser)")
    events = (run / "events.jsonl").read_text()
    assert (run / "report.html").is_file() and "report_failed" not in events
    (run / "report.html").unlink()
    (run / "rollouts" / "step-000001.arrow").write_bytes(b"damaged")
    assert summary.write_report(run).startswith("not written: ConfigError: RUN_DIR=")
    event = json.loads((run / "events.jsonl").read_text().removeprefix(events))
    assert event["event"] == "report_failed" and "expected the files of a run" in event["reason"]
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("error", [AssertionError("odd"), Exception("odd"), RecursionError("odd"), MemoryError("odd")])
def test_no_fault_of_the_page_fails_the_run(error: Exception, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "html", raising(error))
    assert summary.write_report(run) == f"not written: {type(error).__name__}: odd"
    event = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["reason"]) == ("report_failed", f"{type(error).__name__}: odd")


def test_an_event_that_cannot_be_written_either_is_told(run: Path) -> None:
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    line = summary.write_report(run)
    assert re.fullmatch(r"not written: ConfigError: RUN_DIR=.*; nor was the event report_failed: ReadFailed: .*", line)


def raising(error: Exception) -> Callable[[object], str]:
    def html(collected: object) -> str:
        raise error

    return html
