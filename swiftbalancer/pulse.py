"""Spreads what threads of ours compute over the engine's steps.

A step that is bound by the engine's own Python code gets longer by what our threads compute beside it, and a cycle
has some milliseconds of that. All at once it would show in one slow step; a share of each step does not show.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LEAST_S = 0.0001
"""Of any step: what a thread does between two rests takes about as long, and waking it is not free."""
LONGEST_REST_S = 0.05
"""An engine without requests makes no steps, and disturbs nobody."""
RECOVERY = 1.05
"""A long step, with a prefill perhaps, must not let the short ones after it pay for much."""


class Pulse:
    """The main thread calls `beat` after every step, our threads `rest` between two pieces of work."""

    def __init__(self, share: float) -> None:
        """`share` of a step's time, for all our threads together; 1.0 or more bounds nothing."""
        self._share = share if share < 1.0 else float("inf")
        self._step_s = self._allowed_s = float("inf")
        self._used_s = 0.0
        """Processor time of our threads since the last beat, not exactly: they may overlook each other's."""
        self._beats = 0
        self._own = threading.local()
        self._next_beat = threading.Condition()
        self._resting = 0
        self._is_open = 0

    def beat(self, step_s: float) -> None:
        """A step of `step_s` has ended."""
        self._step_s = min(step_s, self._step_s * RECOVERY)
        self._allowed_s = max(self._share * self._step_s, LEAST_S)
        self._used_s = 0.0
        self._beats += 1
        if self._resting:
            with self._next_beat:
                self._next_beat.notify_all()

    def rest(self) -> None:
        """Waits for the next beat if this one's share is used up, but never for long."""
        now = time.thread_time()
        self._used_s += now - getattr(self._own, "counted_s", now)
        self._own.counted_s = now
        if self._used_s < self._allowed_s or self._is_open:
            return
        beat = self._beats
        with self._next_beat:
            self._resting += 1
            self._next_beat.wait_for(lambda: self._beats != beat or self._is_open, LONGEST_REST_S)
            self._resting -= 1

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While the main thread waits for our threads, they rest from nothing."""
        self.open()
        try:
            yield
        finally:
            self._is_open -= 1

    def open(self) -> None:
        """For good: nobody rests any more."""
        with self._next_beat:
            self._is_open += 1
            self._next_beat.notify_all()
