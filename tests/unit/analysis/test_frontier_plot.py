"""The picture of the frontier: what is drawn is what the rows say, and the file is an image."""

import io
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keel.analysis import frontier_plot
from keel.errors import ConfigError
from keel.observability import evaluations
from rollouts import generated, prompts, referenced, scored

ROWS: list[dict[str, Any]] = [
    {"step": 0.0, "kl_nats": -0.02, "proxy": 0.1, "gold": 0.2, "stderr": 0.05, "reward_gold": 0.2},
    {"step": 5.0, "kl_nats": 4.0, "proxy": 0.6, "gold": None, "stderr": None, "reward_gold": None},
    {"step": 7.0, "kl_nats": None, "proxy": 0.7, "gold": 0.3, "stderr": 0.04, "reward_gold": 0.3},
    {
        "step": 9.0,
        "kl_nats": 6.25,
        "proxy": 0.9,
        "gold": 0.1,
        "stderr": 0.03,
        "gold_stderr": 0.02,
        "reward_gold": 0.1,
        "n": 32.0,
    },
]
NAN = math.nan


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Axes of every figure that is saved."""
    from matplotlib.figure import Figure

    axes: list[Any] = []
    save = Figure.savefig

    def keep(figure: Any, *arguments: Any, **options: Any) -> None:
        axes.extend(figure.axes)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return axes


def test_curves_are_rows_with_a_kl_at_its_root() -> None:
    result = frontier_plot.curves(ROWS)
    assert result.steps == pytest.approx([0, 5, 9])
    assert result.root_kl == pytest.approx([0, 2, 2.5])
    assert result.proxy == pytest.approx([0.1, 0.6, 0.9])
    assert result.gold == pytest.approx([0.2, NAN, 0.1], nan_ok=True)
    assert result.stderr == pytest.approx([0.05, NAN, 0.03], nan_ok=True)


def test_another_column_has_no_standard_error() -> None:
    result = frontier_plot.curves(ROWS, proxy="reward_gold", gold=None)
    assert result.proxy == pytest.approx([0.2, NAN, 0.1], nan_ok=True)
    assert np.isnan(result.stderr).all() and np.isnan(result.gold).all()
    assert len(frontier_plot.curves([]).steps) == 0


def test_curves_of_a_stored_frontier(tmp_path: Path) -> None:
    """Through real files: kl is 0.5 and 2 nats on every completion."""
    for step, kl in ((0, 0.5), (3, 2.0)):
        rows = generated(prompts(range(4), samples=1), logprobs=[[-0.5, -0.5]] * 4)
        rows = referenced(rows, [[-0.5 - kl, -0.5]] * 4)
        evaluations.store(tmp_path, step, scored(rows, [1.0, 2.0, 3.0, 6.0], {"gold": [1.0, 1.0, 2.0, None]}))
    result = frontier_plot.curves(evaluations.frontier(tmp_path))
    assert result.root_kl == pytest.approx([math.sqrt(0.5), math.sqrt(2)], abs=1e-6)
    assert result.proxy == pytest.approx([3, 3]) and result.gold == pytest.approx([4 / 3, 4 / 3])
    assert result.stderr == pytest.approx([np.std([1, 2, 3, 6], ddof=1) / 2] * 2)
    assert result.gold_stderr == pytest.approx([np.std([1, 1, 2], ddof=1) / math.sqrt(3)] * 2)


def test_lines_are_the_curves(tmp_path: Path, drawn: list[Any]) -> None:
    frontier_plot.draw({"one": ROWS, "_two": ROWS[:2]}, tmp_path / "a.png")
    (axis,) = drawn
    lines = {(item.get_color(), item.get_linestyle()): item for item in axis.lines if item.get_linestyle() != "None"}
    assert set(lines) == {("C0", "-"), ("C0", "--"), ("C1", "-"), ("C1", "--")}
    proxy, gold = lines["C0", "-"], lines["C0", "--"]
    assert proxy.get_xdata() == pytest.approx([0, 2, 2.5]) and proxy.get_ydata() == pytest.approx([0.1, 0.6, 0.9])
    assert gold.get_ydata() == pytest.approx([0.2, NAN, 0.1], nan_ok=True)
    segments, of_gold, *_ = (item.get_segments() for item in axis.collections)  # the error bars of the first run
    assert [segment[:, 1] for segment in of_gold if len(segment)][-1] == pytest.approx([0.08, 0.12])
    assert axis.get_title().endswith("reference, 32 held-out prompts")
    assert [segment[:, 1] for segment in segments] == [
        pytest.approx(ends) for ends in ([0.05, 0.15], [0.6, 0.6], [0.87, 0.93])
    ]
    assert [item.get_text() for item in axis.texts] == ["step 0", "step 9", "step 0", "step 5"]
    legend = [item.get_text() for item in axis.get_legend().get_texts()]
    assert sorted(legend) == ["gold: _two", "gold: one", "proxy: _two", "proxy: one"]
    assert "nats" in axis.get_xlabel() and "reward" in axis.get_ylabel() and axis.get_title()


def test_a_run_without_gold_or_without_kl(tmp_path: Path, drawn: list[Any]) -> None:
    no_gold = [row | {"gold": None} for row in ROWS]
    no_kl = [row | {"kl_nats": NAN} for row in ROWS]
    frontier_plot.draw({"bare": no_kl, "one": no_gold}, tmp_path / "a.png")
    assert [item.get_text() for item in drawn[0].get_legend().get_texts()] == ["proxy: one"]


def test_png_and_svg_parse(tmp_path: Path) -> None:
    for name in ("deep/a.png", "a.svg", "b.svg"):
        frontier_plot.draw({"one": ROWS, "costs $2 or $3": ROWS[:1]}, tmp_path / name)
    with Image.open(io.BytesIO((tmp_path / "deep/a.png").read_bytes())) as image:
        image.load()
        assert image.format == "PNG" and 600 < image.width < 3000 and 400 < image.height < 3000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10  # something is on it
    root = ElementTree.fromstring((tmp_path / "a.svg").read_bytes())
    assert root.tag.endswith("svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_refusals_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    no_kl = [row | {"kl_nats": None} for row in ROWS]
    for runs, name, says in (
        ({"one": no_kl, "two": []}, "a.png", "no evaluation of one, two has a KL"),
        ({}, "a.png", "has a KL"),
        ({"one": ROWS}, "a.jpg", "expected a name that ends in .png or .svg"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            frontier_plot.draw(runs, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib is not installed"):
        frontier_plot.draw({"one": ROWS}, tmp_path / "a.png")


def test_an_arm_of_several_seeds_is_their_mean_with_the_error_over_seeds() -> None:
    """At the steps that all seeds evaluated; a column one of them has no value of is unknown."""
    one = [{"step": 0.0, "kl_nats": 0.0, "proxy": 1.0, "stderr": 9.0, "gold": None}]
    one += [{"step": step, "kl_nats": 2.0, "proxy": 3.0, "stderr": 9.0, "gold": 1.0} for step in (2.0, 4.0)]
    two = [{"step": step, "kl_nats": 4.0, "proxy": 6.0, "stderr": 9.0, "gold": 2.0} for step in (0.0, 4.0)]
    assert frontier_plot.mean_over_seeds([one]) == one
    assert frontier_plot.mean_over_seeds([one, two]) == [
        {"step": 0.0, "kl_nats": 2.0, "proxy": 3.5, "stderr": pytest.approx(2.5), "gold": None, "gold_stderr": None},
        {
            "step": 4.0,
            "kl_nats": 3.0,
            "proxy": 4.5,
            "stderr": pytest.approx(1.5),
            "gold": 1.5,
            "gold_stderr": pytest.approx(0.5),
        },
    ]
