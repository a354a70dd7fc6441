"""What steps took: noted on the forward path, worked out beside it.

Three want to know: the pacer, the throttle and the metrics. On the forward path, where code runs cold, telling them
took as long as all the rest that most steps with something to do have to do.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from msgspec import Struct

from swiftbalancer.pacer import Pacer
from swiftbalancer.stats import Stats, StepKind
from swiftbalancer.throttle import Throttle
from swiftbalancer.transport.seam import Lately

STILL = frozenset((StepKind.IDLE, StepKind.PLANNING))
"""No weights move beside the steps."""
TELL_EVERY_S = 0.25
"""Telling of a few steps takes a thread that has rested nearly as long as telling of many."""


class Stretch(Struct, frozen=True):
    """From one hook that had something to do to the next: that hook, those after it that had not, the last step."""

    kind: StepKind
    """What the hook at its beginning did; likewise the next."""
    host_s: float
    quiet: list[tuple[float, float, float]]
    """Of the hooks with nothing to do: seconds of the step before, and in the hook; and `threads_s` by then."""
    quiet_kind: StepKind
    quiet_work: Lately | None
    """What this rank's part of a batch did in the steps before them."""
    step_s: float
    """Seconds of the last step, whose hook begins the next stretch."""
    work: Lately | None
    """What the batch did in it."""
    paced: bool
    """Whether the pacer is to know of it."""
    threads_s: float
    """Processor time of our threads until its end, see `Throttle.total_s`."""


class StepTimes:
    """Of one rank. The main thread calls `note`, threads of ours the rest."""

    def __init__(self, stats: Stats, pacer: Pacer, throttle: Throttle) -> None:
        self.pacer = pacer
        self.throttle = throttle
        self._stats = stats
        self._noted: deque[Stretch] = deque()
        self.note = self._noted.append
        """Takes a stretch that is over."""
        self._at_work = threading.Lock()
        self._told_s = float("-inf")

    def rest(self, *, hurry: bool = False) -> None:
        """Between two pieces of work, see `Throttle.rest`. At times telling of steps is one more."""
        self.throttle.rest(hurry=hurry)
        if self._noted and self._is_due:
            self.work_out()
            self.throttle.rest(hurry=hurry)

    def adapt(self) -> None:
        """Changes the pace if need be; on the transfer's thread. By what is known, where telling of the last steps
        would lengthen the next."""
        if self._is_due or not self.throttle.is_dear:
            self.work_out()
        self.pacer.adapt()

    @property
    def _is_due(self) -> bool:
        return time.monotonic() >= self._told_s + TELL_EVERY_S

    def work_out(self) -> None:
        """Tells of what was noted. Leaves it to a thread that is at it."""
        if not self._noted or not self._at_work.acquire(blocking=False):
            return
        self._told_s = time.monotonic()
        try:
            judged = self.throttle.wants_to_know()
            while self._noted:
                self._tell(self._noted.popleft(), judged=judged)
        finally:
            self._at_work.release()

    def _tell(self, stretch: Stretch, *, judged: bool) -> None:
        """The pacer not of quiet steps that wait for votes; of the last one `paced` says."""
        host_s, quiet = self._stats.host_s, stretch.quiet
        host_s[stretch.kind].add(stretch.host_s)
        if quiet:
            steps_s, hooks_s, _ = zip(*quiet, strict=True)
            host_s[stretch.quiet_kind].add_all(hooks_s)
            if stretch.quiet_work is not None or stretch.quiet_kind is not StepKind.MOVING:
                self.pacer.observe_all(steps_s, stretch.quiet_work)
        if stretch.paced:
            self.pacer.observe(stretch.step_s, stretch.work)
        steps = [(step_s, threads_s) for step_s, _, threads_s in quiet]
        steps.append((stretch.step_s, stretch.threads_s))
        self.throttle.steps_took(steps, judged=judged and STILL.issuperset((stretch.kind, stretch.quiet_kind)))
