"""`jit`: numba's compiler with an on-disk cache, or nothing at all where numba is not installed."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])

try:
    import numba
except ImportError:
    COMPILED = False
else:
    COMPILED = not numba.config.DISABLE_JIT


def jit(function: Function) -> Function:
    """`function`, for calls from Python: compiled on its first call if numba is there, and kept on disk.

    No `fastmath`: it would let the compiler reorder sums, and plans would depend on whether it is installed.
    """
    if not COMPILED:
        return function
    outer = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(Path(outer or _user_cache()) / f"swiftbalancer-{_digest()}")
    try:
        return cast(Function, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # nowhere to write: compile in every process
        return cast(Function, numba.njit(error_model="numpy")(function))
    finally:
        numba.config.CACHE_DIR = outer


def jit_inner(function: Function) -> Function:
    """`function`, for calls from compiled functions only.

    It has no interface to Python and no place on disk of its own; it is part of what its callers keep there.
    """
    return _without_interface(function, inlined=False)


def jit_inlined(function: Function) -> Function:
    """Like `jit_inner`, for functions of inner loops, which must not make arrays: their code goes into every caller.

    Calls that pass named tuples of arrays are not inlined by themselves, and every array taken from a tuple is
    counted as in use and released again unless that is switched off; both took longer than the sums.
    """
    return _without_interface(function, inlined=True)


def _without_interface(function: Function, *, inlined: bool) -> Function:
    if not COMPILED:
        return function
    plain = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(Function, numba.njit(**plain, forceinline=inlined, _nrt=not inlined)(function))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@functools.cache
def _digest() -> str:
    """Fingerprint of all kernels.

    numba invalidates a cached function when its own file changes, but not when a function it calls in another
    file does; a folder per state of all files cannot be stale.
    """
    state = hashlib.blake2b(digest_size=6)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        state.update(source.read_bytes())
    return state.hexdigest()
