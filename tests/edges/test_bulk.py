"""Jobs off the forward path that fail: what the main thread hears of it, and what is let go."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from swiftbalancer import bulk, sealed
from swiftbalancer.bulk import MOST_LOST, BulkLane
from swiftbalancer.cycle import Announced, Event, Failed, Fault, GroupBroken
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import nothing
from tests.edges.engines import LONG_S, wait_for

FRAMES = [b"head", b"rows"]


class Gathering:
    """Notes when it is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Scene:
    """A lane of rank 0 of two, whose broadcasts fail as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inbox: deque[Event | None] = deque()
        self.gathering = Gathering()
        self.errors: list[Exception] = []
        setup: Any = SimpleNamespace(
            rank=0,
            layer=DeviceLayer.for_device("cpu"),
            binding=None,
            recorder=None,
            committed=None,
            group=SimpleNamespace(size=2, close=nothing),
            gathering=self.gathering,
            staging_experts=4,
            deadline_s=1.0,
            on_window=None,
            rest=lambda **_: None,
        )
        monkeypatch.setattr(bulk, "receive_block", self._receive_block)
        self.bulk = BulkLane(setup, self.inbox)

    def _receive_block(self, *_: Any, **__: Any) -> bytes:
        raise self.errors.pop(0)

    def receive(self, cycle: int, error: Exception) -> None:
        """Takes part in a broadcast that fails so."""
        self.errors.append(error)
        self.bulk.receive(cycle, 8, in_force=None)  # type: ignore[arg-type]

    def heard(self, number: int) -> list[Event | None]:
        wait_for(lambda: len(self.inbox) >= number)
        return list(self.inbox)


@contextmanager
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(monkeypatch)
    yield made
    made.bulk.close(LONG_S)


def test_a_group_that_carries_nothing_any_more_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_LOST == 2
    with scene(monkeypatch) as ranks:
        ranks.receive(1, RuntimeError("timed out"))
        ranks.receive(2, RuntimeError("closed"))
        lost = [Failed(cycle, Fault.BROADCAST_FAILED) for cycle in (1, 2)]
        assert ranks.heard(3) == [*lost, GroupBroken()]
        assert ranks.bulk.broken


def test_a_broadcast_lost_now_and_then_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with scene(monkeypatch) as ranks:
        ranks.receive(1, RuntimeError("timed out"))
        ranks.heard(1)
        monkeypatch.setattr(bulk, "receive_block", lambda *_, **__: b"damaged")
        ranks.bulk.receive(2, 8, in_force=None)  # type: ignore[arg-type]
        ranks.heard(2)
        monkeypatch.setattr(bulk, "receive_block", ranks._receive_block)
        ranks.receive(3, RuntimeError("timed out"))
        assert [type(event) for event in ranks.heard(3)] == [Failed] * 3
        assert not ranks.bulk.broken


def test_a_plan_that_cannot_be_packed_is_told_of_and_the_next_one_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with scene(monkeypatch) as ranks:
        with monkeypatch.context() as broken:
            broken.setattr(sealed, "pack", lambda _: 1 / 0)
            ranks.bulk.pack(FRAMES)
            assert ranks.heard(1) == [None]
        assert "division by zero" in ranks.bulk.pack_error
        ranks.bulk.pack(FRAMES)
        assert ranks.heard(2)[1] == Announced(len(sealed.pack(FRAMES)))


def assert_(holds: bool) -> None:
    assert holds


def test_what_is_busy_for_long_still_lets_go_of_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with scene(monkeypatch) as ranks:
        ranks.bulk.report(lambda: assert_(go_on.wait(LONG_S)))
        ranks.bulk.close(0.01)
        assert ranks.bulk.broken and not ranks.gathering.closed.is_set()
        go_on.set()
        assert ranks.gathering.closed.wait(LONG_S)
