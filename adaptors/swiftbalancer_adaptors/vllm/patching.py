"""Wrapping methods of vLLM's classes, once, so that the original stays reachable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Around = Callable[..., Any]


def wrap(owner: type, name: str, around: Around) -> bool:
    """Makes `owner.name(*args)` call `around(self, original, *args)`; False where `owner` has no such method.

    A method wrapped before is left as it is: plugins are loaded more than once in some processes.
    """
    if isinstance(owner.__dict__.get(name), functools.partialmethod):
        return True
    original = getattr(owner, name, None)
    if original is None:
        return False
    setattr(owner, name, functools.partialmethod(around, original))
    return True
