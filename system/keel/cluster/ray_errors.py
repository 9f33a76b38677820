"""What Ray raises when an actor, or what it made, is lost, told from what the actor's own code raised."""

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from keel.errors import KeelError

GONE = (RayActorError, OutOfMemoryError)
"""What Ray raises for an actor that died or cannot be reached."""


def cause_of(error: RayTaskError) -> BaseException:
    """What an actor's own code raised: Keel's exceptions as they are, others in Ray's wrapping with its traceback."""
    return error.cause if isinstance(error.cause, KeelError) else error


def own_fault(error: BaseException) -> bool:
    """The actor's own code raised, in its constructor or in a load: it would again."""
    return isinstance(error, RayTaskError) or init_failed(error)


def init_failed(error: BaseException | None) -> bool:
    """The actor's constructor raised."""
    return isinstance(error, RayActorError) and error.actor_init_failed


def why(error: BaseException, deadline: float) -> str:
    """What became of a worker, for one line."""
    if isinstance(error, RayTaskError):
        return f"failed ({type(error.cause).__name__}: {error.cause})"
    if isinstance(error, TimeoutError):
        return f"did not answer within {deadline:.0f} s"
    return "lost its weights" if isinstance(error, ObjectLostError) else "died"
