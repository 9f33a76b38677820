"""What the recorder makes of what it is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fakes import settings_for
from keel.metrics import RunMetrics
from keel.preflight import Prepared
from keel.recorder import Recorder


class Quiet:
    """A display that shows nothing, and keeps the lines of steps."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def note(self, text: str) -> None: ...

    def doing(self, what: str) -> None: ...

    def step(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


def test_a_step_says_how_far_the_run_goes_and_where_its_seconds_went(tmp_path: Path) -> None:
    prepared = SimpleNamespace(settings=settings_for(steps=7, staleness=2), directory=tmp_path)
    display = Quiet()
    recorder = Recorder(cast(Prepared, prepared), RunMetrics("test", tmp_path / "metrics.jsonl"), display)
    recorder.doing("weight sync")
    recorder.occupied("scorer", running=1, waiting=3, serving=2)
    recorder.step(1)
    (line,) = display.lines
    assert (line["max_staleness_versions"], line["steps_wanted"]) == (2.0, 7.0)
    assert line["batches_waiting"] == {"scorer": 3.0}
    assert set(line["phase_seconds_total"]) == {"start", "weight_sync"}
    busy, queue = line["busy_seconds_total"]["scorer"], line["queue_seconds_total"]["scorer"]
    assert busy > 0 and abs(queue - 3 * busy) < 1e-9
    assert line["idle_seconds_total"] == {"scorer/weight_sync": busy}
