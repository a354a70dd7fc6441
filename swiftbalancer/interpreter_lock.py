"""Who waits how long for CPython's interpreter lock: the engine's main thread little, threads of ours longer.

A thread that wants the lock sleeps for the switch interval, then asks the holder to let go. Linux adds to that sleep
the thread's timer slack, 50 us unless told otherwise, which is more than the interval itself.
"""

from __future__ import annotations

import ctypes
import sys

SWITCH_INTERVAL_S = 0.000005
"""What a thread waits before it asks for the lock. CPython's default is 5 ms, a whole decode step."""
MAIN_SLACK_NS = 1
"""The least there is: 0 would mean the default."""
OUR_SLACK_NS = 50_000
"""Linux's default. Our threads start with that of the thread that starts them."""
_PR_SET_TIMERSLACK = 29
"""linux/prctl.h"""


def favour_this_thread() -> None:
    """Of the engine's main thread: it asks for the lock as soon as it can be made to."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
    set_timer_slack(MAIN_SLACK_NS)


def stand_back() -> None:
    """Of a thread of ours: it leaves the lock to its holder for longer."""
    set_timer_slack(OUR_SLACK_NS)


def set_timer_slack(nanoseconds: int) -> None:
    """Timer slack of the calling thread; does nothing where there is none, since it only saves time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(nanoseconds), 0, 0, 0)
