"""What runs on the main thread: the names of the calls it makes, and which of them may wait."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any


def calls_of(function: Callable[[], Any], before: Iterable[str] = ()) -> list[str]:
    """What the function calls, itself left out, beside what is known from `before`; in C marked by a `C`."""
    called = set(before)
    own = getattr(function, "__func__", function).__code__

    def note(frame: Any, event: str, value: Any) -> None:
        if event == "call" and frame.f_code is not own:
            called.add(frame.f_code.co_name)
        elif event == "c_call" and value is not sys.setprofile:
            called.add(f"C {value.__qualname__}")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return sorted(called)


def blocking(calls: Iterable[str]) -> set[str]:
    """Those of the calls that may wait for another process, for the device, or for time to pass."""
    words = re.compile(r"sleep|synchronize|\b(item|cpu|tolist|nonzero|numpy|recv|poll|select|join|wait\w*)$")
    return {call for call in calls if words.search(call)}
