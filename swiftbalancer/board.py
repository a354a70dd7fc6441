"""A board in memory that all ranks of one host share: each writes its row, and reads everybody's, without any call.

A row is rewritten every other turn. That is enough for ranks that write turn `n + 1` only once they have read all
rows of turn `n`: nobody can be two turns ahead of a reader.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from swiftbalancer.sharedmemory import LINE, WORD, Presence, open_shared, row_bytes

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
        stride = row_bytes(width + 2)
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
        self._presence = Presence(file, rank)

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
        return self._presence.is_gone(rank)

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
    return LINE + 2 * size * (row_bytes(width + 2) + WORD)


def open_board(
    store: Store, all_agree: Callable[[bool], bool], *, rank: int, size: int, width: int, folder: Path | None = None
) -> Board | None:
    """A board that all ranks have, or None on all of them; see `open_shared`."""
    make = functools.partial(Board, rank=rank, size=size, width=width)
    return open_shared(store, all_agree, make, rank=rank, length=num_bytes(size, width), folder=folder)
