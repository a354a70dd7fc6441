"""Plain numbers about one rank's balancing, cheap enough for the forward path to update."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.load import imbalance


class StepKind(IntEnum):
    """What the balancer did in a step, for the host time it took of the engine's main thread."""

    IDLE = 0
    PLANNING = 1
    MOVING = 2
    COMMITTING = 3


class TimeRing:
    """The last `size` durations, seconds; adding one costs an assignment, and looking at all of them little."""

    def __init__(self, size: int = 4096) -> None:
        self._values = array("d", bytes(8 * size))
        self.count = 0
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self._values[self.count % len(self._values)] = seconds
        self.count += 1
        self.total += seconds

    def add_all(self, seconds: Sequence[float]) -> None:
        """Each of them, for a fraction of what adding each takes."""
        at, end = self.count % len(self._values), len(seconds)
        if at + end > len(self._values):
            for each in seconds:
                self.add(each)
            return
        self._values[at : at + end] = array("d", seconds)
        self.count += end
        self.total += sum(seconds)

    def values(self) -> NDArray[np.float64]:
        """`[n]` float64, seconds, in no order."""
        return np.frombuffer(self._values)[: min(self.count, len(self._values))].copy()

    def percentile(self, q: float) -> float:
        """The q-th percentile of the values kept; 0.0 without any."""
        return percentiles(self.values(), q)[0]


def percentiles(values: NDArray[np.float64], *q: float) -> list[float]:
    """The q-th percentiles of `values` `[n]`, interpolated, as `numpy.percentile` gives them; 0.0 without values.

    By one sort, which takes a fifth of numpy's own time for two of them: what threads compute holds up the engine.
    """
    if not values.size:
        return [0.0] * len(q)
    at = np.array(q) / 100 * (len(values) - 1)
    found: list[float] = np.interp(at, np.arange(len(values)), np.sort(values)).tolist()
    return found


@dataclass(slots=True)
class Stats:
    """Counters since attach."""

    steps: int = 0
    windows: int = 0
    cycles_committed: int = 0
    cycles_dropped: int = 0
    drop_reasons: dict[str, int] = field(default_factory=dict)
    placement_updates: int = 0
    dispatch_updates: int = 0
    moves_planned: int = 0
    """Experts that plans asked to move, whether or not they were taken up; on rank 0."""
    experts_moved: int = 0
    bytes_moved: int = 0
    plans_declined: int = 0
    requests_failed: int = 0
    rounds: int = 0
    late_rounds: int = 0
    late_round_s: float = 0.0
    round_s: TimeRing = field(default_factory=lambda: TimeRing(512))
    """Seconds from the posting of a vote to its outcome, which the forward path does not wait for."""
    worker_restarts: int = 0
    stalls: int = 0
    """Times a cycle made no progress for `breaker.stall_warning_s`."""
    pauses: int = 0
    """Times the breaker paused balancing; on rank 0."""
    off_reason: str = ""
    rank_loads: NDArray[np.float64] | None = None
    """`[layers, ranks]` tokens of the last sub-window, where there are metrics: on rank 0; None before the first."""
    imbalance_predicted: float | None = None
    """Mean over layers; None before the first plan."""
    plan_s: TimeRing = field(default_factory=lambda: TimeRing(512))
    apply_steps: TimeRing = field(default_factory=lambda: TimeRing(512))
    """Steps from the broadcast of a plan to its last commit."""
    host_s: tuple[TimeRing, ...] = field(default_factory=lambda: tuple(TimeRing() for _ in StepKind))
    """Seconds of the engine's main thread per step, by `StepKind`."""

    @property
    def imbalance(self) -> float | None:
        """Of the last sub-window, mean over layers; None before the first. Worked out when somebody looks."""
        return None if self.rank_loads is None else float(imbalance(self.rank_loads).mean())

    def committed(self, kind: str, steps: int) -> None:
        """Counts a cycle that took `steps` from broadcast to last commit; `kind` is a plan's."""
        self.cycles_committed += 1
        self.apply_steps.add(steps)
        if kind == "placement":
            self.placement_updates += 1
        else:
            self.dispatch_updates += 1

    def dropped(self, reason: str) -> None:
        """Counts a lost cycle; reasons are cut before their first figures so that they stay few."""
        self.cycles_dropped += 1
        key = reason.rsplit(":", maxsplit=1)[-1].strip()[:60] or "unknown"
        self.drop_reasons[key] = self.drop_reasons.get(key, 0) + 1
