"""The admission window: how many prompt groups may be under way, and how they share generator batches.

A group is admitted only while

    taken + live < (version + 1 + max_staleness) * groups_per_step

(live: admitted, neither taken nor dropped) and groups are taken in admission order. A group admitted at version v is
then at most the (v + 1 + max_staleness) * groups_per_step-th one taken, so it is trained by the step that starts
from version v + max_staleness at the latest: no row is ever trained more than max_staleness versions late.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass
class AdmissionWindow:
    """Counts of one run; an opening of many slots is split into generator batches of `groups_per_batch`."""

    groups_per_step: int
    groups_per_batch: int
    max_staleness: int
    version: int = 0
    """The weight version that all generators hold."""
    taken: int = 0
    """Groups that steps have trained."""
    openings: deque[int] = field(default_factory=deque)
    """Sizes of the generator batches that may be admitted."""

    def __post_init__(self) -> None:
        self.open(self.bound - self.taken)

    @property
    def bound(self) -> int:
        """The right side of the inequality."""
        return (self.version + 1 + self.max_staleness) * self.groups_per_step

    def open(self, slots: int) -> None:
        """Let this number of further groups be admitted."""
        batches, rest = divmod(slots, self.groups_per_batch)
        self.openings.extend([self.groups_per_batch] * batches + [rest] * bool(rest))

    def admit(self, live: int) -> int:
        """The size of the next generator batch, which joins `live` groups."""
        size = self.openings.popleft()
        assert self.taken + live + size <= self.bound, (self.taken, live, size, self.bound)
        return size

    def advance(self) -> None:
        """Move to the next version: the groups of one more step may be admitted."""
        self.version += 1
        self.open(self.groups_per_step)
