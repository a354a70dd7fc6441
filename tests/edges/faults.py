"""Faults to inject into a rank of the synthetic engine, one small class each.

A fault is armed on every rank after the same pass; it acts on the rank it is meant for, and says when it has fired.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from swiftbalancer import bulk
from swiftbalancer.balancer import Balancer
from swiftbalancer.cycle import LEADER, Phase, Vote
from swiftbalancer.link import WorkerLink
from swiftbalancer.transport.p2p import GlooCarrier
from swiftbalancer.transport.seam import Round


@dataclass(frozen=True)
class Place:
    """Where a fault acts."""

    rank: int
    balancer: Balancer
    control: Path
    """The file a scripted worker looks at."""

    @property
    def link(self) -> WorkerLink:
        assert self.balancer._leader is not None
        link = self.balancer._leader._link
        assert isinstance(link, WorkerLink)
        return link


class Fault:
    """Nothing goes wrong; the base of all."""

    rank = LEADER

    def __init__(self) -> None:
        self.fired = False
        self.skips_hook = False
        """Whether the rank is not to call the balancer after this pass."""
        self._undo: list[Callable[[], None]] = []

    def arm(self, place: Place) -> None:
        """On every rank."""
        if place.rank == self.rank:
            self.begin(place)

    def begin(self, place: Place) -> None:
        """On the rank it is meant for, once."""

    def tick(self, place: Place) -> None:
        """On the rank it is meant for, before each call of the hook while armed."""

    def disarm(self) -> None:
        """On every rank."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def patch(self, owner: Any, name: str, value: Any) -> Any:
        """Sets an attribute until `disarm`; the old value."""
        old = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, old))
        return old


# -- the worker -----------------------------------------------------------------------------------------------


class SignalWorker(Fault):
    """The worker process gets a signal: SIGKILL ends it, SIGSTOP makes it silent."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self._number = number

    @override
    def begin(self, place: Place) -> None:
        pid = place.link.worker_pid
        assert pid is not None
        os.kill(pid, self._number)
        self.fired = True


class KillWorkerAtWork(Fault):
    """SIGKILL while a request is at the worker."""

    @override
    def tick(self, place: Place) -> None:
        pid = place.link.worker_pid
        if not self.fired and place.link._mailbox.outstanding is not None and pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.fired = True


class ScriptWorker(Fault):
    """The scripted worker commits an offence at its next answer."""

    def __init__(self, offence: str) -> None:
        super().__init__()
        self._offence = offence

    @override
    def begin(self, place: Place) -> None:
        draft = place.control.with_suffix(".draft")
        draft.write_text(self._offence)
        draft.rename(place.control)

    @override
    def tick(self, place: Place) -> None:
        self.fired = self.fired or not place.control.exists()


class RemoveEndpoint(Fault):
    """The socket's folder vanishes, and with the worker's death the connection too."""

    @override
    def begin(self, place: Place) -> None:
        endpoint, pid = place.link.endpoint, place.link.worker_pid
        assert endpoint is not None and pid is not None
        shutil.rmtree(Path(endpoint.removeprefix("ipc://")).parent)
        os.kill(pid, signal.SIGKILL)
        self.fired = True


# -- ranks ----------------------------------------------------------------------------------------------------


class SlowRank(Fault):
    """A rank's host sleeps once, in a given phase."""

    rank = 1

    def __init__(self, phase: Phase, seconds: float) -> None:
        super().__init__()
        self._phase, self._seconds = phase, seconds

    @override
    def tick(self, place: Place) -> None:
        if not self.fired and place.balancer.phase is self._phase:
            time.sleep(self._seconds)
            self.fired = True


class DamagedBroadcast(Fault):
    """One byte of the plan changes on its way to a rank."""

    rank = 1

    @override
    def begin(self, place: Place) -> None:
        real = vars(bulk)["receive_block"]

        def damaged(*args: Any, **kwargs: Any) -> bytes:
            block = bytearray(real(*args, **kwargs))
            if not self.fired:
                block[len(block) // 2] ^= 4
                self.fired = True
            return bytes(block)

        self.patch(bulk, "receive_block", damaged)


class FailedBroadcast(Fault):
    """The broadcast raises on a rank, after it has ended."""

    rank = 1

    @override
    def begin(self, place: Place) -> None:
        real = vars(bulk)["receive_block"]

        def failing(*args: Any, **kwargs: Any) -> bytes:
            block: bytes = real(*args, **kwargs)
            if not self.fired:
                self.fired = True
                raise RuntimeError("scripted: connection reset")
            return block

        self.patch(bulk, "receive_block", failing)


class LateBroadcast(Fault):
    """The leader begins a broadcast only when its peers have given up."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    @override
    def begin(self, place: Place) -> None:
        real = vars(bulk)["receive_block"]

        def late(*args: Any, **kwargs: Any) -> bytes:
            if not self.fired:
                self.fired = True
                time.sleep(self._seconds)
            block: bytes = real(*args, **kwargs)
            return block

        self.patch(bulk, "receive_block", late)


class FailedPreparation(Fault):
    """The engine cannot take the new maps."""

    rank = 1

    @override
    def begin(self, place: Place) -> None:
        real = bulk.BulkLane._ready

        def failing(lane: bulk.BulkLane, *args: Any) -> Any:
            if not self.fired:
                self.fired = True
                raise MemoryError("scripted: no pinned memory left")
            return real(lane, *args)

        self.patch(bulk.BulkLane, "_ready", failing)


# -- transfers ------------------------------------------------------------------------------------------------


class CarrierFault(Fault):
    """Base of faults in the carrier of one rank; acts on the first calls that receive something."""

    rank = 1

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self._left = times

    @override
    def begin(self, place: Place) -> None:
        real = GlooCarrier.carry

        def faulty(carrier: GlooCarrier, rounds: Sequence[Round], deadline: float) -> None:
            arrivals = [op for ops in rounds for op in ops if not op.is_send]
            if self.fired or not arrivals:
                real(carrier, rounds, deadline)
                return
            self._left -= 1
            self.fired = self._left == 0
            self.act(lambda: real(carrier, rounds, deadline), arrivals)

        self.patch(GlooCarrier, "carry", faulty)

    def act(self, carry: Callable[[], None], arrivals: list[Any]) -> None:
        raise NotImplementedError


class FlippedBit(CarrierFault):
    """One bit of an arriving expert is another one than was sent."""

    @override
    def act(self, carry: Callable[[], None], arrivals: list[Any]) -> None:
        carry()
        data = arrivals[-1].data
        data[data.numel() // 2] ^= 16


class StuckTransfer(CarrierFault):
    """A rank takes no part in a batch until long after its deadline."""

    def __init__(self) -> None:
        super().__init__()
        self._release = threading.Event()

    @override
    def act(self, carry: Callable[[], None], arrivals: list[Any]) -> None:
        self._release.wait(60.0)

    @override
    def disarm(self) -> None:
        self._release.set()
        super().disarm()


class BrokenTransfer(CarrierFault):
    """The carrier raises."""

    @override
    def act(self, carry: Callable[[], None], arrivals: list[Any]) -> None:
        raise RuntimeError("scripted: link down")


# -- rounds ---------------------------------------------------------------------------------------------------


class LateVote(Fault):
    """One rank's vote comes seconds late; its passes do not."""

    rank = 1

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    @override
    def begin(self, place: Place) -> None:
        rounds = place.balancer._rounds
        real = rounds.post

        def post(vote: Vote) -> None:
            if not self.fired:
                self.fired = True
                rounds._lane.put(lambda: time.sleep(self._seconds))
            real(vote)

        self.patch(rounds, "post", post)


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
            votes = real_take()
            moving = all(v.phase == Phase.MOVING for v in votes)
            self._others_ready = moving and all(v.ready for r, v in enumerate(votes) if r != self.rank)
            return votes

        def post(vote: Vote) -> None:
            wanted = vote.phase == self._phase and (bool(vote.ready) or self._phase is Phase.IDLE)
            if wanted and not self.fired:
                self.fired = True
                rounds._done.clear()
                return
            real_post(vote)

        self.patch(rounds, "take", take)
        self.patch(rounds, "post", post)
        if self._phase is Phase.MOVING:
            self.patch(balancer, "_maps_ready", lambda batch: self._others_ready and real_ready(batch))


class SkippedHook(Fault):
    """A rank does not call the balancer after one pass, while it has voted for a commit."""

    rank = 1

    @override
    def tick(self, place: Place) -> None:
        self.skips_hook = not self.fired and place.balancer._cycle.voted_to_commit
        self.fired = self.fired or self.skips_hook


class DyingRank(Fault):
    """A rank's process ends in a given phase without a word."""

    rank = 1

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self._phase = phase

    @override
    def tick(self, place: Place) -> None:
        if place.balancer.phase is self._phase:
            os.kill(os.getpid(), signal.SIGKILL)


class CutLink(Fault):
    """The wire between two hosts is cut for a while, in a given phase; whoever carries it looks for the file."""

    def __init__(self, phase: Phase, seconds: float) -> None:
        super().__init__()
        self._phase, self._seconds = phase, seconds

    @override
    def tick(self, place: Place) -> None:
        balancer, posted = place.balancer, place.balancer._cycle.posted
        due = posted is not None and balancer._step + 1 >= posted.step + balancer.config.agreement.lag_steps
        if self.fired or balancer.phase is not self._phase or not due:
            return  # where a round is due the next is posted, so that one is on its way when the wire is cut
        cut = place.control.with_suffix(".cut")
        cut.touch()
        threading.Timer(self._seconds, cut.unlink).start()
        self.fired = True


class Calm(Fault):
    """Nothing at all, for many passes."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = 0

    @override
    def tick(self, place: Place) -> None:
        self._passes += 1
        self.fired = self._passes > 1000


def _offence(name: str) -> Callable[[], Fault]:
    return lambda: ScriptWorker(name)


TRANSIENT: dict[str, Callable[[], Fault]] = {
    "worker killed": lambda: SignalWorker(signal.SIGKILL),
    "worker killed at work": KillWorkerAtWork,
    "worker stopped": lambda: SignalWorker(signal.SIGSTOP),
    "worker exits": _offence("exits"),
    "worker out of memory": _offence("runs_out_of_memory"),
    "worker babbles": _offence("babbles"),
    "worker sends too many frames": _offence("sends_too_many_frames"),
    "worker sends an oversized header": _offence("sends_an_oversized_header"),
    "worker silent": _offence("is_silent"),
    "endpoint removed": RemoveEndpoint,
    "plan for another topology": _offence("plans_for_another_topology"),
    "plan with a wrong digest": _offence("names_a_wrong_digest"),
    "plan for a stale epoch": _offence("names_a_stale_epoch"),
    "plan that misroutes": _offence("sends_tokens_to_a_foreign_slot"),
    "answer to an older request": _offence("answers_an_older_request"),
    "rank slow while idle": lambda: SlowRank(Phase.IDLE, 1.0),
    "rank slow while receiving": lambda: SlowRank(Phase.RECEIVING, 1.0),
    "rank slow while moving": lambda: SlowRank(Phase.MOVING, 1.0),
    "vote late": lambda: LateVote(1.0),
    "broadcast damaged": DamagedBroadcast,
    "broadcast failed": FailedBroadcast,
    "maps cannot be prepared": FailedPreparation,
    "bit flipped in a transfer": FlippedBit,
    "transfer never completes": StuckTransfer,
    "transfer breaks": BrokenTransfer,
}
"""Faults that cost a cycle or less; balancing goes on after them."""

FATAL: dict[str, Callable[[], Fault]] = {
    "round lost while idle": lambda: LostRound(Phase.IDLE),
    "round lost in doubt": lambda: LostRound(Phase.MOVING),
    "hook skipped during a vote": SkippedHook,
    "broadcast beyond its deadline": lambda: LateBroadcast(6.0),
    "rank dies while idle": lambda: DyingRank(Phase.IDLE),
    "rank dies while moving": lambda: DyingRank(Phase.MOVING),
}
"""Faults after which balancing, or serving, ends on purpose."""

KNOWN: dict[str, Callable[[], Fault]] = {**TRANSIENT, **FATAL, "nothing for a while": Calm}
KNOWN["transfer breaks three times"] = functools.partial(BrokenTransfer, 3)
KNOWN |= {f"link cut while {p.name.lower()}": functools.partial(CutLink, p, 1.5) for p in Phase}
KNOWN["link cut for long"] = functools.partial(CutLink, Phase.MOVING, 8.0)
