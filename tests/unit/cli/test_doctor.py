"""keel doctor without its self-test (that is an integration test), and learning-rate schedules."""

import json
from typing import Any

import pytest
from rich.console import Console

from keel.cli import doctor
from keel.config.workers import LearnerSettings
from keel.learner.optimizer import learning_rate


def checks(capsys: pytest.CaptureFixture[str]) -> tuple[bool, dict[str, Any]]:
    healthy = doctor.run(Console(), as_json=True, self_test=False)
    answer = json.loads(capsys.readouterr().out)
    assert answer["healthy"] == healthy
    return healthy, {check["name"]: check for check in answer["checks"]}


def test_every_part_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    _, result = checks(capsys)
    expected = {"python", "compiler", "memory", "shared memory", "metrics port", "vllm", "torchvision", *doctor.TESTED}
    assert set(result) == expected
    assert result["torch"]["finding"].startswith("2.")


def test_a_missing_compiler_and_a_wrong_package_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(doctor.TESTED, "no-such-package", "1.0")
    healthy, result = checks(capsys)
    assert not healthy
    assert result["compiler"]["finding"] == "missing: gcc, g++"
    assert result["no-such-package"]["finding"] == "not installed (tested with 1.0)"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533906, 0.5, 0.1464466094]),
    ],
)
def test_learning_rate_warms_up_and_decays(schedule: str, expected: list[float]) -> None:
    settings = LearnerSettings(learning_rate=1.0, schedule=schedule, warmup_steps=2)
    assert [learning_rate(settings, version, 6) for version in range(6)] == pytest.approx(expected)
