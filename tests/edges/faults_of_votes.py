"""Faults of votes, and of the wire they travel on."""

from __future__ import annotations

import threading
import time
from typing import Any

from typing_extensions import override

from swiftbalancer.agreement import BoardRounds
from swiftbalancer.cycle import Cycle, Phase
from tests.edges.fault import Fault, Place

ANSWER_S = 20.0
"""How long the wire may take to be down."""


class LateVote(Fault):
    """One rank's vote comes seconds late; its passes do not."""

    rank = 1

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    @override
    def begin(self, place: Place) -> None:
        rounds = place.balancer._rounds
        owner, name = (rounds._board, "write") if isinstance(rounds, BoardRounds) else (rounds, "_gather")
        real = getattr(owner, name)

        def send(*vote: Any) -> None:
            if self.fired:
                real(*vote)
                return
            self.fired = True
            threading.Timer(self._seconds, real, vote).start()

        self.patch(owner, name, send)


class LostRound(Fault):
    """A round of a given phase never completes: one rank does not send its vote.

    In MOVING that rank holds its readiness back until all others have voted yes, so that nobody can know.
    """

    rank = 1

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self._phase = phase
        self._others_ready = False

    @override
    def begin(self, place: Place) -> None:
        balancer = place.balancer
        rounds = balancer._rounds
        real_post, real_take, real_ready = rounds.post, rounds.take, balancer._maps_ready

        def take() -> Any:
            over = real_take()
            moving = all(v.phase == Phase.MOVING for v in over.votes)
            self._others_ready = moving and all(v.ready for r, v in enumerate(over.votes) if r != self.rank)
            return over

        def post(cycle: Cycle) -> None:
            wanted = cycle.phase == self._phase and (cycle.ready or self._phase is Phase.IDLE)
            if wanted and not self.fired:
                self.fired = True
                if isinstance(rounds, BoardRounds):  # this rank knows which turn it waits for, as its peers do
                    vars(rounds._board)["write"] = lambda *_: None
                    real_post(cycle)
                    del vars(rounds._board)["write"]
                return
            real_post(cycle)

        self.patch(rounds, "take", take)
        self.patch(rounds, "post", post)
        if self._phase is Phase.MOVING:
            self.patch(balancer, "_maps_ready", lambda batch: self._others_ready and real_ready(batch))


class CutLink(Fault):
    """The wire between two hosts is cut for a while, in a given phase.

    Whoever carries the wire looks for a file, and makes another while it is down; passes wait for that.
    """

    def __init__(self, phase: Phase, seconds: float) -> None:
        super().__init__()
        self._phase, self._seconds = phase, seconds

    @override
    def tick(self, place: Place) -> None:
        balancer, step = place.balancer, place.balancer._step + 1
        free = balancer._cycle.posted is None and balancer._to_stage is None
        posts = free and balancer._next_round() <= step < balancer._close_at
        if self.fired or balancer.phase is not self._phase or not posts:
            return  # a round is posted now, so that one is on its way when the wire is cut
        cut, down = place.control.with_suffix(".cut"), place.control.with_suffix(".down")
        cut.touch()
        end = time.monotonic() + ANSWER_S
        while not down.exists() and time.monotonic() < end:
            time.sleep(0.01)
        self.fired = down.exists()
        threading.Timer(self._seconds, cut.unlink).start()
