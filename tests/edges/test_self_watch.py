"""The breaker and the stall watch, on a clock of their own."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import pytest
from msgspec import structs
from typing_extensions import override

from swiftbalancer.config import BreakerConfig
from swiftbalancer.cycle import Cycle, Phase, post
from swiftbalancer.leader import LONGEST_PAUSE_S, Breaker
from swiftbalancer.stats import Stats
from swiftbalancer.watch import ProgressWatch
from swiftbalancer.wire import Outcome
from tests.edges.test_observe import Landed, Scene


class Clock:
    """A clock that stands still until told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_breaker_pauses_after_failures_in_a_row_and_longer_each_time() -> None:
    clock = Clock()
    breaker = Breaker(BreakerConfig(max_failures=2, retry_after_s=10.0), clock)
    for pause_s in (10.0, 20.0, 40.0):
        assert not breaker.failed("x") and not breaker.open
        assert breaker.failed("x") and breaker.open
        clock.now += pause_s - 0.1
        assert breaker.open
        clock.now += 0.2
        assert not breaker.open, "it tries again later"


def test_a_success_between_failures_keeps_the_breaker_closed() -> None:
    breaker = Breaker(BreakerConfig(max_failures=2, retry_after_s=10.0), Clock())
    for _ in range(5):
        breaker.failed("x")
        breaker.succeeded()
    assert not breaker.open


def test_no_pause_is_longer_than_the_bound() -> None:
    clock = Clock()
    breaker = Breaker(BreakerConfig(max_failures=1, retry_after_s=3000.0), clock)
    for _ in range(5):
        breaker.failed("x")
        clock.now += LONGEST_PAUSE_S + 0.1
        assert not breaker.open


class ForgottenAtOnce(deque[Any]):
    """Sub-windows that `resume` on the main thread drops right after the bulk lane has put one in."""

    @override
    def append(self, loads: Any, /) -> None:
        super().append(loads)
        self.clear()


def test_loads_forgotten_while_a_plan_is_about_to_be_asked_for_do_not_end_balancing() -> None:
    scene = Scene()
    kept = scene.leader._windows
    scene.leader._windows = ForgottenAtOnce(maxlen=4)
    scene.land(0)
    assert not scene.leader.busy and not scene.link.requests
    scene.leader._windows = kept
    scene.land(1)
    assert scene.leader.busy and scene.brought == [1]


def test_a_stall_is_counted_once_and_reported_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    clock, stats = Clock(), Stats()
    watch = ProgressWatch(stats, rank=0, warn_after_s=5.0, clock=clock)
    moving = Cycle(rank=0, phase=Phase.MOVING, cycle=3, batch=1)
    votes = [post(moving, 1, 0, 0).posted, post(Cycle(rank=1, phase=Phase.MOVING, ready=True), 1, 0, 0).posted]
    watch.votes = [vote for vote in votes if vote is not None]
    reports = 0
    with caplog.at_level(logging.WARNING):
        for _ in range(401):
            clock.now += 0.1
            reports += watch.check(moving)
    assert reports == 4  # after 5, 10, 20 and 40 s
    assert stats.stalls == 1
    assert "cycle=3 made no progress for 5 s in phase MOVING, batch 1; not ready: ranks [0]" in caplog.text


def test_progress_and_idleness_are_no_stall() -> None:
    clock, stats = Clock(), Stats()
    watch = ProgressWatch(stats, rank=0, warn_after_s=5.0, clock=clock)
    clock.now += 100.0
    assert not watch.check(Cycle(rank=0, phase=Phase.IDLE))
    watch.progressed()
    assert not watch.check(Cycle(rank=0, phase=Phase.MOVING))
    assert watch.age_s == 0.0 and stats.stalls == 0


def test_no_plan_is_asked_for_by_who_rested_until_the_engine_wanted_none() -> None:
    scene = Scene()
    leader = scene.leader

    def rest() -> None:
        assert not leader.busy
        leader.paused = True

    leader.rest = rest
    scene.land(0)
    assert not leader.busy and not scene.link.requests


def test_cycles_that_drains_end_are_no_failures() -> None:
    scene = Scene(breaker={"max_failures": 1})
    drained = Outcome(1, "placement", False, "rank 0 asked for a drain", 0, 32, 0, 0, 1.4, {})
    for _ in range(3):
        scene.leader.busy = True
        scene.leader.finished(drained, shadow=False)
        assert not scene.leader.busy and not scene.leader.breaker.open
    scene.leader.finished(structs.replace(drained, reason="rank 1: checksum"), shadow=False)
    assert scene.leader.breaker.open


def test_a_request_that_cannot_be_made_leaves_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    with monkeypatch.context() as broken:
        broken.setattr(Landed, "expert_loads", property(lambda _: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            scene.land(0)
    assert not scene.leader.busy and not scene.link.requests
    scene.land(1)
    assert scene.link.requests[-1].kind == "placement", "what was due still is"
