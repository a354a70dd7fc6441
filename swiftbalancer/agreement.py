"""Rounds: every rank says one vote, and learns all votes two steps later, without waiting in between."""

from __future__ import annotations

import threading
import time

import torch

from swiftbalancer.cycle import VOTE_SIZE, Vote
from swiftbalancer.errors import AgreementLost
from swiftbalancer.groups import Group
from swiftbalancer.lane import Lane


class Rounds:
    """Asynchronous all-gathers of votes on a CPU group of our own; at most one is outstanding.

    The collective runs on a thread of its own: the forward path pays for putting a list into a queue and, at the
    agreed step, for looking at an event that is set already.
    """

    def __init__(self, group: Group, *, deadline_s: float) -> None:
        self._group = group
        self._deadline_s = deadline_s
        self._own = torch.zeros(VOTE_SIZE, dtype=torch.int64)
        self._all = torch.zeros(group.size, VOTE_SIZE, dtype=torch.int64)
        self._votes: tuple[Vote, ...] = ()
        self._done = threading.Event()
        self._error = ""
        self._lane = Lane("rounds", on_error=self._failed)
        self.waited_s = 0.0
        """Seconds the last `take` had to wait; 0.0 when the lag was long enough."""

    def post(self, vote: Vote) -> None:
        """Starts a round; every rank must post after the same step."""
        self._done.clear()
        self._error = ""
        values = vote.to_list()
        self._lane.put(lambda: self._gather(values))

    def take(self) -> tuple[Vote, ...]:
        """The votes of the round posted last, by rank.

        Waits for a late peer, because every rank must take a round at the same step; raises `AgreementLost` after
        the deadline or when a peer is gone.
        """
        self.waited_s = 0.0
        if not self._done.is_set():
            began = time.perf_counter()
            arrived = self._done.wait(self._deadline_s)
            self.waited_s = time.perf_counter() - began
            if not arrived:
                raise AgreementLost(f"no outcome of a round within {self._deadline_s} s")
        if self._error:
            raise AgreementLost(f"a round failed: {self._error}")
        return self._votes

    def close(self, timeout_s: float) -> None:
        """Ends the thread; waits at most `timeout_s` for a round in flight."""
        self._lane.close(timeout_s)

    def _gather(self, values: list[int]) -> None:
        self._own.copy_(torch.tensor(values, dtype=torch.int64))
        work = self._group.all_gather(self._all, self._own)
        self._group.wait(work, self._deadline_s)
        self._votes = _read(self._all.tolist())
        self._done.set()

    def _failed(self, error: BaseException) -> None:
        self._error = str(error) or repr(error)  # the error itself would keep the collective's connections open
        self._done.set()


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
