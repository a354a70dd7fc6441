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
SEED = 20261130
"""Of the factors of checksums, which all ranks must have alike."""


class Gathering(Protocol):
    """Of one rank, on its bulk lane. Sub-windows come in order, all of them on every rank."""

    def gather(self, window: int, own: torch.Tensor | None, rest: Rest, /) -> IntArray | None:
        """Rank `r`'s `own` `[n]` int64 in row `r`, until this is called again; None on ranks that get nothing.

        `own` begins with `window + 1` and is free again when this returns; None: the device writes it to the board.
        `rest` is called between pieces of work. Raises `RuntimeError` if a rank is gone or a deadline is missed:
        nothing can be gathered any more then.
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

    def gather(self, _: int, own: torch.Tensor | None, rest: Rest, /) -> IntArray | None:
        assert own is not None, "there is no board"
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

    Each row: the number of its sub-window, from 1; its values; their checksum. A row that is being written while it
    is read does not match its checksum and counts as not there yet, so that no order of memory accesses is assumed,
    which not every processor keeps, nor any device that writes rows itself.
    """

    def __init__(self, file: int, *, rank: int, size: int, width: int) -> None:
        """`file` is open for reading and writing and as long as `num_bytes`; it is the board's from now on. `width`:
        of a row without its checksum."""
        self._file = file
        self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(file, num_bytes(size, width)), np.uint8)
        """All of it. It stays mapped as long as anybody holds it, or a row."""
        words = self.memory.view(np.int64)
        first = 2 * LINE // WORD
        self._taken: IntArray = words[LINE // WORD : first]
        """The first: how many sub-windows rank 0 has read."""
        self._rows: IntArray = words[first:].reshape(RING, size, -1)[:, :, : width + 1]
        self._own: IntArray = self._rows[:, rank]
        self._read: IntArray = np.empty((size, width + 1), np.int64)
        self._factors = factors(width)
        self._presence = Presence(file, rank)

    @property
    def own_rows(self) -> list[torch.Tensor]:
        """This rank's `[width + 1]`, for who writes them itself; row `window % RING` of a sub-window that `has_room`.

        The checksum is the sum of all before it times `factors`, modulo 2**64.
        """
        return [torch.from_numpy(row) for row in self._own]

    def has_room(self, window: int) -> bool:
        """Whether rank 0 has read what would be written over."""
        return int(self._taken[0]) > window - RING

    def write(self, window: int, values: IntArray) -> None:
        """This rank's `[width]` of a sub-window that `has_room`; they begin with `window + 1`."""
        row = self._own[window % RING]
        row[:-1] = values
        row[-1] = row[:-1] @ self._factors

    def late(self, window: int) -> list[int]:
        """The ranks whose rows of a sub-window are not there yet. For rank 0, which reads the others by that."""
        numbers = self._rows[window % RING, :, 0].tolist()
        late = [rank for rank, number in enumerate(numbers) if number != window + 1]
        if late:
            return late
        self._read[:] = self._rows[window % RING]
        off = np.einsum("rn,n->r", self._read[:, :-1], self._factors) - self._read[:, -1]
        return [rank for rank, by in enumerate(off.tolist()) if by or self._read[rank, 0] != window + 1]

    def take(self, window: int) -> IntArray:
        """`[size, width]` of a sub-window for which nobody was `late`, until that is asked again. Frees its rows."""
        self._taken[0] = window + 1
        return self._read[:, :-1]

    def is_gone(self, rank: int) -> bool:
        """Whether that rank's process has ended or closed its board."""
        return self._presence.is_gone(rank)

    def close(self) -> None:
        """Peers see that this rank is gone. Again: does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            del self.memory, self._taken, self._rows, self._own


class BoardGathering:
    """Through a `LoadBoard`. Only rank 0 gets anything, and only it may have to wait, unless it is far behind."""

    def __init__(self, board: LoadBoard, *, rank: int, deadline_s: float) -> None:
        self._board = board
        self._rank = rank
        self._deadline_s = deadline_s

    def gather(self, window: int, own: torch.Tensor | None, rest: Rest, /) -> IntArray | None:
        board = self._board
        if own is not None:
            self._wait(lambda: [] if board.has_room(window) else [LEADER], "read what was written before")
            board.write(window, own.numpy())
        if self._rank != LEADER:
            return None
        if own is not None:
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
    return 2 * LINE + RING * size * row_bytes(width + 1)


def factors(width: int) -> IntArray:
    """`[width]` of a checksum that a device works out by a product and a sum. Odd, so that no change of one value is
    lost, and random otherwise, so that hardly any other is."""
    bits = np.random.default_rng(SEED).integers(-(2**63), 2**63, width, np.int64)
    odd: IntArray = bits | 1
    return odd


def open_load_board(
    store: Store, all_agree: Callable[[bool], bool], *, rank: int, size: int, width: int
) -> LoadBoard | None:
    """A board that all ranks have, or None on all of them; see `open_shared`."""
    make = functools.partial(LoadBoard, rank=rank, size=size, width=width)
    return open_shared(store, all_agree, make, rank=rank, length=num_bytes(size, width))
