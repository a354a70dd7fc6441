"""Transports on a device whose work lands late: reads and commits keep their order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer.device import DeviceLayer
from swiftbalancer.transport import Transport, Workplace
from tests.edges.ranks import run_ranks
from tests.edges.scripted_device import ScriptedEvent, ScriptedLayer
from tests.edges.transport_case import (
    DEADLINE_S,
    batch_of,
    carry_out,
    expert_bytes,
    place_on,
    reference_after,
    staged_gloo,
)

CHAIN = ((0, 0, 3), (0, 3, 1), (0, 1, 4), (0, 4, 2), (0, 2, 5))
"""Each move reads the slot the one before has just been committed to."""


def chain_on_scripted_device(make_layer: Callable[[int], DeviceLayer]) -> list[bytes]:
    """Runs CHAIN over 2 ranks, a batch per move, on devices that work late; gives what the last slot holds."""

    def body(rank: int, store: TCPStore) -> list[bytes]:
        plain = place_on(rank, store, size=2)
        place = Workplace(plain.weights, make_layer(rank), plain.groups, plain.limits)
        transport = Transport(place, lambda: staged_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        for number, move in enumerate(CHAIN):
            carry_out(place, transport, batch_of(move, batch=number))
        transport.close(DEADLINE_S)
        place.layer.synchronize()
        return expert_bytes(place.weights.slot(0, 2))

    return list(run_ranks(2, body)[1])


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_reads_what_the_commit_before_it_wrote_on_a_late_device(seed: int) -> None:
    held = chain_on_scripted_device(lambda rank: ScriptedLayer(seed * 10 + rank, hurry=0.1 * seed))
    assert held == reference_after(((0, 0, 5),), 2)[0, 5]


class ImpatientLayer(ScriptedLayer):
    """Its first event per batch, the one that marks the last commit, is believed to have run at once."""

    @override
    def event(self, *, timing: bool = False) -> Any:
        event = super().event()
        if threading.current_thread().name.startswith("swiftbalancer"):
            return event
        assert isinstance(event, ScriptedEvent)
        return Believed(event)


class Believed:
    """An event nobody waits for."""

    def __init__(self, event: ScriptedEvent) -> None:
        self.event = event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


def test_without_the_wait_for_the_commit_the_late_device_shows_it() -> None:
    def make(rank: int) -> DeviceLayer:
        layer = ImpatientLayer(rank, hurry=0.0)
        layer.record = lambda event, stream=None: ScriptedLayer.record(layer, getattr(event, "event", event), stream)  # type: ignore[method-assign]
        return layer

    assert chain_on_scripted_device(make) != reference_after(((0, 0, 5),), 2)[0, 5]
