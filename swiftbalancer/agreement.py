"""Rounds: every rank says one vote, and learns all votes two steps later, without waiting in between."""

from __future__ import annotations

import queue
import time

import torch
from msgspec import Struct

from swiftbalancer.cycle import VOTE_SIZE, Cycle, RoundTaken, Step, Vote, step
from swiftbalancer.errors import AgreementLost
from swiftbalancer.groups import Group
from swiftbalancer.lane import Lane
from swiftbalancer.stats import TimeRing


class Round(Struct, frozen=True):
    """A round that is over: the votes by rank, and what they make of the cycle that was posted.

    `ahead` holds as long as nothing else has changed that cycle; deciding it beside the forward pass saves the main
    thread most of what a round costs.
    """

    votes: tuple[Vote, ...]
    posted: Cycle | None = None
    ahead: Step | None = None
    error: str = ""


class Rounds:
    """Asynchronous all-gathers of votes on a CPU group of our own; at most one is outstanding.

    The collective runs on a thread of its own: the forward path pays for putting a job into a queue and, at the
    agreed step, for taking from another what is there already.
    """

    def __init__(self, group: Group, *, deadline_s: float, took_s: TimeRing | None = None) -> None:
        """`took_s` gets the time from each round's posting to its outcome."""
        self._group = group
        self._deadline_s = deadline_s
        self._took_s = TimeRing(512) if took_s is None else took_s
        self._own = torch.zeros(VOTE_SIZE, dtype=torch.int64)
        self._all = torch.zeros(group.size, VOTE_SIZE, dtype=torch.int64)
        # The same memory: calls of torch let go of the interpreter lock, and taking it back disturbs the main thread.
        self._own_values, self._all_values = self._own.numpy(), self._all.numpy()
        self._over: queue.SimpleQueue[Round] = queue.SimpleQueue()
        self._lane = Lane("rounds", on_error=self._failed)
        self.waited_s = 0.0
        """Seconds the last `take` had to wait; 0.0 when the lag was long enough."""

    def post(self, cycle: Cycle) -> None:
        """Starts a round with the vote in `cycle.posted`; every rank must post after the same step."""
        posted_at = time.perf_counter()
        self._lane.put(lambda: self._gather(cycle, posted_at))

    def take(self) -> Round:
        """The round posted last.

        Waits for a late peer, because every rank must take a round at the same step; raises `AgreementLost` after
        the deadline or when a peer is gone.
        """
        try:
            over = self._over.get_nowait()
        except queue.Empty:
            over = self._wait()
        else:
            self.waited_s = 0.0
        if over.error:
            raise AgreementLost(f"a round failed: {over.error}")
        return over

    def close(self, timeout_s: float) -> None:
        """Ends the thread; waits at most `timeout_s` for a round in flight."""
        self._lane.close(timeout_s)

    def _wait(self) -> Round:
        began = time.perf_counter()
        try:
            return self._over.get(timeout=self._deadline_s)
        except queue.Empty:
            raise AgreementLost(f"no outcome of a round within {self._deadline_s} s") from None
        finally:
            self.waited_s = time.perf_counter() - began

    def _gather(self, cycle: Cycle, posted_at: float) -> None:
        assert cycle.posted is not None
        self._own_values[:] = cycle.posted.to_list()
        work = self._group.all_gather(self._all, self._own)
        self._group.wait(work, self._deadline_s)
        votes = _read(self._all_values.tolist())
        self._over.put(Round(votes, cycle, step(cycle, RoundTaken(votes))))
        self._took_s.add(time.perf_counter() - posted_at)

    def _failed(self, error: BaseException) -> None:
        # The error itself would keep the collective's connections open.
        self._over.put(Round((), error=str(error) or repr(error)))


def _read(rows: list[list[int]]) -> tuple[Vote, ...]:
    """Equal votes become one object, so that the main thread looks at few however many ranks there are."""
    known: dict[tuple[int, ...], Vote] = {}
    votes: list[Vote] = []
    for row in rows:
        key = tuple(row)
        if key not in known:
            known[key] = Vote.from_list(row)
        votes.append(known[key])
    return tuple(votes)
