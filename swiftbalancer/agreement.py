"""Rounds: every rank says one vote, and learns all votes some steps later, without waiting in between.

Ranks of one host vote on a `Board` in memory they share: no thread, no call, nothing of the interpreter's lock beside
the forward pass. Others vote by all-gathers on a thread.
"""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod

import torch
from msgspec import Struct
from typing_extensions import override

from swiftbalancer.board import Board
from swiftbalancer.cycle import VOTE_SIZE, Cycle, RoundTaken, Step, Vote, says_nothing, step
from swiftbalancer.errors import AgreementLost
from swiftbalancer.groups import Group
from swiftbalancer.lane import Lane
from swiftbalancer.stats import TimeRing

POLL_S = 0.00005
"""Between two looks for a vote that is late."""
LOOK_S = 0.01
"""Between two looks whether the rank that is late still lives."""
TIMED_TURNS = 8
"""Every so many rounds on a board are timed: even that is work on the forward path."""


class Round(Struct, frozen=True):
    """A round that is over: the votes by rank, and what they make of the cycle that was posted.

    `ahead` holds as long as nothing else has changed that cycle; deciding it beside the forward pass saves the main
    thread most of what a round costs.
    """

    votes: tuple[Vote, ...]
    posted: Cycle | None = None
    ahead: Step | None = None
    error: str = ""


class Rounds(ABC):
    """At most one round is outstanding; all ranks post and take after the same steps."""

    waited_s = 0.0
    """Seconds the last `take` had to wait; 0.0 when the lag was long enough."""

    @abstractmethod
    def post(self, cycle: Cycle) -> None:
        """Starts a round with the vote in `cycle.posted`; every rank must post after the same step."""

    @abstractmethod
    def take(self) -> Round:
        """The round posted last.

        Waits for a late peer, because every rank must take a round at the same step; raises `AgreementLost` after
        the deadline or when a peer is gone.
        """

    looks_ahead = False
    """Whether `look_ahead` is worth it, for the round posted last."""

    def look_ahead(self) -> None:
        """Reads the votes that are there, in a step before the one that takes them, and decides where all ranks say
        the same, as before a commit: so that neither step does all of it."""
        assert not self.looks_ahead, "else there is something to do"

    @abstractmethod
    def close(self, timeout_s: float) -> None:
        """Ends what runs for the rounds; waits at most `timeout_s` for one in flight."""


class GatheredRounds(Rounds):
    """Asynchronous all-gathers of votes on a CPU group of our own.

    The collective runs on a thread of its own: the forward path pays for putting a job into a queue and, at the
    agreed step, for taking from another what is there already.
    """

    def __init__(self, group: Group, *, deadline_s: float, took_s: TimeRing | None = None) -> None:
        """`took_s` gets the time from each round's posting to its outcome."""
        self._group = group
        self._deadline_s = deadline_s
        self._took_s = TimeRing(512) if took_s is None else took_s
        self._own = torch.zeros(VOTE_SIZE, dtype=torch.int64)
        self._all = torch.zeros(group.size * VOTE_SIZE, dtype=torch.int64)
        # The same memory: calls of torch let go of the interpreter lock, and taking it back disturbs the main thread.
        self._own_values, self._all_values = self._own.numpy(), self._all.numpy().reshape(group.size, VOTE_SIZE)
        self._over: queue.SimpleQueue[Round] = queue.SimpleQueue()
        self._lane = Lane("rounds", on_error=self._failed)

    @override
    def post(self, cycle: Cycle) -> None:
        posted_at = time.perf_counter()
        self._lane.put(lambda: self._gather(cycle, posted_at))

    @override
    def take(self) -> Round:
        try:
            over = self._over.get_nowait()
        except queue.Empty:
            over = self._wait()
        else:
            self.waited_s = 0.0
        if over.error:
            raise AgreementLost(f"a round failed: {over.error}")
        return over

    @override
    def close(self, timeout_s: float) -> None:
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
        votes = _votes_of(self._all_values.tolist())
        self._over.put(Round(votes, cycle, step(cycle, RoundTaken(votes))))
        self._took_s.add(time.perf_counter() - posted_at)

    def _failed(self, error: BaseException) -> None:
        # The error itself would keep the collective's connections open.
        self._over.put(Round((), error=str(error) or repr(error)))


class BoardRounds(Rounds):
    """Votes on a board that all ranks of one host share. `take` looks at it; most often all rows are alike."""

    def __init__(self, board: Board, *, size: int, deadline_s: float, took_s: TimeRing | None = None) -> None:
        """`took_s` gets the time from some votes of this rank to the last rank's."""
        self._board = board
        self._size = size
        self._deadline_s = deadline_s
        self._took_s = TimeRing(512) if took_s is None else took_s
        self._turn = 0
        self._cycle = Cycle(rank=0)
        self._alike: tuple[Vote, ...] = ()
        """The votes of the round if all ranks vote like this one."""
        self._votes: tuple[Vote, ...] = ()
        """The votes of the round once all are there."""
        self._over: Round | None = None
        """The round if it was decided ahead."""
        self._posted_at: float | None = None
        """Of a round that is timed, until it is."""

    @override
    def post(self, cycle: Cycle) -> None:
        assert cycle.posted is not None
        self._turn += 1
        self._cycle, self._alike, self._votes = cycle, (cycle.posted,) * self._size, ()
        self._over = None
        # A drained rank says so in every round, and little is decided by that.
        self.looks_ahead = not (cycle.posted.drain or says_nothing((cycle.posted,)))
        self._posted_at = time.perf_counter() if self._turn % TIMED_TURNS == 0 else None
        self._board.write(self._turn, cycle.posted.to_list(), self._posted_at)

    @override
    def take(self) -> Round:
        self.waited_s = 0.0
        return self._over or self._look() or self._wait()

    @override
    def look_ahead(self) -> None:
        if self._found() is self._alike:
            self._over = self._decide(self._alike)

    def _look(self) -> Round | None:
        """The round if all votes are there."""
        votes = self._found()
        return self._decide(votes) if votes else None

    def _found(self) -> tuple[Vote, ...]:
        """The votes once all are there; empty until then."""
        if not self._votes:
            if self._board.all_alike(self._turn):
                self._votes = self._alike
            else:
                rows = [row for row in self._board.read(self._turn) if row is not None]
                self._votes = _votes_of(rows) if len(rows) == self._size else ()
        return self._votes

    def _decide(self, votes: tuple[Vote, ...]) -> Round:
        if self._posted_at is not None:
            self._took_s.add(max(self._board.last_written(self._turn) - self._posted_at, 0.0))
            self._posted_at = None
        return Round(votes, self._cycle, step(self._cycle, RoundTaken(votes)))

    @override
    def close(self, timeout_s: float) -> None:
        self._board.close()

    def _wait(self) -> Round:
        began = time.perf_counter()
        look_at = began + LOOK_S
        try:
            while True:
                time.sleep(POLL_S)
                over = self._look()
                if over is not None:
                    return over
                now = time.perf_counter()
                if now >= look_at:
                    self._raise_if_gone()
                    look_at = now + LOOK_S
                if now - began >= self._deadline_s:
                    raise AgreementLost(f"no outcome of a round within {self._deadline_s} s")
        finally:
            self.waited_s = time.perf_counter() - began

    def _raise_if_gone(self) -> None:
        gone = [rank for rank in range(self._size) if self._board.is_gone(rank)]
        rows = self._board.read(self._turn)  # once more: it may have voted before it went
        missing = [rank for rank in gone if rows[rank] is None]
        if missing:
            raise AgreementLost(f"a round failed: rank {missing[0]} has ended or closed its balancer")


def _votes_of(rows: list[list[int]]) -> tuple[Vote, ...]:
    """Equal votes become one object, so that the main thread looks at few however many ranks there are."""
    known: dict[tuple[int, ...], Vote] = {}
    votes: list[Vote] = []
    for row in rows:
        key = tuple(row)
        if key not in known:
            known[key] = Vote.from_list(row)
        votes.append(known[key])
    return tuple(votes)
