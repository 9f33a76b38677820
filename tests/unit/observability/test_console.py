"""What a step shows, by command."""

import io

import pytest
from rich.console import Console

from keel.observability.console import (
    ONLINE_COLUMNS,
    PREFERENCE_COLUMNS,
    REWARD_MODEL_COLUMNS,
    SUPERVISED_COLUMNS,
    Columns,
    LiveProgress,
    progress_display,
)
from keel.observability.metric_table import TABLE

NAMES = {metric.name for metric in TABLE}


class Asked(dict[str, float]):
    """A step's metrics that have every name, and remember which were read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> float:
        self.names.add(name)
        return 1.0


@pytest.mark.parametrize("columns", [ONLINE_COLUMNS, SUPERVISED_COLUMNS, PREFERENCE_COLUMNS, REWARD_MODEL_COLUMNS])
def test_columns_read_metrics_of_the_table(columns: Columns) -> None:
    line = Asked()
    for cell in columns.values():
        assert cell(line)
    assert line.names <= NAMES | {"step"}  # largest_share is asked for with get


def lines_of(columns: Columns, *steps: dict[str, float]) -> list[str]:
    file = io.StringIO()
    with progress_display(Console(file=file, width=200), 7, columns) as display:
        for step in steps:
            display.step(step)
    return file.getvalue().splitlines()


def test_a_supervised_step_is_a_line() -> None:
    step = {
        "step": 3,
        "loss": 1.23456,
        "length_tokens": 12.0,
        "grad_norm": 0.5,
        "learning_rate": 2e-5,
        "step_seconds": 1.26,
    }
    (line,) = lines_of(SUPERVISED_COLUMNS, step)
    assert line == "step 3/7  loss 1.2346  length 12.0  grad 0.50  rate 2.0e-05  train s 1.3  (0 s)"


def test_a_preference_step_shows_the_log_ratios_and_a_dash_for_what_it_has_not() -> None:
    step = {
        "step": 1,
        "preference_loss": 0.69,
        "preference_accuracy_ratio": 0.5,
        "implicit_margin": -0.01,
        "chosen_log_ratio_nats": 0.5,
    }
    (line,) = lines_of(PREFERENCE_COLUMNS, step)
    assert line.startswith("step 1/7  loss 0.6900  accuracy 0.50  margin -0.010  chosen +0.50  rejected -  length -")


def test_a_live_table_has_the_last_steps() -> None:
    file = io.StringIO()
    console = Console(file=file, width=160, force_terminal=True)
    with progress_display(console, 20, REWARD_MODEL_COLUMNS) as display:
        assert isinstance(display, LiveProgress)
        display.doing("member 0")
        for step in range(1, 16):
            display.step({"step": step, "loss": float(step)})
    shown = file.getvalue()
    assert "15.0000" in shown and "3.0000" not in shown.replace("13.0000", "") and "step 15/20" in shown
