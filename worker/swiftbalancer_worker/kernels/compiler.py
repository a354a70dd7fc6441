"""`jit`: numba's compiler with an on-disk cache, or nothing at all where numba is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])

try:
    import numba
except ImportError:
    COMPILED = False
else:
    COMPILED = not numba.config.DISABLE_JIT


def jit(function: Function) -> Function:
    """`function`, compiled on its first call if numba is there.

    No `fastmath`: it would let the compiler reorder sums, and plans would depend on whether it is installed.
    """
    if not COMPILED:
        return function
    return cast(Function, numba.njit(cache=True, error_model="numpy")(function))
