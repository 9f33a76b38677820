"""The short chaos run of CI: nine faults of different kinds, and the run that went through them is the run without."""

import statistics
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

import chaos

KINDS = [
    "generator killed",
    "scorer killed",
    "http 500",
    "learner rank killed",
    "worker paused",
    "accepted batch damaged",  # kills the driver, too
    "generator stopped",
    "buffer killed",
    "checkpoint damaged",  # likewise
]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_a_run_survives_nine_faults_unchanged(tmp_path: Path) -> None:
    account = chaos.run(tmp_path, seed=0, kinds=KINDS, staleness=0, steps=100, console=Console())
    assert [record.kind for record in account.records] == KINDS
    assert (account.lost, account.trained_twice) == (0, 0)
    assert account.findings == []
    assert account.differences == []  # weights, rollouts, metrics: bit for bit
    assert statistics.median(record.seconds for record in account.records) < 120
