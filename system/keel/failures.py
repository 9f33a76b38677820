"""How many samples may fail before a run is not worth going on with."""

from collections import Counter, deque
from collections.abc import Mapping

from keel.settings import Settings


class TooManyFailures(RuntimeError):
    """More samples failed than `failures.max_failed_ratio` allows."""


class FailureWatch:
    """Whether the last samples, as many as a step has, failed more often than allowed."""

    def __init__(self, settings: Settings) -> None:
        self._allowed = settings.failures.max_failed_ratio
        rows_per_step = settings.buffer.groups_per_step * settings.sampling.samples_per_prompt
        self._outcomes: deque[bool] = deque(maxlen=rows_per_step)  # failed?
        self._reasons: Counter[str] = Counter()

    def saw(self, failed: Mapping[str, int], accepted: int) -> None:
        """Failed samples by reason, and accepted ones. Raises TooManyFailures."""
        self._reasons.update(failed)
        self._outcomes.extend([True] * sum(failed.values()) + [False] * accepted)
        ratio = sum(self._outcomes) / max(1, len(self._outcomes))
        if len(self._outcomes) == self._outcomes.maxlen and ratio > self._allowed:
            raise TooManyFailures(
                f"{ratio:.0%} of the last {len(self._outcomes)} samples failed, more than"
                f" failures.max_failed_ratio={self._allowed}; reasons: {dict(self._reasons)}"
            )
