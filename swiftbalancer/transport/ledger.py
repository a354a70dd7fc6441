"""What the main thread and a mover's thread know of each other: status, bytes allowed, cancellation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from swiftbalancer.cycle import Fault
from swiftbalancer.dispatch import nothing
from swiftbalancer.errors import TransferFailed
from swiftbalancer.transport.seam import (
    ROUNDS_AT_ONCE,
    ChecksumMismatch,
    Lately,
    TransferState,
    TransferStatus,
    TransferTimedOut,
)
from swiftbalancer.transport.staging import CommitCopies


class Ledger:
    """Shared by two threads; a method that takes its lock does so for a few operations only.

    What the main thread asks in every step takes none: it reads one reference, or numbers that one side alone writes.
    """

    def __init__(self, nudge: Callable[[], None] = nothing) -> None:
        """`nudge` is called on the mover's thread when it begins to wait for bytes, and when the batch is over: the
        main thread need not look before. It may take no lock."""
        self._nudge = nudge
        self._changed = threading.Condition()
        self._status = TransferStatus(TransferState.IDLE)
        self._credit = 0
        self._wanted = 1
        """Credit that the thread waits for."""
        self._moved = 0
        self._waiting = self._was_waiting = False
        """Whether the thread waits for credit now, and did when the main thread last looked."""
        self._takes = self._takes_seen = self._waits = self._waits_seen = 0
        """Times it took credit, and had to wait for it, until now and until then."""
        self._cancelled = False
        self._commit = CommitCopies()

    # main thread

    def status(self) -> TransferStatus:
        return self._status

    def begin(self) -> None:
        """A batch was handed over; it may carry nothing before the first `grant`."""
        with self._changed:
            if self._status.state is not TransferState.FAILED:
                self._status = TransferStatus(TransferState.MOVING)
                self._credit = self._moved = 0

    @property
    def waits(self) -> bool:
        """Whether the thread waits for bytes to be allowed."""
        return self._waiting

    def grant(self, num_bytes: int) -> int:
        """Allows so many more; gives how many the thread waits for still, 0 if for none."""
        with self._changed:
            too_little = self._credit < self._wanted
            self._credit += num_bytes
            if too_little and self._credit >= self._wanted:
                self._changed.notify()  # not before: a thread woken for nothing would still take the interpreter lock
            return max(self._wanted - self._credit, 0) if self._waiting else 0

    def lately(self) -> Lately:
        """What the thread did since this was asked last."""
        waiting, waits, takes = self._waiting, self._waits, self._takes  # takes last: one in between must count
        carried = takes > self._takes_seen
        rested = waiting and self._was_waiting and not carried
        held_back = waiting or waits > self._waits_seen
        self._was_waiting, self._takes_seen, self._waits_seen = waiting, takes, waits
        return Lately(rested=rested, carried=carried, held_back=held_back)

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify()

    def commit_copies(self) -> CommitCopies:
        with self._changed:
            assert self._status.state is TransferState.DONE, "nothing is staged"
            return self._commit

    # mover's thread

    def take(self, costs: Sequence[int], deadline: float, *, at_once: int = 0) -> int:
        """Waits until bytes are allowed, then says how many of the next rounds (of `costs` bytes) may go: >= 1.

        It waits for as many rounds as have `at_once` bytes, but for `ROUNDS_AT_ONCE` at most. The last of them may
        overdraw the credit; what follows pays for it.
        """
        with self._changed:
            self._wanted = _for_rounds_at_once(costs, at_once)
            self._wait_for_credit(deadline)
            if self._cancelled:
                raise TransferFailed("cancelled")
            taken = 0
            while taken < len(costs) and self._credit > 0:
                self._credit -= costs[taken]
                taken += 1
            self._takes += 1
            return taken

    def _wait_for_credit(self, deadline: float) -> None:
        try:
            while self._credit < self._wanted and not self._cancelled:
                if not self._waiting:
                    self._waits += 1
                    self._waiting = True
                    self._nudge()
                if not self._changed.wait(max(deadline - time.monotonic(), 0.0)):
                    raise TransferTimedOut("the step-time bound left no room for this batch before its deadline")
        finally:
            self._waiting = False

    def moved(self, num_bytes: int) -> None:
        with self._changed:
            self._moved += num_bytes
            if self._status.state is TransferState.MOVING:
                self._status = TransferStatus(TransferState.MOVING, bytes_moved=self._moved)

    def done(self, commit: CommitCopies) -> None:
        with self._changed:
            self._commit = commit
            self._status = TransferStatus(TransferState.DONE, bytes_moved=self._moved)
        self._nudge()

    def fail(self, error: Exception) -> None:
        """Final: a failed ledger is not used for another batch."""
        reason = str(error) if isinstance(error, TransferFailed) else f"{type(error).__name__}: {error}"
        with self._changed:
            self._status = TransferStatus(TransferState.FAILED, _fault_of(error), reason, self._moved)
        self._nudge()

    @property
    def is_cancelled(self) -> bool:
        with self._changed:
            return self._cancelled


def _for_rounds_at_once(costs: Sequence[int], at_once: int) -> int:
    """Credit for the first rounds with `at_once` bytes, of which the last may overdraw it."""
    carried = before_last = 0
    for cost in costs[:ROUNDS_AT_ONCE]:
        before_last, carried = carried, carried + cost
        if carried >= at_once:
            break
    return before_last + 1


def _fault_of(error: Exception) -> Fault:
    if isinstance(error, ChecksumMismatch):
        return Fault.CHECKSUM
    if isinstance(error, TransferTimedOut):
        return Fault.TRANSFER_TIMEOUT
    return Fault.TRANSFER_FAILED
