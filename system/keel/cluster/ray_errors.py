"""Ray's errors: a lost actor or object, as against an exception of the actor's own code."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from keel.errors import BuildFailed, KeelError
from keel.text import last_line

Result = TypeVar("Result")
GONE = (RayActorError, OutOfMemoryError)
"""The errors that Ray raises for an actor that died or cannot be reached."""


async def answer(
    reference: Awaitable[Result], name: str, lost: Callable[[str], Exception], input_lost: Exception
) -> Result:
    """Await an actor's answer and translate Ray's errors to Keel's, for workers, ranks and the buffer alike.

    Raises `input_lost`, what the actor's own code raised, BuildFailed for its constructor, or what `lost` makes of
    the reason.
    """
    try:
        return await reference
    except ObjectLostError as error:
        raise input_lost from error
    except RayTaskError as error:
        raise cause_of(error) from error
    except GONE as error:
        reason = last_line(str(error))
        raise (BuildFailed(f"{name} did not start: {reason}") if init_failed(error) else lost(reason)) from error


def cause_of(error: RayTaskError) -> BaseException:
    """The exception of an actor's own code: Keel's as they are, others in Ray's wrapper with its traceback."""
    return error.cause if isinstance(error.cause, KeelError) else error


def own_fault(error: BaseException) -> bool:
    """Whether the actor's own code raised, in its constructor or in a load: a replacement would, too."""
    return isinstance(error, RayTaskError) or init_failed(error)


def init_failed(error: BaseException | None) -> bool:
    """Whether the actor's constructor raised."""
    return isinstance(error, RayActorError) and error.actor_init_failed


def why(error: BaseException, deadline: float) -> str:
    """Why a worker is lost, for one line."""
    if isinstance(error, RayTaskError):
        return f"failed ({type(error.cause).__name__}: {error.cause})"
    if isinstance(error, TimeoutError):
        return f"did not answer within {deadline:.0f} s"
    return "lost its weights" if isinstance(error, ObjectLostError) else "died"
