"""Spreads what threads of ours compute over the engine's steps.

A step that is bound by the engine's own Python code gets longer by what our threads compute beside it, and a cycle
has some milliseconds of that. All at once it would show in one slow step; a share of each step does not show. Where
steps are bound by the device they do not get longer, and the share may grow. Threads go on in the middle of a step,
to be done when the hook comes: whoever computes beside it makes it wait for the interpreter lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

LEAST_S = 0.0001
"""Of any step: what a thread does between two rests takes about as long, and waking it is not free."""
PIECE_S = LEAST_S
"""Of a piece of work that has just begun."""
LONGEST_REST_S = 0.05
"""An engine without requests makes no steps, and disturbs nobody."""
RECOVERY = 1.05
"""A long step, with a prefill perhaps, must not let the short ones after it pay for much."""
SAMPLES = 48
"""Steps with work of ours between two changes of the share."""
FEWEST = 16
"""Steps without, to compare with."""
FREE, DEAR = 0.3, 0.6
"""Seconds that a step gets longer per second of ours: below the first the share grows, above the other it shrinks."""
MIDDLE = 0.5
"""Where in a step, counted from the hook before it, threads go on."""
CHANGE = 1.5
MOST = 2.5
"""Times the share that was asked for: with five times, the hook itself waits for the interpreter lock too often."""


class Throttle:
    """Our threads `rest` between two pieces of work; who tells how long steps took wakes nobody."""

    def __init__(self, share: float) -> None:
        """`share` of a step's time, for all our threads together; 1.0 or more bounds nothing.

        It is exceeded, at most by `MOST`, while steps with work of ours are measured to be as short as others.
        """
        self._asked = self.share = share if share < 1.0 else float("inf")
        self._step_s = float("inf")
        self.total_s = 0.0
        """Processor time of our threads so far; not exactly, here and below: they may overlook each other's."""
        self._used_s = self._seen_s = 0.0
        """In this span, and `total_s` at the last step that is known."""
        self._span_ends = 0.0
        """A span is about as long as a step; `time.perf_counter()` seconds, like all here."""
        self.hook_ended: Callable[[], float] | None = None
        """When the hook ended last."""
        self._with: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        """Of steps with work of ours: their time, and that work."""
        self._without: deque[float] = deque(maxlen=SAMPLES)
        self._own = threading.local()
        self._gate = threading.Lock()
        """Held while threads are to rest. Waiting for an event is the same with more Python around it."""
        self._gate.acquire()
        self._openings = 0

    def steps_took(self, seconds: float, steps: int, total_s: float) -> None:
        """So many steps ended since those told of last; at their end our threads had `total_s`, used in any of
        them."""
        step_s = seconds / steps
        self._step_s = min(step_s, self._step_s * RECOVERY)
        used_s, self._seen_s = (total_s - self._seen_s) / steps, total_s
        if used_s >= LEAST_S / 2:
            self._with.append((step_s, used_s))
        else:
            self._without.append(step_s)

    def rest(self) -> None:
        """Waits for the end of this span if its share is used up, but never for long.

        What a thread does next is taken for `PIECE_S` until it is known, so that not all of them go on at once.
        """
        own, now = self._own, time.thread_time()
        used_s = now - getattr(own, "counted_s", now)
        own.counted_s = now
        self._begin_span_if_over()
        self._used_s += used_s - (PIECE_S if getattr(own, "span_ends", None) == self._span_ends else 0.0)
        self.total_s += used_s
        if self._used_s >= max(self.share * self._step_s, LEAST_S):
            self._adapt()
            rest_s = min(self._span_ends - time.perf_counter(), LONGEST_REST_S)
            if rest_s > 0 and self._gate.acquire(timeout=rest_s):
                self._gate.release()
            self._begin_span_if_over()
        self._used_s += PIECE_S
        own.span_ends = self._span_ends

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While the main thread waits for our threads, they rest from nothing."""
        self.open()
        try:
            yield
        finally:
            self._openings -= 1
            if not self._openings:
                self._gate.acquire()

    def open(self) -> None:
        """For good: nobody rests any more. On the main thread only."""
        self._openings += 1
        if self._openings == 1:
            self._gate.release()

    def _begin_span_if_over(self) -> None:
        now = time.perf_counter()
        if now >= self._span_ends:
            self._used_s = 0.0
            self._span_ends = self._a_step_after(now)

    def _a_step_after(self, now: float) -> float:
        """A step later, or as much sooner or later, half a step at most, as makes it the middle of one."""
        step_s = self._step_s
        if self.hook_ended is None or step_s == float("inf"):
            return now + step_s
        hook_ended = self.hook_ended()
        steps = round((now - hook_ended) / step_s + 1 - MIDDLE)
        return hook_ended + (steps + MIDDLE) * step_s

    def _adapt(self) -> None:
        """By medians: a prefill among the steps must not count for much. On a thread of ours."""
        if len(self._with) < SAMPLES or len(self._without) < FEWEST:
            return
        samples, without = tuple(self._with), tuple(self._without)  # one look: another thread may add to them
        longer_s = median(step_s for step_s, _ in samples) - median(without)
        cost = longer_s / median(used_s for _, used_s in samples)
        if cost < FREE:
            self.share = min(self.share * CHANGE, MOST * self._asked)
        elif cost > DEAR:
            self.share = max(self.share / CHANGE, self._asked)
        self._with.clear()
