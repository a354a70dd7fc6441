"""Says that kernels are being compiled, which takes minutes and looks like nothing going on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swiftbalancer_worker.kernels.compiler import COMPILED

KEPT = "compiling the planner's kernels, once on this machine (a minute or two)"
NOT_KEPT = "compiling the planner's kernels (a minute or two) in every run: name a folder for them in NUMBA_CACHE_DIR"
KERNELS = "swiftbalancer_worker.kernels"


def say(text: str) -> None:
    """One line on stderr, past a progress bar if one is drawn."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def compiling_is_told(tell: Callable[[str], None] = say) -> Iterator[None]:
    """Calls `tell` with one line if and when a kernel is compiled; those kept on disk are not."""
    if not COMPILED:
        yield
        return
    from numba.core import event

    event.Listener.register(Ear)
    with event.install_listener("numba:compile", Ear(tell)):
        yield


class Ear:
    """Hears of everything that numba compiles (its event API)."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._told = tell, False

    def notify(self, happened: Any) -> None:
        """Called by numba at the start and the end of each compilation."""
        kernel = happened.data["dispatcher"]
        if self._told or not happened.is_start or not kernel.py_func.__module__.startswith(KERNELS):
            return
        self._told = True
        self._tell(KEPT if kernel.stats.cache_path else NOT_KEPT)
