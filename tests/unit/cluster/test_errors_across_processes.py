"""An error that an actor raises says the same in the driver."""

import pytest
from ray.exceptions import RayTaskError

from keel.errors import NotFinite


@pytest.mark.parametrize("moved", [False, True])
def test_a_refused_step_tells_the_driver_whether_weights_moved(moved: bool) -> None:
    """Ray's copy is of a class derived from the error's: an attribute of that class would hide the cause's own."""
    error = NotFinite("step 2: the loss is inf")
    error.weights_moved = moved
    answer = RayTaskError("step", "", error).as_instanceof_cause()
    assert isinstance(answer, NotFinite) and answer.weights_moved is moved
