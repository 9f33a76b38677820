"""The page of a report in a real Chromium: everything is drawn, sorting and keys work, hostile text stays text."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report_runs
from browser import Tab, tab
from commands import wait_for
from keel import files
from keel.analysis import report_live, report_page

pytestmark = [pytest.mark.integration, pytest.mark.slow]

OPEN_SECONDS = 2.0
HEADS = "[...document.querySelectorAll('#browser th button')]"
FOCUSED_ROW = "[...document.querySelectorAll('#browser tbody tr')].indexOf(document.activeElement)"
ENTER, DOWN, UP, END, TAB = ("Enter", 13, "\r"), ("ArrowDown", 40), ("ArrowUp", 38), ("End", 35), ("Tab", 9)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: two seeds of an arm, one of them with hostile text, and another arm."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [
        report_runs.online(folder / "one", seed=1),
        report_runs.online(folder / "two", seed=2, hostile=True),
        report_runs.online(folder / "warm", seed=1, sampling={"temperature": 1.5}),
    ]
    report_page.write(runs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(chromium: Tab, page: Path) -> Tab:
    chromium.problems.clear()
    chromium.requests.clear()
    chromium.show_as(1280, 900)
    chromium.open(page)
    return chromium


def embedded(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'id="numbers">(.*?)</script>', page.read_text(encoding="utf8"), re.DOTALL)
    return json.loads(text)


def column(browser: Tab, name: str) -> list[str]:
    place = browser.run(f"{HEADS}.findIndex(head => head.textContent.startsWith({json.dumps(name)}))")
    return browser.run(
        f"[...document.querySelectorAll('#browser tbody tr')].map(row => row.children[{place}].textContent)"
    )


def test_every_chart_is_drawn_without_a_complaint_or_a_request(opened: Tab, page: Path) -> None:
    names = [chart["name"] for chart in embedded(page)["charts"]]
    drawn = opened.run("[...document.querySelectorAll('#curves figure svg')].map(svg => Number(svg.dataset.drawn))")
    assert len(drawn) == len(names) and min(drawn) >= 2  # two arms
    assert opened.run("document.querySelectorAll('#frontier figure svg').length") == 2  # proxy and gold
    assert opened.run("[...document.querySelectorAll('svg')].every(svg => svg.querySelector('path, polygon'))")
    assert opened.run("[...document.querySelectorAll('svg *')].every(node => !node.outerHTML.includes('NaN'))")
    assert (
        opened.run("document.querySelectorAll('#curves figure:first-child polygon').length") == 2
    )  # bands of two seeds
    assert opened.problems == [] and opened.requests == [page.as_uri()]


def test_the_frontier_and_arms_can_be_switched(opened: Tab) -> None:
    axis = "document.querySelector('#frontier svg').textContent"
    opened.run("document.querySelector('#root').click()")
    assert "square root of the KL" in opened.run(axis)
    opened.run("document.querySelector('#arms input').click()")
    drawn = opened.run("[...document.querySelectorAll('#curves figure svg')].map(svg => Number(svg.dataset.drawn))")
    assert (
        set(drawn) <= {1, 2} and opened.run("document.querySelectorAll('polygon').length") == 0
    )  # the band was hidden
    assert opened.problems == []


@pytest.mark.parametrize("name, key", [("reward", lambda row: row["rewards"]["reward"]), ("proxy - gold", lambda row: row["gap"]), ("KL", lambda row: row["kl_nats"])])  # fmt: skip
def test_rows_are_sorted_by_key_and_by_click(opened: Tab, page: Path, name: str, key: Any) -> None:
    rows = [row for run in embedded(page)["runs"] for row in run["rows"]["rows"]]
    values = sorted((key(row) for row in rows), reverse=True)
    opened.run(f"{HEADS}.find(head => head.textContent.startsWith({json.dumps(name)})).focus()")
    opened.press(*ENTER)
    assert [float(cell) for cell in column(opened, name)] == pytest.approx(values[:25], rel=1e-3, abs=1e-3)
    assert opened.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"
    opened.run("document.activeElement.click()")
    assert [float(cell) for cell in column(opened, name)] == pytest.approx(values[::-1][:25], rel=1e-3, abs=1e-3)
    assert opened.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"


def test_arrows_move_in_the_list_and_enter_opens_a_row(opened: Tab) -> None:
    opened.run("document.querySelector('#browser tbody tr').focus()")
    for keys, place in ((DOWN, 1), (DOWN, 2), (UP, 1), (UP, 0), (UP, 0)):
        opened.press(*keys)
        assert opened.run(FOCUSED_ROW) == place
    opened.press(*DOWN)
    opened.press(*ENTER)
    prompt = column(opened, "prompt")[1]
    assert opened.run("document.querySelector('.detail .answer').textContent") == prompt
    assert opened.run("document.querySelectorAll('.detail .token').length") == int(column(opened, "tokens")[1])
    assert opened.run("document.querySelectorAll('.along button').length") == 5  # the prompt at every evaluation
    opened.run("document.querySelectorAll('.along button')[4].click()")
    assert "step 20" in opened.run("document.querySelector('.detail .note').textContent")
    opened.run("document.querySelector('#browser tbody tr').focus()")
    opened.press(*END)
    total = int(opened.run("document.querySelector('.controls .note').textContent").split()[-1])
    assert opened.run(FOCUSED_ROW) == (total - 1) % 25


def test_everything_is_reached_by_tab_and_a_chart_by_arrows(opened: Tab) -> None:
    opened.run("document.querySelector('#frontier svg').focus()")
    opened.press("ArrowRight", 39)
    assert "KL to the reference (nats)" in opened.run("document.querySelector('#frontier .tip').textContent")
    opened.press(*TAB)
    assert opened.run(
        "document.activeElement.closest('#frontier') !== null && document.querySelector('#frontier .tip').hidden"
    )
    seen = set()
    opened.run("document.body.focus(); document.querySelector('nav a').focus()")
    for _ in range(80):
        seen.add(opened.run("(document.activeElement.closest('section') || document.activeElement).id"))
        opened.press(*TAB)
    assert {"frontier", "curves", "rollouts", "settings"} <= seen


def test_the_cursor_names_values_and_the_first_events_of_a_step(opened: Tab, page: Path) -> None:
    opened.run("document.querySelectorAll('#curves svg')[1].focus()")  # gold
    opened.press("Home", 36)
    tip = "[...document.querySelectorAll('#curves .tip')[1].children].map(line => line.textContent)"
    arms = embedded(page)["arms"]
    curves = [arm["evaluated"]["reward_gold"] for arm in arms]
    values = [tuple(f"{curve[key][0]:.4g}" for key in ("mean", "low", "high")) for curve in curves]
    expected = [
        f"{arm['name']}, evaluation: {mean} [{low}, {high}]"
        for arm, (mean, low, high) in zip(arms, values, strict=True)
    ]
    assert opened.run(tip) == ["step 0", *expected]
    for _ in range(6):
        opened.press("ArrowRight", 39)
    lines = opened.run(tip)
    assert lines[0] == "step 6" and sum(line.startswith("failure or recovery: ") for line in lines) == 3
    assert lines[-1] == "3 more in the list of events"  # three runs lost a worker and tried again


def test_search_and_hostile_text(opened: Tab) -> None:
    opened.run(
        "let box = document.querySelector('input[type=search]'); box.value = '</SCRIPT>'; box.dispatchEvent(new Event('input'))"
    )
    assert set(column(opened, "run")) == {"two"}
    shown = column(opened, "prompt")[0]
    assert shown.startswith("</script><script>alert(1)</script><!--") and "\\u202eevil\\u2028line" in shown
    opened.run("document.querySelector('#browser tbody tr').click()")
    assert "\\u0000\\u001b[31m" in opened.run("document.querySelector('.detail .answer').textContent")
    assert opened.run("document.querySelectorAll('script').length") == 4 and opened.problems == []


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "dark")])
def test_it_fits_and_can_be_read(opened: Tab, page: Path, width: int, scheme: str) -> None:
    """No page-wide scrolling; body text contrasts with the page by 7 to 1, notes by 4.5 to 1 (WCAG)."""
    opened.show_as(width, 900, scheme)
    opened.open(page)
    assert opened.run("document.documentElement.scrollWidth") <= width
    luminance = """(text => { const [r, g, b] = text.match(/\\d+/g).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b; })"""
    paper = opened.run(f"{luminance}(getComputedStyle(document.body).backgroundColor)")
    assert (paper > 0.5) is (scheme == "light")
    for selector, contrast in (("#words li", 7), (".note", 4.5), ("nav a", 4.5)):
        ink = opened.run(f"{luminance}(getComputedStyle(document.querySelector('{selector}')).color)")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= contrast, selector


def test_a_live_page_shows_new_numbers_unless_a_row_is_read(
    chromium: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_live, "_LOOK_SECONDS", 0.2)
    run = report_runs.online(tmp_path / "run", steps=3)
    last = "document.readyState === 'complete' ? report.runs[0].training.loss.steps.at(-1) : 0"  # 0 while it reloads
    chromium.problems.clear()
    with report_live.serving([run], 0) as (address, server):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        chromium.open(address)
        assert chromium.run(last) == 3
        files.append_json(run / "metrics.jsonl", report_runs.line(4, 4.0, 7))
        wait_for(lambda: chromium.run(last) == 4, 30, "step 4")
        chromium.run("document.querySelector('#browser tbody tr').click()")
        files.append_json(run / "metrics.jsonl", report_runs.line(5, 4.0, 7))
        wait_for(lambda: not chromium.run("document.querySelector('#newer').hidden"), 30, "the button")
        assert chromium.run(last) == 4
        chromium.run("document.querySelector('#newer button').click()")
        wait_for(lambda: chromium.run(last) == 5, 30, "step 5")
        chromium.open("about:blank")
        server.shutdown()
        thread.join()
    assert chromium.problems == []


def test_two_hundred_steps_of_64_rollouts_open_in_two_seconds(chromium: Tab, tmp_path: Path) -> None:
    run = report_runs.online(tmp_path / "long", steps=200, rows=64, every=20, tokens=48, prompts_held_out=64)
    report_page.write([run], tmp_path / "report.html")
    chromium.problems.clear()
    seconds = min(chromium.open(tmp_path / "report.html") for _ in range(3))  # of a machine that does other things
    assert seconds < OPEN_SECONDS and chromium.problems == []
    assert chromium.run("document.querySelectorAll('#browser tbody tr').length") == 25
