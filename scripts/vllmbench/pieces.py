"""What our threads compute beside each step of the vLLM benchmark: which steps that lengthens, and by how much."""

from __future__ import annotations

import bisect
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

Piece = tuple[float, float, float, str]
"""From and to, in seconds of the monotonic clock, which all processes of a host share; processor time, milliseconds;
where in our code it began and ended."""
INNER = ("pieces", "throttle", "steptimes", "lane")
"""Modules that pass a rest on."""
LONGEST_S = 0.2
"""No piece of interest takes longer; one that waits for something may."""


class Pieces:
    """Of one process: what a thread of ours did from one rest, or its job's beginning, to the next, or its end."""

    def __init__(self) -> None:
        self.seen: list[Piece] = []
        self._own = threading.local()

    def watch(self) -> None:
        """To be called before a balancer is made."""
        from swiftbalancer.lane import Lane
        from swiftbalancer.throttle import Throttle
        from swiftbalancer.transport.batch_run import BatchRun

        rest, put, run = Throttle.rest, Lane.put, BatchRun.run

        def watched_rest(throttle: Throttle, *, hurry: bool = False) -> None:
            place = _place()
            self._end(place)
            rest(throttle, hurry=hurry)
            self._begin(place)

        setattr(Throttle, "rest", watched_rest)  # noqa: B010 - a method is not assigned otherwise

        def watched_put(lane: Lane, job: Callable[[], None]) -> None:
            name = _place()  # who asks for it, since jobs have no names
            put(lane, lambda: self._around(job, name))

        setattr(Lane, "put", watched_put)  # noqa: B010
        setattr(BatchRun, "run", lambda batch, ledger: self._around(lambda: run(batch, ledger), "a batch"))  # noqa: B010

    def _around(self, job: Callable[[], Any], name: str) -> Any:
        self._begin(f"{name} begins")
        try:
            return job()
        finally:
            self._end("its end")

    def _begin(self, place: str) -> None:
        self._own.began = time.perf_counter(), time.thread_time(), place

    def _end(self, place: str) -> None:
        began = getattr(self._own, "began", None)
        if began is not None:
            cpu_ms = (time.thread_time() - began[1]) * 1e3
            self.seen.append((began[0], time.perf_counter(), cpu_ms, f"{began[2]} to {place}"))
            self._own.began = None


def _place() -> str:
    """Module, function and line of the code of ours that rests, or gives a lane a job."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"].rpartition(".")[2] in INNER:
        frame = frame.f_back
    if frame is None:
        return "nowhere"
    return f"{frame.f_globals['__name__'].rpartition('.')[2]}.{frame.f_code.co_name}:{frame.f_lineno}"


def computed_ms(pieces: list[Piece], begin_s: float, end_s: float) -> float:
    """Processor time of `pieces`, ordered by their beginnings, between two times; spread evenly over each."""
    first = bisect.bisect_left(pieces, (begin_s - LONGEST_S,))
    total = 0.0
    for began_s, ended_s, cpu_ms, _ in pieces[first : bisect.bisect_right(pieces, (end_s,))]:
        inside_s = min(ended_s, end_s) - max(began_s, begin_s)
        total += cpu_ms * max(inside_s, 0.0) / max(ended_s - began_s, 1e-9)
    return total
