"""The errors that Keel raises on purpose: the command line shows their message alone, without a traceback.

Errors of one module stand in that module and derive from `KeelError` too.
"""

import re

from keel.text import LIMIT_CHARACTERS, printable


class KeelError(Exception):
    """Base class of errors whose message says all that a user needs; any other error is shown with its traceback."""


class ConfigError(KeelError, ValueError):
    """Bad input of the user's: one line with the setting, its value and what was expected. Exit code 2.

    Whatever the message quotes, the line is safe to print, of bounded length and without the password of a URL.
    """

    def __init__(self, message: str) -> None:
        super().__init__(safe_line(message))


def safe_line(message: str, limit: int = LIMIT_CHARACTERS) -> str:
    """Flatten a third-party message to one line of at most `limit` characters and strip the passwords of its URLs."""
    return printable(without_passwords(message), limit)


def without_passwords(text: str) -> str:
    """The text with the user and password of every URL replaced by `...`."""
    return re.sub(r"://\S*@", "://...@", text)


class WorkerLost(KeelError, RuntimeError):
    """A generator or scorer was lost and is being replaced, or its input was lost; the same rows may be tried again."""


class LearnerLost(KeelError, RuntimeError):
    """A learner rank died or missed its deadline; a new learner group continues from the newest checkpoint."""


class BuildFailed(KeelError, RuntimeError):
    """The constructor of a learner rank or of the buffer raised. Before the first step this ends the run."""


class BufferLost(KeelError, RuntimeError):
    """The buffer died or missed its deadline; a new one finds on disk what was accepted."""


class NotFinite(KeelError, FloatingPointError):
    """The learner refused a step: a log-prob, value, loss or gradient of it is infinite or NaN. Its version stays.

    Raised before the optimizer's update, which leaves no trace: weights, moments, gradients and the objective's
    state are those of before. Alike on every rank.
    """

    weights_moved: bool
    """Earlier updates of the same step (`objective.epochs`) were made: the weights are not those of the version."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.weights_moved = False  # of the instance: Ray's copy in another process asks the cause for what it lacks
