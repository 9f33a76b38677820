"""What is shown at the end of a run: which two answers."""

import pytest

import rollouts
from keel.cli import summary

NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ([], []),
        ([0.5], [0]),
        ([0.5, -0.5], [1, 0]),
        ([0.3, 0.1, 0.2], [2, 0]),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], [4, 6]),
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [5, 3]),
        ([NAN, 0.1, NAN, NAN, NAN, NAN], [1]),
        ([NAN, NAN], []),
    ],
)
def test_the_answers_that_are_shown_are_beside_the_median(changes: list[float], shown: list[int]) -> None:
    """NaN: one of the two answers has no reward. Ranks 4 and 6 of ten, not the median and the 75th percentile."""
    rows = rollouts.referenced(rollouts.generated(rollouts.prompts(range(len(changes)), samples=1)))
    first = rollouts.scored(rows, [0.0] * len(changes))
    last = rollouts.scored(rows, [None if change != change else change for change in changes])
    assert summary._telling_rows(first, last) == shown
