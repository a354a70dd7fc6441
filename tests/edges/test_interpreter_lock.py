"""The engine's main thread gets the interpreter lock sooner than threads of ours."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

import pytest

from swiftbalancer.interpreter_lock import (
    MAIN_SLACK_NS,
    OUR_SLACK_NS,
    SWITCH_INTERVAL_S,
    favour_this_thread,
)
from swiftbalancer.lane import Lane

PR_GET_TIMERSLACK = 30
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")


def timer_slack() -> int:
    slack: int = ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0)
    return slack


def on_thread(work: Callable[[], None]) -> None:
    """So that the slack of pytest's own thread stays."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_favoured_thread_wakes_at_once_to_ask_for_the_lock() -> None:
    seen: list[int] = []

    def main() -> None:
        favour_this_thread()
        seen.append(timer_slack())

    on_thread(main)
    assert seen == [MAIN_SLACK_NS]
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)


def test_a_lane_of_a_favoured_thread_is_not_favoured() -> None:
    seen: list[int] = []

    def main() -> None:
        favour_this_thread()
        lane = Lane("test", on_error=lambda _error: seen.append(-1))
        lane.put(lambda: seen.append(timer_slack()))
        assert lane.close(5.0)

    on_thread(main)
    assert seen == [OUR_SLACK_NS]


def test_an_interval_that_is_shorter_already_stays() -> None:
    sys.setswitchinterval(0.000002)
    on_thread(favour_this_thread)
    assert sys.getswitchinterval() == pytest.approx(0.000002)
