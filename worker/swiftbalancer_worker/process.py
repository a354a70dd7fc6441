"""How the worker process behaves towards its machine: out of the way, and never without its parent."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1


class Lifeline:
    """Says when the worker has to end: SIGTERM, Ctrl-C, or the death of the process that started it.

    A parent may vanish by SIGKILL, so three signs are watched: the end of stdin (its pipe closes with the
    parent), another parent process id, and, on Linux, a signal from the kernel.
    """

    def __init__(self, parent: int | None) -> None:
        self.wanted = True
        self.reason = ""
        self._parent = parent
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write):
            os.set_blocking(fd, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if parent is not None:
            _signal_on_parent_death()

    @property
    def fds(self) -> list[int]:
        """Readable when there may be a reason to end."""
        return [self._read] + ([] if self._parent is None else [sys.stdin.fileno()])

    def check(self, ready: Sequence[int]) -> None:
        """Looks at the signs; afterwards `wanted` is False and `reason` says why if the worker must end."""
        if self._read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 4096)
        if self._parent is None or not self.wanted:
            return
        stdin = sys.stdin.fileno()
        if (stdin in ready and not os.read(stdin, 4096)) or os.getppid() != self._parent:
            self.wanted, self.reason = False, "the engine process has ended"

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.wanted, self.reason = False, signal.Signals(number).name

    def close(self) -> None:
        """Gives the signals back; call once."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._read)
        os.close(self._write)


def step_aside(niceness: int, cpus: Sequence[int] | None) -> None:
    """Lowers our priority and keeps to `cpus`; a system that will not is logged, not fatal."""
    try:
        if niceness:
            os.nice(max(0, niceness - os.nice(0)))
        if cpus is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)
    except OSError as error:
        log.warning("cannot set niceness %d or cores %s: %s", niceness, cpus, error)


def _signal_on_parent_death() -> None:
    """SIGTERM when the thread that started us ends, which outlives us by design; Linux only (prctl(2))."""
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError) as error:
        log.debug("no signal on the parent's death: %s", error)
