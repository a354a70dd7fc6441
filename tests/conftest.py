"""For all tests: no generated case is failed for being slow, since that says more about the machine; none inherits
another's switch interval, since thread after thread of ours would get on slowly on a busy machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("hypothesis") is not None:  # engines' own environments go without
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[float]:
    """The interpreter's own; whoever attaches a balancer shortens it."""
    before = sys.getswitchinterval()
    yield before
    sys.setswitchinterval(before)
