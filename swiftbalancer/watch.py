"""Self-watch: a cycle that makes no progress is noticed, and the log says which ranks and which phase hold it up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from swiftbalancer.cycle import Cycle, Phase, Vote
from swiftbalancer.stats import Stats

logger = logging.getLogger(__name__)


class ProgressWatch:
    """One rank's. A stall is reported after `warn_after_s`, and again each time it has lasted twice as long."""

    def __init__(
        self, stats: Stats, *, rank: int, warn_after_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stats = stats
        self._rank = rank
        self._warn_after_s = warn_after_s
        self._clock = clock
        self.votes: Sequence[Vote] = ()
        """Of the last round."""
        self.progressed()

    @property
    def age_s(self) -> float:
        """Seconds since the cycle last changed its phase or batch."""
        return self._clock() - self._since

    def progressed(self) -> None:
        """The cycle has changed its phase or batch."""
        self._since = self._clock()
        self._report_at_s = self._warn_after_s

    def check(self, cycle: Cycle) -> bool:
        """Counts and reports a stall that is due to be reported; true where it did."""
        if cycle.phase not in (Phase.RECEIVING, Phase.MOVING) or self.age_s < self._report_at_s:
            return False
        if self._report_at_s == self._warn_after_s:
            self._stats.stalls += 1
        self._report_at_s *= 2
        late = [rank for rank, vote in enumerate(self.votes) if vote.phase == cycle.phase and not vote.ready]
        logger.warning(
            "rank=%d cycle=%d made no progress for %.0f s in phase %s, batch %d; not ready: ranks %s",
            self._rank,
            cycle.cycle,
            self.age_s,
            cycle.phase.name,
            cycle.batch,
            late,
        )
        return True
