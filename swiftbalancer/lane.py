"""One background thread that runs jobs in order; its top is the only broad `except` of the engine side."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from swiftbalancer.interpreter_lock import stand_back

Job = Callable[[], None]
LAST_WAIT_S = 3.0
BACKLOG = 3
"""Jobs waiting from which on none rests for more than a step: they would only get more."""
FULL = 5
"""From which on none rests at all, since a recorder has few snapshots (`recorder.RING`)."""
logger = logging.getLogger(__name__)


class Rest(Protocol):
    """What `Throttle.rest` is."""

    def __call__(self, *, hurry: bool = False) -> None: ...


def join_at_exit(thread: threading.Thread) -> None:
    """Gives a thread stuck in a collective a last chance to end, when the process does.

    Its peers end then, too, which frees it. A daemon thread that comes back from C++ code after the interpreter
    has ended would abort the process (CPython before 3.14).
    """
    atexit.register(thread.join, LAST_WAIT_S)


class Lane:
    """Runs jobs one after another on a daemon thread. A job that raises is reported to `on_error`, and the next runs.

    Collectives of one group posted as jobs of one lane keep the order in which they were put, which is what makes
    them meet their peers'.
    """

    def __init__(
        self,
        name: str,
        *,
        on_error: Callable[[BaseException], None],
        on_start: Job | None = None,
        rest: Rest | None = None,
    ) -> None:
        """`on_start` runs first, `rest` before each job and whenever one asks."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._on_error = on_error
        self._on_start = on_start
        self._rest = rest
        self._held: list[Job] | None = None
        self._thread = threading.Thread(target=self._run, name=f"swiftbalancer-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Runs `job` after those before it; returns at once."""
        if self._held is None:
            self._jobs.put(job)
        else:
            self._held.append(job)

    def hold(self) -> None:
        """Keeps back what is put from now on until `release`; all three from the same thread.

        A thread that is woken asks for the interpreter lock, and gets it as soon as the one that woke it makes its
        next call into the device's library.
        """
        self._held = []

    def release(self) -> None:
        """Runs what was held back, and holds nothing back any more."""
        held, self._held = self._held, None
        for job in held or ():
            self._jobs.put(job)

    def rest(self) -> None:
        """Between two pieces of a job, on the lane: see `Throttle`. Does nothing while too many jobs wait."""
        waiting = self._jobs.qsize()
        if self._rest is not None and waiting < FULL:
            self._rest(hurry=waiting >= BACKLOG)

    def close(self, timeout_s: float) -> bool:
        """Ends the thread after the jobs already put; False if one of them is still running after `timeout_s`."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            join_at_exit(self._thread)
        return not self._thread.is_alive()

    def _run(self) -> None:
        stand_back()
        if self._on_start is not None:
            self._on_start()
        while (job := self._jobs.get()) is not None:
            try:
                self.rest()
                job()
            except Exception as error:
                logger.debug("job failed on %s", self._thread.name, exc_info=True)
                self._on_error(error)
