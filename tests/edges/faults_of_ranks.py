"""Faults of a rank: its pace, its part in broadcasts, its maps, its hook, its life."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import msgspec
from typing_extensions import override

from swiftbalancer import bulk, sealed, wire
from swiftbalancer.cycle import LEADER, Phase
from swiftbalancer.incoming import Block
from swiftbalancer.leader import Leader
from tests.edges.fault import Fault, Place


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


class SpoiltBroadcast(Fault):
    """Something happens once to a plan that a rank has received."""

    rank = 1

    @override
    def begin(self, place: Place) -> None:
        real = vars(bulk)["receive_block"]

        def receive(*args: Any, **kwargs: Any) -> Block:
            block: Block = real(*args, **kwargs)
            if self.fired:
                return block
            self.fired = True
            return self.spoil(block)

        self.patch(bulk, "receive_block", receive)

    def spoil(self, block: Block) -> Block:
        raise NotImplementedError


class DamagedBroadcast(SpoiltBroadcast):
    """One byte of the plan changes on its way to a rank."""

    @override
    def spoil(self, block: Block) -> Block:
        spoilt = block.copy()
        spoilt[len(block) // 2] ^= 4
        return spoilt


class AnotherPlan(SpoiltBroadcast):
    """A rank receives a plan that is as valid as its peers' and differs in a figure."""

    @override
    def spoil(self, block: Block) -> Block:
        message, arrays = wire.decode(sealed.unpack(block))
        assert isinstance(message, wire.PlanReply)
        changed = msgspec.structs.replace(message, plan_seconds=message.plan_seconds + 1.0)
        return sealed.pack(wire.encode(changed, arrays))


class FailedBroadcast(SpoiltBroadcast):
    """The broadcast raises on a rank, after it has ended."""

    @override
    def spoil(self, block: Block) -> Block:
        raise RuntimeError("scripted: connection reset")


class LateBroadcast(Fault):
    """The leader begins a broadcast only when its peers have given up: after so long, or when the fault is over."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._over = threading.Event()

    @override
    def begin(self, place: Place) -> None:
        real = vars(bulk)["receive_block"]

        def late(*args: Any, **kwargs: Any) -> Block:
            if not self.fired:
                self.fired = True
                self._over.wait(self._seconds)
            block: Block = real(*args, **kwargs)
            return block

        self.patch(bulk, "receive_block", late)

    @override
    def disarm(self) -> None:
        self._over.set()
        super().disarm()


class RaisesOnce(Fault):
    """A function of ours raises on a rank where it otherwise would not."""

    rank = 1

    def __init__(self, owner: Any, name: str, error: Exception) -> None:
        super().__init__()
        self._owner, self._name, self._error = owner, name, error

    @override
    def begin(self, place: Place) -> None:
        real = vars(self._owner)[self._name]

        def failing(*args: Any, **kwargs: Any) -> Any:
            if not self.fired:
                self.fired = True
                # A new one: kept by the fault, it would keep the frames it has passed, and all they hold.
                raise type(self._error)(*self._error.args)
            return real(*args, **kwargs)

        self.patch(self._owner, self._name, failing)


class UnpackablePlan(RaisesOnce):
    """The leader has no room for the plan it is to broadcast."""

    rank = LEADER

    def __init__(self) -> None:
        super().__init__(sealed, "pack", MemoryError("scripted: no room"))


class UnaskedPlan(RaisesOnce):
    """The leader has no room for the loads it is to send to the worker."""

    rank = LEADER

    def __init__(self) -> None:
        super().__init__(Leader, "_ask", MemoryError("scripted: no room"))


class FailedCheck(RaisesOnce):
    """Looking at the plan raises what nobody expects."""

    def __init__(self) -> None:
        super().__init__(bulk, "check_block", KeyError("scripted"))


class FailedPreparation(RaisesOnce):
    """The engine cannot take the new maps."""

    def __init__(self) -> None:
        super().__init__(bulk.BulkLane, "_ready", MemoryError("scripted: no pinned memory left"))


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


class Calm(Fault):
    """Nothing at all, for many passes."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = 0

    @override
    def tick(self, place: Place) -> None:
        self._passes += 1
        self.fired = self._passes > 1000
