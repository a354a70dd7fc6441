"""How cycles end, told to the worker, the log and whoever watches; off the forward path."""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec import Struct

from swiftbalancer import wire
from swiftbalancer.cycle import EndCycle
from swiftbalancer.dispatch import nothing
from swiftbalancer.incoming import IncomingPlan
from swiftbalancer.leader import Leader
from swiftbalancer.metrics import reason_class
from swiftbalancer.plan import PlanKind
from swiftbalancer.stats import Stats

logger = logging.getLogger(__name__)
CycleObserver = Callable[[wire.Outcome], None]


class Ended(Struct, frozen=True):
    """What the main thread knows of a cycle that is over, or of a plan that none took up."""

    command: EndCycle
    begun: bool
    """False for a plan that was discarded before any cycle."""
    plan: wire.PlanReply | None
    """On the leader, unless the plan was not its own."""
    incoming: IncomingPlan | None
    """Once the plan was received and valid."""
    epoch: int
    step: int
    steps: int
    """Since the plan was announced."""

    @property
    def kind(self) -> PlanKind:
        """Of the plan, where it is known."""
        if self.incoming is not None:
            return self.incoming.plan.kind
        return self.plan.kind if self.plan is not None else "dispatch"


class Outcomes:
    """One rank's. `count` is for the main thread, so that ranks count after the same step; `report` for the lane."""

    def __init__(self, stats: Stats, leader: Leader | None, *, expert_bytes: int, shadow: bool) -> None:
        self._stats = stats
        self._leader = leader
        self._expert_bytes = expert_bytes
        self._shadow = shadow
        self.observers: list[CycleObserver] = []

    def count(self, ended: Ended) -> None:
        """Counts how a cycle ended."""
        if ended.command.committed:
            self._stats.committed(ended.kind, ended.steps)
        elif ended.begun:
            self._stats.dropped(ended.command.reason)

    def report(self, ended: Ended, rest: Callable[[], None] = nothing) -> None:
        """Tells everybody how a cycle ended; `rest` is called between pieces of that."""
        outcome = self._outcome(ended)
        if self._leader is not None and ended.plan is not None:
            rest()
            self._log(outcome, ended.command.cycle)
            rest()
            self._leader.finished(outcome, shadow=self._shadow)
            rest()
        for observer in self.observers:
            observer(outcome)

    def _outcome(self, ended: Ended) -> wire.Outcome:
        moves = len(ended.incoming.plan.moves) if ended.command.committed and ended.incoming is not None else 0
        return wire.Outcome(
            request=ended.plan.request if ended.plan is not None else 0,
            kind=ended.kind,
            committed=ended.command.committed,
            reason=ended.command.reason,
            epoch=ended.epoch,
            step=ended.step,
            moves=moves,
            moved_bytes=moves * self._expert_bytes,
            imbalance=self._stats.imbalance or 0.0,
            phase_steps={"total": ended.steps},
        )

    def _log(self, outcome: wire.Outcome, cycle: int) -> None:
        """One line a cycle. Dispatch updates come several a second at small steps: they are for `debug`.

        A cycle that a drain ends is lost as somebody wanted.
        """
        lost = not outcome.committed and not self._shadow and reason_class(outcome.reason) != "drain"
        usual = logging.INFO if outcome.kind == "placement" else logging.DEBUG
        logger.log(
            logging.WARNING if lost else usual,
            "cycle=%d kind=%s %s epoch=%d step=%d steps=%d moves=%d moved_mib=%.1f imbalance=%.3f reason=%r",
            cycle,
            outcome.kind,
            "committed" if outcome.committed else "lost",
            outcome.epoch,
            outcome.step,
            outcome.phase_steps["total"],
            outcome.moves,
            outcome.moved_bytes / 2**20,
            outcome.imbalance,
            outcome.reason,
        )
