"""Faults of the carrier that brings experts to a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from swiftbalancer.transport.p2p import GlooCarrier
from swiftbalancer.transport.seam import Round
from tests.edges.fault import Fault, Place


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
