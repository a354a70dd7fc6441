"""Spreads what threads of ours compute over the engine's steps.

A step that is bound by the engine's own Python code gets longer by what our threads compute beside it, and a cycle
has some milliseconds of that. All at once it would show in one slow step; a share of each step does not show. Where
steps are bound by the device they do not get longer, and the share grows; where they do, it shrinks.

Threads go on in the middle of a step, to be done when the hook comes: whoever computes beside it makes it wait for
the interpreter lock. If a piece of work is more than a step's share, all ranks go on in the same one of several
steps: each lasts until the slowest rank is done, so that pieces beside different ones would lengthen them all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from swiftbalancer.stepcost import Cost, StepCost

LEAST_S = 0.0001
"""Of any span: what a thread does between two rests takes about as long, and waking it is not free."""
LONGEST_SPAN = 8
"""Steps. A power of two, as all spans are, so that those of ranks with other shares meet."""
PIECE_S = LEAST_S
"""Of a piece of work that has just begun."""
SHORTEST_STEP_S = 1e-6
"""What spans are counted in is never nothing."""
LONGEST_REST_S = 0.05
"""An engine without requests makes no steps, and disturbs nobody."""
RECOVERY = 1.05
"""A long step, with a prefill perhaps, must not let the short ones after it pay for much."""
MIDDLE = 0.5
"""Where in a step, counted from the hook before it, threads go on."""
CHANGE = 1.5
SELDOM = 4
"""Tellings, of which one is judged where the share is at its least."""
RANGE = 2.5
"""Times or parts of the share that was asked for: with five times, the hook itself waits for the interpreter lock too
often."""


class Throttle:
    """Our threads `rest` between two pieces of work; who tells how long steps took wakes nobody."""

    def __init__(self, share: float) -> None:
        """`share` of a step's time, for all our threads together; 1.0 or more bounds nothing.

        It is more while steps with work of ours are measured to be as short as others, and less while they are not;
        up to `RANGE` times.
        """
        self._asked = self.share = share if share < 1.0 else float("inf")
        self._step_s = float("inf")
        self.total_s = 0.0
        """Processor time of our threads so far; not exactly, here and below: they may overlook each other's."""
        self._used_s = self._seen_s = 0.0
        """In this span, and `total_s` at the last step that is known."""
        self._span_ends = 0.0
        """A span is one step, or as many as have room for `LEAST_S`; `time.perf_counter()` seconds, like all here."""
        self._went_in = 0.0
        """The end of the span in which a thread went on last."""
        self._turn = threading.Lock()
        self._span_s = self._allowed_s = float("inf")
        """How long this span is, and what threads may use in it."""
        self.last_hook: Callable[[], tuple[int, float]] | None = None
        """Its step, and when it ended."""
        self._cost = StepCost()
        self._tellings = 0
        self._own = threading.local()
        self._gate = threading.Lock()
        """Held while threads are to rest. Waiting for an event is the same with more Python around it."""
        self._gate.acquire()
        self._openings = 0

    @property
    def is_dear(self) -> bool:
        """Whether steps were seen to get longer by what our threads compute."""
        return self.share < self._asked

    def wants_to_know(self) -> bool:
        """Whether the steps of the next telling are to be judged. At its least, the share can only grow: that it may,
        is looked for now and then, since that is work, too."""
        self._tellings += 1
        return self.share > self._asked / RANGE or self._tellings % SELDOM == 0

    def steps_took(self, steps: Sequence[tuple[float, float]], *, judged: bool) -> None:
        """Seconds of each step since those told of last, and `total_s` at its end.

        Not `judged` are those beside which weights move, and others if it does not want to know.
        """
        mean_s = sum(step_s for step_s, _ in steps) / len(steps)
        self._step_s = max(min(mean_s, self._step_s * RECOVERY), SHORTEST_STEP_S)
        cost, seen_s, self._seen_s = self._cost, self._seen_s, steps[-1][1]
        if not judged:
            cost.others(len(steps))
            return
        for step_s, total_s in steps:
            used_s, seen_s = total_s - seen_s, total_s
            if used_s < LEAST_S / 2:
                cost.restful(step_s)
            else:
                self._adapt(cost.beside(step_s, used_s))

    def rest(self, *, hurry: bool = False) -> None:
        """Waits for the end of this span if its share is used up, maybe of more if it was exceeded; never for long.

        What a thread does next is taken for `PIECE_S` until it is known, so that not all of them go on at once; and
        for all that the span has where steps get longer by it: there two pieces beside one step would show.
        Who is in a `hurry` goes on in the next step, whatever was used.
        """
        own, now = self._own, time.thread_time()
        used_s = now - getattr(own, "counted_s", now)
        own.counted_s = now
        self.total_s += used_s
        if self.share == float("inf"):
            return
        taken_for_s = getattr(own, "taken_for_s", 0.0)
        if getattr(own, "span_ends", None) != self._span_ends:
            taken_for_s = min(taken_for_s, used_s)
        self._used_s += used_s - taken_for_s
        self._begin_span_if_over()
        if self._used_s >= self._allowed_s:
            if hurry:
                self._end_span_soon()
            self._wait()
        own.taken_for_s = max(self._allowed_s, PIECE_S) if self.is_dear else PIECE_S
        self._used_s += own.taken_for_s
        own.span_ends = self._went_in = self._span_ends

    def _wait(self) -> None:
        """Who have rested for as long as one may go on one after another, in a span each where spans are short: they
        often began to rest together."""
        at_the_latest = time.perf_counter() + LONGEST_REST_S
        while self._used_s >= self._allowed_s:
            is_short = self._span_s < LONGEST_REST_S
            until = self._span_ends if is_short else min(self._span_ends, at_the_latest)
            rest_s = until - time.perf_counter()
            if rest_s > 0 and self._gate.acquire(timeout=rest_s):
                self._gate.release()
                return
            self._begin_span_if_over()
            if time.perf_counter() >= at_the_latest and (self._is_first_in_span() or not is_short):
                self._used_s = 0.0
                return

    def _is_first_in_span(self) -> bool:
        """Whether no thread has gone on in this span; from now on one has."""
        with self._turn:
            is_first = self._went_in != self._span_ends
            self._went_in = self._span_ends
        return is_first

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
        """What was used beyond a span's share is made up for by the next ones, where steps get longer by it."""
        now = time.perf_counter()
        if now < self._span_ends:
            return
        spans = 1 + (now - self._span_ends) // self._span_s
        self._used_s = max(self._used_s - spans * self._allowed_s, 0.0) if self.is_dear else 0.0
        steps, share_s = 1, self.share * self._step_s
        while steps < LONGEST_SPAN and share_s * steps < LEAST_S:
            steps *= 2
        self._allowed_s, self._span_s = max(share_s * steps, LEAST_S), self._step_s * steps
        self._span_ends = now if self._span_s == float("inf") else self._a_span_after(now, steps)

    def _end_span_soon(self) -> None:
        """With the next step; nothing is left to be made up for."""
        self._span_ends = min(self._span_ends, self._a_span_after(time.perf_counter(), 1))
        self._used_s = min(self._used_s, self._allowed_s)

    def _a_span_after(self, now: float, steps: int) -> float:
        """A span of `steps` later, or up to half a span sooner or later, so that it is the middle of a step in which
        all ranks go on: one whose number is a multiple of `steps`."""
        if self.last_hook is None:
            return now + steps * self._step_s
        step, ended = self.last_hook()
        spans = round((step + (now - ended) / self._step_s - MIDDLE) / steps + 1)
        return ended + (spans * steps + MIDDLE - step) * self._step_s

    def _adapt(self, cost: Cost | None) -> None:
        if cost is Cost.FREE:
            self.share = min(self.share * CHANGE, self._asked * RANGE)
        elif cost is Cost.DEAR:
            self.share = max(self.share / CHANGE, self._asked / RANGE)
