"""How rank 0 gets what every rank has counted in a sub-window: by a collective, or through memory they share."""

from __future__ import annotations

import functools
import mmap
import os
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch._C._distributed_c10d import Store

from swiftbalancer.cycle import LEADER
from swiftbalancer.groups import Group
from swiftbalancer.sharedmemory import LINE, WORD, Presence, open_shared, row_bytes

IntArray = NDArray[np.int64]
Rest = Callable[[], None]
RING = 4
"""Sub-windows that a rank may be ahead of rank 0."""
FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.04
"""Between two looks, each of which makes a step longer."""


class Gathering(Protocol):
    """Of one rank, on its bulk lane. Sub-windows come in order, all of them on every rank."""

    def gather(self, window: int, own: torch.Tensor, rest: Rest, /) -> IntArray | None:
        """Rank `r`'s `own` `[n]` int64 in row `r`, until this is called again; None on ranks that get nothing.

        `own` is free again when it returns; `rest` is called between pieces of work. Raises `RuntimeError` if a rank
        is gone or a deadline is missed: nothing can be gathered any more then.
        """

    def close(self) -> None: ...


class GroupGathering:
    """By all-gathers of a group of CPU tensors; every rank gets everything."""

    def __init__(self, group: Group, *, deadline_s: float) -> None:
        self._group = group
        self._deadline_s = deadline_s
        self._gathered: tuple[torch.Tensor, IntArray] | None = None
        """`[ranks * n]`, and the same memory as `[ranks, n]`: calls of torch take longer on a thread that rests
        between them."""

    def gather(self, _: int, own: torch.Tensor, rest: Rest, /) -> IntArray | None:
        rest()
        group = self._group
        if self._gathered is None:
            flat = torch.empty(group.size * len(own), dtype=torch.int64)
            self._gathered = flat, flat.numpy().reshape(group.size, len(own))
        flat, gathered = self._gathered
        group.wait(group.all_gather(flat, own), self._deadline_s)
        rest()
        return gathered

    def close(self) -> None:
        """The group is its maker's."""


class LoadBoard:
    """`[RING, size]` rows of int64 in memory that the ranks of one host share; see `open_load_board`.

    A row that is being written while it is read does not match its checksum and counts as not there yet, so that no
    order of memory accesses is assumed, which not every processor keeps.
    """

    def __init__(self, file: int, *, rank: int, size: int, width: int) -> None:
        """`file` is open for reading and writing and as long as `num_bytes`; it is the board's from now on."""
        self._file = file
        self._memory = mmap.mmap(file, num_bytes(size, width))
        words = np.frombuffer(self._memory, np.int64)
        first = 2 * LINE // WORD
        self._taken: IntArray = words[LINE // WORD : first]
        """The first: how many sub-windows rank 0 has read."""
        rows = words[first:].reshape(RING, size, -1)[:, :, : width + 2]
        self._rows: IntArray = rows
        """Each: the number of its sub-window, from 1; its values; their checksum."""
        self._own: IntArray = rows[:, rank]
        self._read: IntArray = np.empty((size, width + 2), np.int64)
        self._presence = Presence(file, rank)

    def has_room(self, window: int) -> bool:
        """Whether rank 0 has read what would be written over."""
        return int(self._taken[0]) > window - RING

    def write(self, window: int, values: IntArray) -> None:
        """This rank's `[width]` of a sub-window that `has_room`."""
        row = self._own[window % RING]
        row[1:-1] = values
        row[-1] = _checksum(window, row[1:-1])
        row[0] = window + 1

    def late(self, window: int) -> list[int]:
        """The ranks whose rows of a sub-window are not there yet. For rank 0, which reads the others by that."""
        numbers = self._rows[window % RING, :, 0].tolist()
        late = [rank for rank, number in enumerate(numbers) if number != window + 1]
        if late:
            return late
        self._read[:] = self._rows[window % RING]
        sums = self._read[:, -1].tolist()
        return [rank for rank, row in enumerate(self._read) if _checksum(window, row[1:-1]) != sums[rank]]

    def take(self, window: int) -> IntArray:
        """`[size, width]` of a sub-window for which nobody was `late`, until that is asked again. Frees its rows."""
        self._taken[0] = window + 1
        return self._read[:, 1:-1]

    def is_gone(self, rank: int) -> bool:
        """Whether that rank's process has ended or closed its board."""
        return self._presence.is_gone(rank)

    def close(self) -> None:
        """Peers see that this rank is gone. Again: does nothing."""
        if not self._memory.closed:
            del self._taken, self._rows, self._own
            self._memory.close()
            os.close(self._file)


class BoardGathering:
    """Through a `LoadBoard`. Only rank 0 gets anything, and only it may have to wait, unless it is far behind."""

    def __init__(self, board: LoadBoard, *, rank: int, deadline_s: float) -> None:
        self._board = board
        self._rank = rank
        self._deadline_s = deadline_s

    def gather(self, window: int, own: torch.Tensor, rest: Rest, /) -> IntArray | None:
        board = self._board
        self._wait(lambda: [] if board.has_room(window) else [LEADER], "read what was written before")
        board.write(window, own.numpy())
        if self._rank != LEADER:
            return None
        rest()
        self._wait(lambda: board.late(window), f"written their loads of sub-window {window}")
        return board.take(window)

    def close(self) -> None:
        self._board.close()

    def _wait(self, late: Callable[[], list[int]], what: str) -> None:
        """Looks until no rank is `late`."""
        ranks = late()
        pause_s, end = FIRST_PAUSE_S, time.monotonic() + self._deadline_s
        while ranks:
            time.sleep(pause_s)
            gone = [rank for rank in ranks if pause_s == LONGEST_PAUSE_S and self._board.is_gone(rank)]
            is_over = time.monotonic() > end
            ranks = late()  # once more: it may have done it before it went
            if ranks and (gone or is_over):
                raise RuntimeError(f"ranks {gone} are gone" if gone else f"ranks {ranks} have not {what} in time")
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def num_bytes(size: int, width: int) -> int:
    """Of a board for `size` ranks and rows of `width` integers."""
    return 2 * LINE + RING * size * row_bytes(width + 2)


def open_load_board(
    store: Store, all_agree: Callable[[bool], bool], *, rank: int, size: int, width: int
) -> LoadBoard | None:
    """A board that all ranks have, or None on all of them; see `open_shared`."""
    make = functools.partial(LoadBoard, rank=rank, size=size, width=width)
    return open_shared(store, all_agree, make, rank=rank, length=num_bytes(size, width))


def _checksum(window: int, values: IntArray) -> int:
    """Fits an int64."""
    return xxhash.xxh3_64_intdigest(values.data, seed=window) >> 1
