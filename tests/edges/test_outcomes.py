"""What the log says of a cycle's end, and how loud."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from swiftbalancer import wire
from swiftbalancer.cycle import EndCycle
from swiftbalancer.leader import Leader
from swiftbalancer.outcomes import Ended, Outcomes
from swiftbalancer.plan import PlanKind
from swiftbalancer.stats import Stats


class Told:
    """A leader that only listens."""

    def __init__(self) -> None:
        self.told: list[tuple[bool, bool]] = []

    def finished(self, outcome: wire.Outcome, *, shadow: bool) -> None:
        self.told.append((outcome.committed, shadow))


@pytest.mark.parametrize(
    ("committed", "kind", "reason", "shadow", "level"),
    [
        (True, "placement", "", False, logging.INFO),
        (True, "dispatch", "", False, logging.DEBUG),
        (False, "placement", "rank 1: checksum", False, logging.WARNING),
        (False, "dispatch", "rank 1: broadcast_failed", False, logging.WARNING),
        (False, "placement", "rank 0 asked for a drain", False, logging.INFO),
        (False, "dispatch", "rank 0 asked for a drain", False, logging.DEBUG),
        (False, "placement", "shadow mode: nothing is applied", True, logging.INFO),
    ],
)
def test_only_what_nobody_wanted_is_a_warning(
    committed: bool, kind: PlanKind, reason: str, shadow: bool, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    leader = Told()
    outcomes = Outcomes(Stats(), cast("Leader", leader), expert_bytes=1, shadow=shadow)
    plan = wire.PlanReply(1, kind, 0, 0, 1.4, 1.1, 0.02, 0, [])
    ended: dict[str, Any] = {"begun": True, "plan": plan, "incoming": None, "epoch": 3, "step": 90, "steps": 12}
    with caplog.at_level(logging.DEBUG, "swiftbalancer.outcomes"):
        outcomes.report(Ended(command=EndCycle(7, committed, reason, False), **ended))
    (record,) = caplog.records
    assert record.levelno == level
    assert f"cycle=7 kind={kind} {'committed' if committed else 'lost'} epoch=3" in record.message
    assert leader.told == [(committed, shadow)]
