"""Retries after a lost worker, and the share of failed samples that ends a run."""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from keel.config.run import Settings
from keel.errors import KeelError, WorkerLost
from keel.protocols import Observer

Result = TypeVar("Result")


async def retrying(once: Callable[[], Awaitable[Result]], retries: int, observer: Observer | None = None) -> Result:
    """Repeat after a lost worker with the same rows and seeds. Raises WorkerLost after `retries` more attempts."""
    observer = observer or Observer()
    for _ in range(retries):
        try:
            return await once()
        except WorkerLost as lost:
            observer.event("retry", reason=str(lost))
            observer.add({"retries_total": 1.0})
    return await once()


class TooManyFailures(KeelError, RuntimeError):
    """More samples failed than `failures.max_failed_ratio` allows."""


class FailureWatch:
    """Watches the share of failed samples over the last step's worth of samples."""

    def __init__(self, settings: Settings) -> None:
        self._allowed = settings.failures.max_failed_ratio
        rows_per_step = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt
        self._outcomes: deque[bool] = deque(maxlen=rows_per_step)  # failed?
        self._reasons: Counter[str] = Counter()

    def saw(self, failed: Mapping[str, int], accepted: int) -> None:
        """Count failed samples, by reason, and accepted ones. Raises TooManyFailures."""
        self._reasons.update(failed)
        self._outcomes.extend([True] * sum(failed.values()) + [False] * accepted)
        ratio = sum(self._outcomes) / max(1, len(self._outcomes))
        if len(self._outcomes) == self._outcomes.maxlen and ratio > self._allowed:
            raise TooManyFailures(
                f"{ratio:.0%} of the last {len(self._outcomes)} samples failed, more than"
                f" failures.max_failed_ratio={self._allowed}; reasons: {dict(self._reasons)}"
            )
