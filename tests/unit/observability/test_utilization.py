"""Worker seconds by role, against states whose shares are known."""

import pytest

from keel.observability.utilization import Utilization


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def utilization(clock: Clock) -> Utilization:
    return Utilization(clock)


def test_busy_and_idle_are_the_seconds_of_all_that_serve(utilization: Utilization, clock: Clock) -> None:
    utilization.occupied("generator", running=2, waiting=5, serving=3)
    utilization.ranks(4)
    utilization.doing("learner_step")
    clock.now += 10
    result = utilization.drain()
    assert result["busy_seconds_total"] == {"generator": 20.0, "learner": 40.0}
    assert result["queue_seconds_total"] == {"generator": 50.0}
    assert result["idle_seconds_total"] == {"generator/learner": 10.0}
    assert result["phase_seconds_total"]["learner_step"] == 10.0
    assert utilization.drain() == {}, "handed out once"


ROLES = ("generator", "reference", "scorer", "learner")
STATES = [  # phase; (running, waiting, serving) of generator, reference, scorer; role -> what it waits for
    ("rollouts", (1, 0, 1), (0, 0, 1), (0, 0, 1), dict.fromkeys(ROLES[1:], "generator")),
    ("rollouts", (0, 0, 1), (0, 0, 1), (1, 3, 1), {"generator": "scorer", "reference": "scorer", "learner": "scorer"}),
    ("rollouts", (1, 0, 1), (1, 2, 1), (0, 0, 1), {"scorer": "reference", "learner": "reference"}),
    ("rollouts", (1, 0, 1), (1, 0, 1), (1, 0, 1), {"learner": "scorer"}),
    ("rollouts", (2, 4, 2), (1, 0, 1), (0, 0, 1), {"scorer": "generator", "learner": "generator"}),
    ("rollouts", (0, 0, 1), (0, 0, 1), (0, 0, 1), dict.fromkeys(ROLES, "driver")),
    ("learner_step", (0, 0, 1), (0, 0, 1), (0, 0, 1), dict.fromkeys(ROLES[:3], "learner")),
    ("learner_step", (0, 0, 1), (1, 0, 1), (0, 0, 1), {"generator": "learner", "scorer": "reference"}),
    ("weight_sync", (0, 0, 1), (0, 0, 1), (0, 0, 1), dict.fromkeys(ROLES, "weight_sync")),
    ("evaluation", (1, 0, 1), (0, 0, 1), (0, 0, 1), {"reference": "generator", "scorer": "generator", "learner": "evaluation"}),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "generator", "reference", "scorer", "idle"), STATES)
def test_who_has_nothing_to_do_waits_for_someone(
    utilization: Utilization,
    clock: Clock,
    phase: str,
    generator: tuple[int, int, int],
    reference: tuple[int, int, int],
    scorer: tuple[int, int, int],
    idle: dict[str, str],
) -> None:
    for role, state in (("generator", generator), ("reference", reference), ("scorer", scorer)):
        utilization.occupied(role, *state)
    utilization.ranks(1)
    utilization.doing(phase)
    clock.now += 1
    assert utilization.drain()["idle_seconds_total"] == {f"{role}/{on}": 1.0 for role, on in idle.items()}
