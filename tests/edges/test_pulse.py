"""Threads of ours compute for a share of a step, and for the rest of what they have to do in the next ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from swiftbalancer import pulse as module
from swiftbalancer.pulse import Pulse

STEP_S = 0.01
SHARE = 0.1
AGES_S = 60.0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody stops resting by himself."""
    monkeypatch.setattr(module, "LONGEST_REST_S", AGES_S)


@pytest.fixture
def pulse() -> Iterator[Pulse]:
    pulse = Pulse(SHARE)
    pulse.beat(STEP_S)
    yield pulse
    pulse.open()


def compute(seconds: float) -> None:
    """Processor time, however busy the machine is."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def start(*work: Callable[[], None]) -> tuple[threading.Thread, list[int]]:
    """Does `work` one after another on a thread; the list grows with what is done."""
    done: list[int] = []

    def run() -> None:
        for number, piece in enumerate(work):
            piece()
            done.append(number)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + AGES_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.usefixtures("patient")
def test_who_has_used_up_the_share_waits_for_the_next_step(pulse: Pulse) -> None:
    def work() -> None:
        pulse.rest()
        compute(2 * SHARE * STEP_S)

    thread, done = start(work, pulse.rest)
    until(lambda: bool(pulse._resting))
    assert done == [0]
    pulse.beat(STEP_S)
    thread.join(AGES_S)
    assert done == [0, 1]


@pytest.mark.usefixtures("patient")
def test_within_the_share_nobody_waits() -> None:
    pulse = Pulse(SHARE)
    pulse.beat(AGES_S)
    thread, done = start(pulse.rest, lambda: compute(0.001), pulse.rest)
    thread.join(AGES_S)
    assert done == [0, 1, 2]


@pytest.mark.usefixtures("patient")
def test_the_share_is_that_of_all_threads_together(pulse: Pulse) -> None:
    first, done = start(pulse.rest, lambda: compute(2 * SHARE * STEP_S), pulse.rest)
    until(lambda: bool(pulse._resting))
    second, others = start(pulse.rest)
    until(lambda: pulse._resting == 2)
    assert not others
    pulse.beat(STEP_S)
    first.join(AGES_S)
    second.join(AGES_S)
    assert done == [0, 1, 2] and others == [0]


def test_without_steps_a_rest_ends_by_itself(pulse: Pulse) -> None:
    thread, done = start(pulse.rest, lambda: compute(2 * SHARE * STEP_S), pulse.rest)
    thread.join(AGES_S)
    assert done == [0, 1, 2]


@pytest.mark.usefixtures("patient")
def test_one_long_step_does_not_lengthen_the_rests_of_short_ones(pulse: Pulse) -> None:
    pulse.beat(100 * STEP_S)
    thread, done = start(pulse.rest, lambda: compute(2 * SHARE * STEP_S), pulse.rest)
    until(lambda: bool(pulse._resting))
    assert done == [0, 1]
    pulse.open()
    thread.join(AGES_S)


@pytest.mark.usefixtures("patient")
def test_steps_that_have_become_long_allow_more(pulse: Pulse) -> None:
    for _ in range(100):
        pulse.beat(100 * STEP_S)
    thread, done = start(pulse.rest, lambda: compute(2 * SHARE * STEP_S), pulse.rest)
    thread.join(AGES_S)
    assert done == [0, 1, 2]


@pytest.mark.usefixtures("patient")
def test_nobody_rests_while_the_main_thread_waits(pulse: Pulse) -> None:
    with pulse.opened():
        thread, done = start(pulse.rest, lambda: compute(2 * SHARE * STEP_S), pulse.rest)
        thread.join(AGES_S)
    assert done == [0, 1, 2]
    pulse.beat(STEP_S)
    _, later = start(pulse.rest, lambda: compute(2 * SHARE * STEP_S), pulse.rest)
    until(lambda: bool(pulse._resting))
    assert later == [0, 1]
