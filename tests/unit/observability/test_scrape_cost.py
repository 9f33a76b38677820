"""A scrape of the page of 64 busy actors is cheap. Numbers of a quiet machine: docs/develop/log.md."""

import sys
from pathlib import Path

import pytest

P99_MILLISECONDS = 50


def test_a_scrape_beside_64_actors_takes_less_than_50_milliseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best of six, of every scrape and of all: other work on the machine makes one slower, nothing makes it faster."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    sys.modules.pop("scrape_cost", None)
    import scrape_cost

    costs = []
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        costs.append(scrape_cost.measure(folder, actors=64, scrapes=100, tries=3))
        assert costs[-1].series > 64 * 9 and costs[-1].calls > 0
        if costs[-1].quantile(0.99) < P99_MILLISECONDS:
            return
    pytest.fail("\n".join(map(str, costs)))
