"""A board in memory that all ranks of one host share: each writes its row, and reads everybody's, without any call.

A row is rewritten every other turn. That is enough for ranks that write turn `n + 1` only once they have read all
rows of turn `n`: nobody can be two turns ahead of a reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

SHARED_MEMORY = Path("/dev/shm")
LINE = 128
"""Rows begin at multiples of this many bytes: two cache lines, which processors fetch together."""
MARK_BYTES = 16
WORD = 8
MULTIPLIER = 0x9E3779B97F4A7C15
"""Of the checksum, a polynomial modulo 2**64: odd, so that no change of one word is lost."""
MASK = (1 << 64) - 1


class Board:
    """`[2, size]` rows of int64, and when each was written. One object per rank; of use from one thread.

    A row that is being written while it is read does not match its checksum and counts as not there yet, so that no
    order of memory accesses is assumed, which not every processor keeps.

    Writing and looking are part of the forward path, on which code runs cold: what is done here with plain words of
    memory takes half the time of `struct`, `zlib` and slices of a `mmap`, each another library's code.
    """

    def __init__(self, file: int, *, rank: int, size: int, width: int) -> None:
        """`file` is open for reading and writing and as long as `num_bytes`; it is the board's from now on."""
        self._file = file
        self._rank = rank
        self._size = size
        self._width = width
        self._memory = mmap.mmap(file, num_bytes(size, width))
        whole = memoryview(self._memory)
        self._words, self._sums, self._seconds = whole.cast("q"), whole.cast("Q"), whole.cast("d")
        stride = _stride(width)
        firsts = (LINE, LINE + size * stride)  # bytes at which rows begin: of even turns, of odd ones; likewise below
        self._own_first = tuple((first + rank * stride) // WORD for first in firsts)
        self._times = tuple((LINE + size * (2 * stride + WORD * parity)) // WORD for parity in (0, 1))
        self._all = tuple(whole[first : first + size * stride] for first in firsts)
        self._rows = tuple([rows[at : at + stride] for at in range(0, size * stride, stride)] for rows in self._all)
        self._own = tuple(rows[rank] for rows in self._rows)
        views: list[memoryview[Any]] = [*self._all, *self._rows[0], *self._rows[1]]
        self._views = [*views, self._words, self._sums, self._seconds, whole]
        self._written = 0
        """The turn this rank wrote last."""
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)  # the system lets go of it when this process ends

    def write(self, turn: int, values: Sequence[int], now: float | None = None) -> None:
        """This rank's row of `turn`, from 1; if that is timed, `now` is seconds of a clock that all ranks read
        alike."""
        words, at, checksum = self._words, self._own_first[turn & 1], turn
        if now is not None:
            self._seconds[self._times[turn & 1] + self._rank] = now
        words[at] = turn
        for value in values:
            at += 1
            words[at] = value
            checksum = (checksum * MULTIPLIER + value) & MASK
        self._sums[at + 1] = checksum
        self._written = turn

    def all_alike(self, turn: int) -> bool:
        """Whether this rank has written to `turn` last, and every other the same: by far the usual case, seen at
        once."""
        own = self._own[turn & 1].tobytes()
        return self._written == turn and self._all[turn & 1].tobytes() == own * self._size

    def read(self, turn: int) -> list[list[int] | None]:
        """Each rank's values of `turn`, one list where rows are alike; None where they are not there yet."""
        rows = [row.tobytes() for row in self._rows[turn & 1]]
        values: dict[bytes, list[int] | None] = {}
        for row in rows:
            if row not in values:
                values[row] = self._values(turn, row)
        return [values[row] for row in rows]

    def last_written(self, turn: int) -> float:
        """When the last rank wrote its row of `turn`, which is timed, once all have."""
        at = self._times[turn & 1]
        return max(self._seconds[at : at + self._size])

    def is_gone(self, rank: int) -> bool:
        """Whether that rank's process has ended or closed its board."""
        if rank == self._rank:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def close(self) -> None:
        """Peers see that this rank is gone; what it has written stays readable to them. Again: does nothing."""
        if self._memory.closed:
            return
        for view in self._views:
            view.release()
        self._memory.close()
        os.close(self._file)

    def _values(self, turn: int, row: bytes) -> list[int] | None:
        end = 1 + self._width
        found, *values = memoryview(row).cast("q")[:end]
        checksum = found
        for value in values:
            checksum = (checksum * MULTIPLIER + value) & MASK
        return values if found == turn and checksum == memoryview(row).cast("Q")[end] else None


def num_bytes(size: int, width: int) -> int:
    """Of a board for `size` ranks and rows of `width` integers; the first line is its mark's."""
    return LINE + 2 * size * (_stride(width) + WORD)


def open_board(
    store: Store, all_agree: Callable[[bool], bool], *, rank: int, size: int, width: int, folder: Path | None = None
) -> Board | None:
    """A board that all ranks have, or None on all of them, as when they are not on one host.

    Collective: `store` is one of their own, and `all_agree` tells whether every rank said yes. The file has no name
    any more when this returns, so that nothing is left behind however the processes end.
    """
    board: Board | None = None
    path = _make_file(num_bytes(size, width), folder) if rank == 0 else None
    try:
        if rank == 0:
            store.set("board", f"{path or ''}\n{_mark(path)}")
        name, _, mark = store.get("board").decode().partition("\n")
        with contextlib.suppress(OSError):
            board = _open(Path(name), mark, rank=rank, size=size, width=width)
        if not all_agree(board is not None) and board is not None:
            board.close()
            board = None
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return board


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


def _open(path: Path, mark: str, *, rank: int, size: int, width: int) -> Board | None:
    """The board in that file, if it is the one with this mark: another host may have one of the same name."""
    if not mark:
        return None
    file = os.open(path, os.O_RDWR)
    try:
        if os.pread(file, MARK_BYTES, 0) == mark.encode():
            return Board(file, rank=rank, size=size, width=width)
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _stride(width: int) -> int:
    return -(-WORD * (width + 2) // LINE) * LINE
