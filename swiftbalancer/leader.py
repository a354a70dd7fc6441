"""Rank 0's share: collects sub-windows, asks the worker, and holds the plan it wants the group to take up."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swiftbalancer import wire
from swiftbalancer.config import BreakerConfig, Config
from swiftbalancer.dispatch import DispatchForm, nothing
from swiftbalancer.incoming import InForce
from swiftbalancer.mailbox import Reply, RequestFailed
from swiftbalancer.metrics import reason_class
from swiftbalancer.plan import PlanKind
from swiftbalancer.stats import Stats

logger = logging.getLogger(__name__)
LONGEST_PAUSE_S = 3600.0
REPORT_SUB_WINDOWS = wire.MAX_SUB_WINDOWS // 2
"""When so many sub-windows have passed without a plan being due, the worker is told of them all the same."""


class Link(Protocol):
    """The engine's end of the socket to the worker; see `swiftbalancer.link.WorkerLink`."""

    restarts: int

    def request(self, message: wire.PlanRequest, arrays: wire.Arrays) -> bool: ...

    def poll(self) -> Reply | RequestFailed | None: ...

    def tell(self, on_answer: Callable[[], None]) -> None: ...

    def send(self, message: wire.Outcome | wire.Status, arrays: wire.Arrays | None = None) -> bool: ...

    def wait_ready(self, timeout_s: float) -> wire.Welcome: ...

    def close(self, timeout_s: float) -> None: ...


class Breaker:
    """Pauses balancing after too many lost cycles in a row, each time for longer."""

    def __init__(self, config: BreakerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._failures = 0
        self._trips = 0
        self._closed_at = 0.0

    @property
    def open(self) -> bool:
        """Whether balancing pauses now."""
        return self._clock() < self._closed_at

    def succeeded(self) -> None:
        self._failures = self._trips = 0

    def failed(self, reason: str) -> bool:
        """Counts a lost cycle; trips at `max_failures` in a row, and then gives True."""
        self._failures += 1
        if self._failures < self._config.max_failures:
            return False
        pause_s = min(self._config.retry_after_s * 2**self._trips, LONGEST_PAUSE_S)
        self._trips += 1
        self._failures = 0
        self._closed_at = self._clock() + pause_s
        logger.warning("balancing pauses for %.0f s after repeated failures, the last: %s", pause_s, reason)
        return True


class Seen(Protocol):
    """A sub-window: its number, the step it ended at, the placement epoch its tokens were counted under."""

    @property
    def window(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @property
    def expert_loads(self) -> NDArray[np.float64]:
        """`[layers, experts]` tokens. Asked for only when a request is due."""


@dataclass(frozen=True, slots=True)
class RequestForm:
    """What every plan request of this engine says."""

    dispatch: DispatchForm
    staging_experts: int


class Leader:
    """Decides when to ask for which plan. One request is outstanding at most, from asking to the cycle's end.

    `loads_landed` and `finished` run on the bulk lane, everything else on the main thread. `busy` says whether a
    request or its cycle is under way: the lane sets it when it is clear; while it is set nobody asks again.

    Requests also bring the worker what it records. So they go out in `observe` mode and while the breaker is open
    too, then without asking for a plan; and each brings all sub-windows since the last one that was answered.
    """

    def __init__(self, config: Config, link: Link, form: RequestForm, stats: Stats) -> None:
        self._config = config
        self._link = link
        self._form = form
        self._stats = stats
        self._windows: deque[Seen] = deque(maxlen=wire.MAX_SUB_WINDOWS)
        self._asked_window = self._heard_window = -1
        self._replan_due = bool(config.window.replan_sub_windows)  # the layout engines start with is the worst
        self._request = 0
        self._observing = False
        """Whether the outstanding request asks for no plan."""
        self.breaker = Breaker(config.breaker)
        self.busy = False
        self.paused = False
        self.off = False
        """Balancing has ended on this rank; loads still go to the worker, for its recording."""
        self.measure: Callable[[], wire.Measured] = wire.Measured
        """What the engine has measured so far; called on the bulk lane."""
        self.rest: Callable[[], None] = nothing
        """Called between pieces of work on the bulk lane, see `StepTimes`."""
        self._nudge: Callable[[], None] = nothing

    def nudge_by(self, nudge: Callable[[], None]) -> None:
        """`nudge` makes the main thread look, though it expects nothing; threads of ours call it."""
        self._nudge = nudge
        self._link.tell(nudge)

    def loads_landed(self, seen: Seen, *, in_force: InForce) -> None:
        """Takes a sub-window in; asks for a plan on `in_force` when one is due and nobody is busy."""
        self._windows.append(seen)
        window = seen.window
        self._stats.worker_restarts = self._link.restarts
        due = self._config.window
        if due.replan_sub_windows and (window + 1) % due.replan_sub_windows == 0:
            self._replan_due = True
        refresh = bool(due.refresh_sub_windows) and (window + 1) % due.refresh_sub_windows == 0
        may_plan = self._config.mode != "observe" and not self.breaker.open and not self.off
        observing = not (may_plan and (self._replan_due or refresh))
        if observing and may_plan and window - self._heard_window < REPORT_SUB_WINDOWS:
            return
        if self.busy or self.paused:
            return
        self.rest()
        if self.paused:
            return
        self._observing = observing
        kind: PlanKind = "placement" if self._replan_due and not self._observing else "dispatch"
        self._asked_window = window
        self.busy = True
        self._nudge()
        asked = False
        try:
            asked = self._ask(kind, in_force)
        finally:
            if not asked:
                self.busy = False
        if asked and kind == "placement":
            self._replan_due = False

    def forget_loads(self) -> None:
        """Drops the sub-windows seen so far: the engine's weights or traffic are others now."""
        self._windows.clear()

    def poll(self) -> tuple[wire.PlanReply, Sequence[wire.Frame]] | None:
        """The worker's plan and its frames, once; `busy` then stays set until `finished`."""
        reply = self._link.poll()
        if reply is None:
            return None
        if isinstance(reply, Reply):
            self._heard_window = self._asked_window
        if isinstance(reply, RequestFailed):
            self._request_failed(str(reply.error))
        elif isinstance(reply.message, wire.Refused):
            self._request_failed(f"the worker refused: {reply.message.reason}")
        elif self._observing:
            self.busy = False  # heard; no plan was asked for, and none would be taken
        elif isinstance(reply.message, wire.NothingToDo):
            self._declined(reply.message)
            self.busy = False
        else:
            self._stats.plan_s.add(reply.message.plan_seconds)
            self._stats.imbalance_predicted = reply.message.imbalance_predicted
            self._stats.moves_planned += wire.num_moves(reply.message)
            return reply.message, reply.frames
        return None

    def finished(self, outcome: wire.Outcome, *, shadow: bool) -> None:
        """The cycle of the last plan is over; the worker is told, and the next request may go out.

        What a drain ended is no failure.
        """
        if outcome.committed or shadow:
            self.breaker.succeeded()
        elif reason_class(outcome.reason) != "drain":
            self._failed(outcome.reason)
        self._link.send(outcome)
        self.busy = False

    def report(self, status: wire.Status, arrays: wire.Arrays) -> None:
        """Sends what the live view shows."""
        self._link.send(status, arrays)

    def wait_ready(self, timeout_s: float) -> None:
        """Blocks until the worker answers; raises `WorkerLost` or its refusal."""
        self._link.wait_ready(timeout_s)

    def close(self, timeout_s: float) -> None:
        self._link.close(timeout_s)

    def _request_failed(self, reason: str) -> None:
        self._stats.requests_failed += 1
        if self._observing:
            logger.warning("the worker has not taken the last loads: %s", reason)
        else:
            logger.warning("cycle lost: %s", reason)
            self._failed(reason)
        self.busy = False

    def _declined(self, message: wire.NothingToDo) -> None:
        self._stats.plans_declined += 1
        self._stats.plan_s.add(message.plan_seconds)
        self._stats.imbalance_predicted = message.imbalance_now
        self.breaker.succeeded()
        logger.debug("nothing to do: %s", message.reason)

    def _failed(self, reason: str) -> None:
        self._stats.pauses += self.breaker.failed(reason)

    def _ask(self, kind: PlanKind, in_force: InForce) -> bool:
        new = max(self._config.window.sub_windows, self._asked_window - self._heard_window)
        windows = list(self._windows)[-new:]
        if not windows:  # forgotten on the main thread in this moment
            return False
        self._request += 1
        arrays: wire.Arrays = {
            "placement": in_force.placement.physical_to_logical_map,
            "loads": np.stack([seen.expert_loads for seen in windows]).astype(np.float32),
            "table": in_force.table,
        }
        self.rest()
        message = wire.PlanRequest(
            request=self._request,
            kind=kind,
            epoch=in_force.epoch,
            step=windows[-1].step,
            dispatch_kind=self._form.dispatch.kind,
            dispatch_width=self._form.dispatch.width,
            staging_experts=self._form.staging_experts,
            steps_per_sub_window=self._config.window.sub_window_steps,
            measured=self.measure(),
            arrays=wire.specs(arrays),
            observe_only=self._observing,
            window_epochs=[seen.epoch for seen in windows],
            window_steps=[seen.step for seen in windows],
        )
        return self._link.request(message, arrays)
