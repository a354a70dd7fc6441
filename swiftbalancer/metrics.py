"""What the balancer counts about itself: plain numbers, cheap to add to, copied out on demand.

The forward path only adds to lists of integers; exporters read `snapshot()` on their own threads. A reader may
see a sum that is one observation ahead of its count, never anything worse.
"""

from __future__ import annotations

import math
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from swiftbalancer.load import imbalance
from swiftbalancer.plan import PlanKind

Result = Literal["committed", "dropped", "nothing_to_do"]
BINS_PER_OCTAVE = 16
NUM_OCTAVES = 30
SMALLEST_S = 1e-7
"""Times below 0.1 us share the first bin; the last one ends above 100 s."""

_REASONS: tuple[tuple[str, str], ...] = (
    (r"^rank \d+: (broadcast_failed|plan_damaged|plan_invalid|transfer_failed|transfer_timeout)", r"\1"),
    (r"^rank \d+: (checksum|staging_failed|internal)", r"\1"),
    (r"asked for a drain", "drain"),
    (r"^rank \d+ is off", "lockstep"),
    (r"different plans", "digest"),
    (r"^ranks differ", "disagreement"),
    (r"(?i)worker|no answer|request \d+", "worker"),
    (r"(?i)plan", "plan_invalid"),
    (r"(?i)round|vote|agreement", "agreement"),
)


def reason_class(reason: str) -> str:
    """A drop's reason as one of a dozen words, fit for a metric's label; `other` if it is none of them."""
    for pattern, name in _REASONS:
        found = re.search(pattern, reason)
        if found:
            return found.expand(name)
    return "other" if reason else ""


class Timer:
    """A histogram of durations with bins 4.4 % wide, and their sum."""

    __slots__ = ("count", "counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (BINS_PER_OCTAVE * NUM_OCTAVES)
        self.count = 0
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts one duration; under a microsecond of host time."""
        index = int(BINS_PER_OCTAVE * math.log2(seconds / SMALLEST_S)) if seconds > SMALLEST_S else 0
        self.counts[min(index, len(self.counts) - 1)] += 1
        self.count += 1
        self.sum_s += seconds

    def quantile(self, fraction: float) -> float:
        """Seconds that `fraction` of the durations do not exceed, to the width of a bin; 0 if there are none."""
        cumulative = np.cumsum(self.counts)
        if not cumulative[-1]:
            return 0.0
        index = int(np.searchsorted(cumulative, max(1.0, fraction * float(cumulative[-1]))))
        return float(SMALLEST_S * 2.0 ** ((index + 0.5) / BINS_PER_OCTAVE))

    def cumulative(self, edges_s: tuple[float, ...]) -> list[tuple[float, int]]:
        """`(edge, durations up to it)` for each edge, to the width of a bin."""
        cumulative = np.cumsum(self.counts)
        bins = [
            min(max(round(BINS_PER_OCTAVE * math.log2(e / SMALLEST_S)) - 1, 0), len(cumulative) - 1)
            for e in edges_s
        ]
        return [(edge, int(cumulative[b])) for edge, b in zip(edges_s, bins, strict=True)]


@dataclass(frozen=True, slots=True)
class CycleOutcome:
    """How one plan ended. Times in seconds, -1 for an imbalance nobody measured or predicted."""

    kind: PlanKind
    result: Result
    reason: str = ""
    moves: int = 0
    moved_bytes: int = 0
    cross_node_bytes: int = 0
    plan_seconds: float = 0.0
    cycle_seconds: float = 0.0
    imbalance_now: float = -1.0
    imbalance_predicted: float = -1.0


@dataclass(slots=True)
class _Totals:
    cycles: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """By kind, result and class of reason."""
    moves: int = 0
    moved_bytes: int = 0
    cross_node_bytes: int = 0
    windows: int = 0
    tokens: float = 0.0
    agreement_failures: int = 0
    worker_restarts: int = 0
    stalls: int = 0
    log_lines_lost: int = 0


class Metrics:
    """Counters and gauges of one rank; every method may be called from any thread and never waits."""

    def __init__(self, *, engine: str = "", policy: str = "", mode: str = "on") -> None:
        self.engine, self.policy, self.mode = engine, policy, mode
        self.totals = _Totals()
        self.host: dict[str, Timer] = {}
        """Host time per step by part of the hook (record, round, commit, ...)."""
        self.plan, self.cycle = Timer(), Timer()
        self.steps = 0
        self.phase, self.phase_since = "idle", time.monotonic()
        self.epoch = 0
        self.worker_up = False
        self.balancing = True
        self.imbalance_now = self.imbalance_predicted = -1.0
        self.layer_imbalance = np.zeros(0)
        self.rank_share = np.zeros(0)
        self._cycles_lock = threading.Lock()

    # -- on the forward path ----------------------------------------------------------------------------------

    def host_time(self, part: str, seconds: float) -> None:
        """Host time one part of the hook took in this step."""
        timer = self.host.get(part)
        if timer is None:
            timer = self.host[part] = Timer()
        timer.add(seconds)

    def step_ended(self) -> None:
        """One forward pass is over."""
        self.steps += 1

    def entered(self, phase: str, *, epoch: int) -> None:
        """The cycle is in `phase` from now on."""
        if phase != self.phase:
            self.phase, self.phase_since = phase, time.monotonic()
        self.epoch = epoch

    # -- off the forward path ---------------------------------------------------------------------------------

    def window(self, rank_loads: ArrayLike) -> None:
        """A sub-window's measured `[layers, ranks]` tokens."""
        loads = np.asarray(rank_loads, np.float64)
        total = loads.sum()
        self.layer_imbalance = imbalance(loads)
        self.rank_share = loads.sum(0) / total if total > 0 else np.zeros(loads.shape[1])
        self.totals.windows += 1
        self.totals.tokens += float(total)

    def cycle_ended(self, outcome: CycleOutcome) -> None:
        """A plan was committed, dropped, or found nothing to do."""
        key = (
            outcome.kind,
            outcome.result,
            reason_class(outcome.reason) if outcome.result == "dropped" else "",
        )
        totals = self.totals
        with self._cycles_lock:
            totals.cycles[key] = totals.cycles.get(key, 0) + 1
            if outcome.result == "committed":
                totals.moves += outcome.moves
                totals.moved_bytes += outcome.moved_bytes
                totals.cross_node_bytes += outcome.cross_node_bytes
            totals.agreement_failures += key[2] in ("agreement", "lockstep", "disagreement", "digest")
        if outcome.plan_seconds > 0:
            self.plan.add(outcome.plan_seconds)
        if outcome.cycle_seconds > 0:
            self.cycle.add(outcome.cycle_seconds)
        if outcome.imbalance_predicted >= 0:
            self.imbalance_now, self.imbalance_predicted = outcome.imbalance_now, outcome.imbalance_predicted

    def worker(self, *, up: bool, restarts: int) -> None:
        """State of the worker link."""
        self.worker_up, self.totals.worker_restarts = up, restarts

    def stalled(self) -> None:
        """A cycle made no progress for the configured time."""
        self.totals.stalls += 1

    @property
    def phase_age_s(self) -> float:
        """Seconds since the phase last changed."""
        return time.monotonic() - self.phase_since

    def cycles(self, result: Result, kind: PlanKind | None = None) -> int:
        """Cycles that ended so, of one kind or of both."""
        with self._cycles_lock:
            found = list(self.totals.cycles.items())
        return sum(n for (k, r, _), n in found if r == result and kind in (None, k))

    def snapshot(self) -> dict[str, float]:
        """The figures of the moment under stable names, for `Status`, logs and reports; times in us or ms."""
        layers = self.layer_imbalance
        total = self.host.get("total", Timer())
        return {
            "steps": self.steps,
            "windows": self.totals.windows,
            "imbalance_mean": float(layers.mean()) if layers.size else 1.0,
            "imbalance_worst_layer": float(layers.max()) if layers.size else 1.0,
            "imbalance_now": self.imbalance_now,
            "imbalance_predicted": self.imbalance_predicted,
            "cycles_committed": self.cycles("committed"),
            "cycles_dropped": self.cycles("dropped"),
            "cycles_idle": self.cycles("nothing_to_do"),
            "placement_updates": self.cycles("committed", "placement"),
            "dispatch_updates": self.cycles("committed", "dispatch"),
            "moves": self.totals.moves,
            "moved_bytes": self.totals.moved_bytes,
            "plan_ms_p50": 1e3 * self.plan.quantile(0.5),
            "plan_ms_p99": 1e3 * self.plan.quantile(0.99),
            "host_us_per_step_p50": 1e6 * total.quantile(0.5),
            "host_us_per_step_p99": 1e6 * total.quantile(0.99),
            "phase_age_s": self.phase_age_s,
            "worker_restarts": self.totals.worker_restarts,
            "agreement_failures": self.totals.agreement_failures,
            "stalls": self.totals.stalls,
        }
