"""What one balanced model looks like from outside: `Stats`, the last sub-window, how plans ended.

Everything here is fed off the forward path but `cycle_ended`, which only adds integers. Exporters read it on
their own threads.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.cycle import Fault
from swiftbalancer.dispatch import nothing
from swiftbalancer.load import imbalance
from swiftbalancer.stats import Stats, StepKind, TimeRing, percentiles
from swiftbalancer.wire import Outcome

Result = Literal["committed", "dropped", "shadow"]
FAULTS = "|".join(fault.name.lower() for fault in Fault if fault)
_REASONS: tuple[tuple[str, str], ...] = (
    (rf"^rank \d+: ({FAULTS})", r"\1"),
    (r"asked for a drain", "drain"),
    (r"^rank \d+ is off", "lockstep"),
    (r"different plans", "digest"),
    (r"^ranks differ", "disagreement"),
    (r"(?i)worker|no answer", "worker"),
    (r"(?i)round|vote|outcome", "agreement"),
)
NO_AGREEMENT = ("lockstep", "digest", "disagreement", "agreement")


def reason_class(reason: str) -> str:
    """A drop's reason as one of a dozen words, fit for a metric's label; `other` if it is none of them."""
    for pattern, name in _REASONS:
        found = re.search(pattern, reason)
        if found:
            return found.expand(name)
    return "other" if reason else ""


@dataclass(frozen=True, slots=True)
class Cycles:
    """Key of a count of cycles."""

    kind: str
    result: Result
    reason: str


@dataclass(slots=True)
class WorkerView:
    """What is known of the worker."""

    up: bool = False
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class About:
    """What is balanced, and how; constant labels."""

    engine: str = ""
    model: str = ""
    policy: str = ""
    mode: str = "on"


@dataclass(frozen=True, slots=True)
class PhaseView:
    """Where the cycle is and for how long, seconds."""

    name: str = "idle"
    age_s: float = 0.0


@dataclass(slots=True)
class Metrics:
    """Figures of one rank. Methods may be called from any thread and never wait for long.

    `phase` and `worker` are asked when somebody looks.
    """

    stats: Stats
    about: About = About()
    phase: Callable[[], PhaseView] = PhaseView
    worker: Callable[[], WorkerView] = WorkerView
    tokens: float = 0.0
    lost_log_lines: int = 0
    last_window_at: float = 0.0
    _cycles: dict[Cycles, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def window(self, rank_loads: NDArray[np.float64]) -> None:
        """A sub-window's `[layers, ranks]` tokens; what follows from them is worked out when somebody looks."""
        self.stats.rank_loads = rank_loads
        self.tokens += float(rank_loads.sum())
        self.last_window_at = time.monotonic()

    @property
    def _loads(self) -> NDArray[np.float64]:
        return np.ones((1, 1)) if self.stats.rank_loads is None else self.stats.rank_loads

    @property
    def layer_imbalance(self) -> NDArray[np.float64]:
        """`[layers]`, max/mean over ranks in the last sub-window."""
        return imbalance(self._loads)

    @property
    def rank_share(self) -> NDArray[np.float64]:
        """`[ranks]`, sums to 1: of the tokens of the last sub-window; even if it had none."""
        loads = self._loads.sum(0)
        share: NDArray[np.float64] = loads / loads.sum() if loads.any() else np.full(len(loads), 1 / len(loads))
        return share

    def cycle_ended(self, outcome: Outcome) -> None:
        """A plan was committed or dropped."""
        shadow = self.about.mode == "shadow"
        result: Result = "committed" if outcome.committed else "shadow" if shadow else "dropped"
        reason = reason_class(outcome.reason) if result == "dropped" else ""
        key = Cycles(outcome.kind, result, reason)
        with self._lock:
            self._cycles[key] = self._cycles.get(key, 0) + 1

    def cycles(self) -> dict[Cycles, int]:
        """How many plans ended in which way."""
        with self._lock:
            return dict(self._cycles)

    @property
    def agreement_failures(self) -> int:
        """Cycles dropped because ranks did not agree or could not learn that they do."""
        return sum(n for key, n in self.cycles().items() if key.reason in NO_AGREEMENT)

    def snapshot(self, rest: Callable[[], None] = nothing) -> dict[str, float]:
        """The figures of the moment under stable names, for `Status`, logs and reports.

        `rest` is called between pieces of work, of some tenths of a millisecond.
        """
        stats, layer_imbalance = self.stats, self.layer_imbalance
        rest()
        host_s = percentiles(all_host_s(stats), 50, 99)
        rest()
        plan_s = percentiles(stats.plan_s.values(), 50, 99)
        apply_steps = stats.apply_steps.percentile(50)
        rest()
        return {
            "steps": stats.steps,
            "windows": stats.windows,
            "imbalance_mean": float(layer_imbalance.mean()),
            "imbalance_worst_layer": float(layer_imbalance.max()),
            "imbalance_predicted": -1.0 if stats.imbalance_predicted is None else stats.imbalance_predicted,
            "cycles_committed": stats.cycles_committed,
            "cycles_dropped": stats.cycles_dropped,
            "plans_declined": stats.plans_declined,
            "requests_failed": stats.requests_failed,
            "placement_updates": stats.placement_updates,
            "dispatch_updates": stats.dispatch_updates,
            "experts_moved": stats.experts_moved,
            "bytes_moved": stats.bytes_moved,
            "plan_ms_p50": 1e3 * plan_s[0],
            "plan_ms_p99": 1e3 * plan_s[1],
            "apply_steps_p50": apply_steps,
            "host_us_per_step_p50": 1e6 * host_s[0],
            "host_us_per_step_p99": 1e6 * host_s[1],
            "late_rounds": stats.late_rounds,
            "phase_age_s": self.phase().age_s,
            "worker_restarts": self.worker().restarts,
            "agreement_failures": self.agreement_failures,
            "stalls": stats.stalls,
            "pauses": stats.pauses,
        }


def all_host_s(stats: Stats) -> NDArray[np.float64]:
    """`[n]` float64, seconds of the engine's main thread in recent steps of every kind."""
    return np.concatenate([ring.values() for ring in stats.host_s])


def host_rings(stats: Stats) -> dict[str, TimeRing]:
    """Host time per step by what the balancer did in it."""
    return {kind.name.lower(): stats.host_s[kind] for kind in StepKind}
