"""For all tests: no generated case is failed for being slow, since that says more about the machine."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("hypothesis") is not None:  # engines' own environments go without
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
