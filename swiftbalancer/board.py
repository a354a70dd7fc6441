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
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch._C._distributed_c10d import Store

SHARED_MEMORY = Path("/dev/shm")
LINE = 128
"""Rows begin at multiples of this many bytes: two cache lines, which processors fetch together."""
MARK_BYTES = 16
CHECKSUM_BYTES = 8


class Board:
    """`[2, size]` rows of integers, and when each was written. One object per rank; of use from one thread.

    A row that is being written while it is read does not match its checksum and counts as not there yet, so that no
    order of memory accesses is assumed, which not every processor keeps.
    """

    def __init__(self, file: int, *, rank: int, size: int, width: int) -> None:
        """`file` is open for reading and writing and as long as `num_bytes`; it is the board's from now on."""
        self._file = file
        self._rank = rank
        self._size = size
        self._row = struct.Struct(f"<{1 + width}q")
        """Turn and values; the checksum of both follows."""
        self._times = struct.Struct(f"<{size}d")
        self._one_time = struct.Struct("<d")
        self._stride = stride = _stride(width)
        self._padding = bytes(stride - self._row.size - CHECKSUM_BYTES)
        # Worked out here, since writing and looking are part of the forward path.
        self._rows_at = (LINE, LINE + size * stride)
        self._times_at = tuple(LINE + size * (2 * stride + 8 * parity) for parity in (0, 1))
        self._memory = mmap.mmap(file, num_bytes(size, width))
        self._own = b"\xff" * stride  # nobody writes that
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)  # the system lets go of it when this process ends

    def write(self, turn: int, values: Sequence[int], now: float | None = None) -> None:
        """This rank's row of `turn`; if that is timed, `now` is seconds of a clock that all ranks read alike."""
        row = self._row.pack(turn, *values)
        self._own = own = row + zlib.crc32(row).to_bytes(CHECKSUM_BYTES, "little") + self._padding
        at = self._rows_at[turn & 1] + self._rank * self._stride
        if now is not None:
            self._one_time.pack_into(self._memory, self._times_at[turn & 1] + 8 * self._rank, now)
        self._memory[at : at + len(own)] = own

    def all_alike(self, turn: int) -> bool:
        """Whether every rank has written to `turn` what this rank wrote last: by far the usual case, seen at once."""
        expected = self._own * self._size
        at = self._rows_at[turn & 1]
        return self._memory[at : at + len(expected)] == expected

    def read(self, turn: int) -> list[list[int] | None]:
        """Each rank's values of `turn`; None where they are not there yet."""
        at, length = self._rows_at[turn & 1], self._row.size + CHECKSUM_BYTES
        firsts = range(at, at + self._size * self._stride, self._stride)
        return [self._values(turn, self._memory[first : first + length]) for first in firsts]

    def last_written(self, turn: int) -> float:
        """When the last rank wrote its row of `turn`, which is timed, once all have."""
        times: tuple[float, ...] = self._times.unpack_from(self._memory, self._times_at[turn & 1])
        return max(times)

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
        """Peers see that this rank is gone; what it has written stays readable to them."""
        self._memory.close()
        os.close(self._file)

    def _values(self, turn: int, row: bytes) -> list[int] | None:
        body, checksum = row[:-CHECKSUM_BYTES], int.from_bytes(row[-CHECKSUM_BYTES:], "little")
        found, *values = self._row.unpack(body)
        return values if found == turn and checksum == zlib.crc32(body) else None


def num_bytes(size: int, width: int) -> int:
    """Of a board for `size` ranks and rows of `width` integers; the first line is its mark's."""
    return LINE + 2 * size * (_stride(width) + 8)


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
    return -(-(8 * (1 + width) + CHECKSUM_BYTES) // LINE) * LINE
