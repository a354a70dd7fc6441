"""Faults of a rank: its pace, its part in broadcasts, its maps, its hook, its life."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import msgspec
from typing_extensions import override

from swiftbalancer import bulk, wire
from swiftbalancer.cycle import Phase
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


class AnotherPlan(Fault):
    """A rank receives a plan that is as valid as its peers' and differs in a figure."""

    rank = 1

    @override
    def begin(self, place: Place) -> None:
        real = vars(bulk)["receive_block"]

        def other(*args: Any, **kwargs: Any) -> bytes:
            block: bytes = real(*args, **kwargs)
            if self.fired:
                return block
            self.fired = True
            message, arrays = wire.decode(wire.unpack(block))
            assert isinstance(message, wire.PlanReply)
            changed = msgspec.structs.replace(message, plan_seconds=message.plan_seconds + 1.0)
            return wire.pack(wire.encode(changed, arrays))

        self.patch(bulk, "receive_block", other)


class FailedCheck(Fault):
    """Looking at the plan raises what nobody expects."""

    rank = 1

    @override
    def begin(self, place: Place) -> None:
        real = vars(bulk)["check_block"]

        def failing(*args: Any, **kwargs: Any) -> Any:
            if not self.fired:
                self.fired = True
                raise KeyError("scripted")
            return real(*args, **kwargs)

        self.patch(bulk, "check_block", failing)


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
