"""Which fault is on, and what each of them has cost; kept by rank 0."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from swiftbalancer.cycle import Phase
from tests.edges.fault import Place

PATIENCE_S = 60.0
"""For one fault, from arming to the next committed cycle; a fault test fails beyond it."""
PASSES_WHEN_OFF = 200
"""How long to serve on once balancing is off."""


@dataclass
class Cost:
    """What one fault did, as rank 0 saw it."""

    fault: str
    fired: bool = False
    recovered: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    requests_failed: int = 0
    restarts: int = 0
    late_rounds: int = 0
    committed: int = 0
    """Cycles committed from arming to recovery."""
    seconds: float = 0.0


class Script:
    """Rank 0's: which fault is on, and when the next may come. One committed cycle before, one after each."""

    def __init__(self, place: Place, faults: list[str]) -> None:
        self._place = place
        self._left = list(faults)
        self._since = time.monotonic()
        self._base = place.balancer.stats.cycles_committed
        self._before: dict[str, Any] = {}
        self._fired_at_commits = -1
        self._passes_off = 0
        self.costs: list[Cost] = []
        self.index = -1
        """Of the armed fault; -1 while none is."""

    @property
    def over(self) -> bool:
        return not self._left and self.index < 0

    def next(self, *, fired: bool) -> int:
        """The index of the fault that is to be armed from now on, or -1."""
        commits = self._place.balancer.stats.cycles_committed
        late = time.monotonic() - self._since > PATIENCE_S
        if self._place.balancer.phase is Phase.OFF:
            self._passes_off += 1
            late = self._passes_off > PASSES_WHEN_OFF
        if self.index < 0:
            if self._left and (commits > self._base or late):
                self._begin()
            return self.index
        if fired and self._fired_at_commits < 0:
            self._fired_at_commits = commits
        if late or (self._fired_at_commits >= 0 and commits > self._fired_at_commits):
            self._finish(recovered=not late, fired=fired)
        return self.index

    def _begin(self) -> None:
        self.index = len(self.costs)
        self.costs.append(Cost(self._left.pop(0)))
        self._since, self._fired_at_commits = time.monotonic(), -1
        self._before = self._counts()

    def _finish(self, *, recovered: bool, fired: bool) -> None:
        cost, now, before = self.costs[-1], self._counts(), self._before
        cost.fired, cost.recovered = fired, recovered
        cost.seconds = time.monotonic() - self._since
        cost.dropped = {k: n - before["dropped"].get(k, 0) for k, n in now["dropped"].items()}
        cost.dropped = {k: n for k, n in cost.dropped.items() if n}
        cost.requests_failed = now["requests_failed"] - before["requests_failed"]
        cost.restarts = now["restarts"] - before["restarts"]
        cost.late_rounds = now["late_rounds"] - before["late_rounds"]
        cost.committed = now["committed"] - before["committed"]
        self.index, self._base, self._since = -1, now["committed"], time.monotonic()

    def _counts(self) -> dict[str, Any]:
        stats = self._place.balancer.stats
        return {
            "dropped": dict(stats.drop_reasons),
            "requests_failed": stats.requests_failed,
            "late_rounds": stats.late_rounds,
            "restarts": self._place.link.restarts,
            "committed": stats.cycles_committed,
        }
