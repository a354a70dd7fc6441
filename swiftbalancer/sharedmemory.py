"""Files in memory that all ranks of one host share, without a name once all have them open."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from torch._C._distributed_c10d import Store

SHARED_MEMORY = Path("/dev/shm")
LINE = 128
"""What different ranks write begins at multiples of this many bytes: two cache lines, fetched together."""
MARK_BYTES = 16
WORD = 8


class Closable(Protocol):
    """What is made of such a file; closes it."""

    def close(self) -> None: ...


Made = TypeVar("Made", bound=Closable)


class Presence:
    """Tells which ranks have the file open: each holds a lock on a byte of it, which the system lets go of when the
    rank's process ends or closes the file."""

    def __init__(self, file: int, rank: int) -> None:
        self._file = file
        self._rank = rank
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def is_gone(self, rank: int) -> bool:
        """Whether that rank's process has ended or closed the file."""
        if rank == self._rank:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True


def row_bytes(words: int) -> int:
    """From one row of so many words to the next."""
    return -(-WORD * words // LINE) * LINE


def open_shared(
    store: Store,
    all_agree: Callable[[bool], bool],
    make: Callable[[int], Made],
    *,
    rank: int,
    length: int,
    folder: Path | None = None,
) -> Made | None:
    """What `make` gives for a file, open and of `length` bytes, that all ranks have, or None on all of them, as when
    they are not on one host. The file begins with its mark; the rest of its first line is free.

    Collective: `store` is one of their own, and `all_agree` tells whether every rank said yes. The file has no name
    any more when this returns, so that nothing is left behind however the processes end.
    """
    made: Made | None = None
    path = _make_file(length, folder) if rank == 0 else None
    try:
        if rank == 0:
            store.set("board", f"{path or ''}\n{_mark(path)}")
        name, _, mark = store.get("board").decode().partition("\n")
        with contextlib.suppress(OSError):
            made = _open(Path(name), mark, make)
        if not all_agree(made is not None) and made is not None:
            made.close()
            made = None
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return made


def _make_file(length: int, folder: Path | None) -> Path | None:
    """A file of `length` bytes that begins with its mark; None where none can be made."""
    if folder is None:
        folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    try:
        file, name = tempfile.mkstemp(prefix="swiftbalancer-", dir=folder)
    except OSError:
        return None
    try:
        os.write(file, secrets.token_hex(MARK_BYTES // 2).encode())
        os.posix_fallocate(file, 0, length)  # no page may be missing when it is written
    except OSError:
        os.unlink(name)
        return None
    finally:
        os.close(file)
    return Path(name)


def _mark(path: Path | None) -> str:
    return "" if path is None else path.read_bytes()[:MARK_BYTES].decode()


def _open(path: Path, mark: str, make: Callable[[int], Made]) -> Made | None:
    """What is made of that file, if it is the one with this mark: another host may have one of the same name."""
    if not mark:
        return None
    file = os.open(path, os.O_RDWR)
    try:
        if os.pread(file, MARK_BYTES, 0) == mark.encode():
            return make(file)
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None
