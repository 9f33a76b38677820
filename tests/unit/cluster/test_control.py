"""What a live run may be asked to have."""

import pytest

from keel.cluster.control import Control, ScaleError

DESIRED = {"generator": 1, "scorer": 1, "learner": 2}


def control() -> Control:
    return Control(DESIRED, {"generator": 1024, "scorer": 1024, "learner": 4})


def test_wanted_counts_are_told_to_the_run_and_its_own_to_others() -> None:
    actor = control()
    assert actor.scale({"generator": 3}) == {"desired": {**DESIRED, "generator": 3}, "actual": {}}
    assert actor.exchange({"generator": 1, "learner": 2}) == ({**DESIRED, "generator": 3}, False)
    assert actor.status()["actual"] == {"generator": 1, "learner": 2}
    assert actor.scale({})["desired"]["generator"] == 3  # only asking


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"generator": 0}, "generator=0: expected 1 to 1024"),
        ({"learner": 5}, "learner=5: expected 1 to 4, the rows of a step"),
        ({"reference": 2}, "reference=2: the run has none; expected one of generator, scorer, learner"),
        ({"generator": 2, "learner": -1}, "learner=-1: expected 1 to 4"),
    ],
)
def test_counts_that_cannot_be_change_nothing(wanted: dict[str, int], message: str) -> None:
    actor = control()
    with pytest.raises(ScaleError, match=message):
        actor.scale(wanted)
    assert actor.exchange({}) == (DESIRED, False)


def test_a_stop_is_heard_from_then_on() -> None:
    actor = control()
    assert actor.stop()["desired"] == DESIRED
    assert actor.exchange({}) == actor.exchange({}) == (DESIRED, True)
