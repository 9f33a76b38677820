"""A run killed before any single write to disk is in order, resumes, and ends as the run that was never killed."""

import contextlib
import tempfile
from pathlib import Path

import pytest

from keel.analysis import verify
from runs import Killed, Writer, killed_before, settings

SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # fsync is slow on some disks


def writer(folder: str, name: str, staleness: int, checkpoints: int = 2) -> Writer:
    config = settings(staleness, checkpoint={"every_steps": checkpoints, "keep": 1})
    return Writer(Path(folder) / name, config, failing=frozenset({1, 6}), lost=frozenset({3}))


@pytest.mark.parametrize(("staleness", "checkpoints", "stride"), [(0, 2, 3), (1, 2, 7), (2, 2, 11), (0, 0, 11)])
def test_every_state_a_kill_leaves_is_in_order(staleness: int, checkpoints: int, stride: int) -> None:
    """Every stride-th operation is one; with 1 in its place all are tried, which takes minutes."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        whole = writer(folder, "whole", staleness, checkpoints)
        with killed_before(-1) as operations:
            whole.train()
        assert verify.check(whole.directory).findings == ()
        for operation in range(1, operations() + 1, stride):
            again = writer(folder, f"killed-{operation}", staleness, checkpoints)
            for place in (operation, 1 + operation % 23):
                with contextlib.suppress(Killed), killed_before(place):
                    again.train()
                if (again.directory / "config.yaml").exists():
                    assert verify.check(again.directory).findings == (), (operation, place)
            again.train()
            report = verify.check(again.directory)
            assert report.findings == (), operation
            assert all("its deletion was interrupted" in note for note in report.notes), report.notes
            assert report.counts["tickets_dropped"] == {"too_few_samples": 2, "worker_lost": 1}
            if staleness == 0:
                assert verify.compare(again.directory, whole.directory) == [], operation
