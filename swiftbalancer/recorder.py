"""Takes the engine's token counters at the end of each sub-window, without the host waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer, Event
from swiftbalancer.gathering import LoadBoard, factors

RING = 4
"""Snapshots in flight. One lands within a step or two; four sub-windows pass before a buffer is used again."""


@dataclass(slots=True, eq=False)
class Snapshot:
    """Counters as they stood at the end of sub-window `window`.

    `host` `[n + 2]` int64: the sub-window's number, from 1, the counters, flat, and the pass count (-1 where the
    engine has none). They are there once the device has passed `landed`.
    """

    host: torch.Tensor
    fill: Callable[[], None]
    """Launches the counters' copy to `host` and their zeroing, and records `landed`."""
    landed: Event
    number: NDArray[np.int64] | None = None
    """`host` lies on the board, where rank 0 reads it; the device takes its number from here."""
    window: int = -1
    in_use: bool = False


class LoadRecorder:
    """Brings the counters to the host and zeroes them, all on the main stream, where the engine counts.

    So no count is lost or doubled; a buffer is written again only after it has landed and was read. Counts from
    before the recorder was made are forgotten.

    Where ranks share memory that the device reaches, it writes there itself, checksum and all, and no thread has to.
    """

    def __init__(
        self,
        layer: DeviceLayer,
        counters: torch.Tensor,
        passes: torch.Tensor | None,
        board: LoadBoard | None = None,
    ) -> None:
        self._layer = layer
        self._counters = counters
        self._passes = passes
        self._board = board
        self._unreach = None if board is None else layer.reach(board.memory)
        self._on_board = [self._row(row) for row in board.own_rows] if board is not None and self._unreach else []
        self._ring = [self._buffer() for _ in range(RING)]
        layer.launch(torch.Tensor.zero_, counters)
        for snapshot in (*self._on_board, *self._ring):
            snapshot.fill = layer.recorded(snapshot.fill)
        self._keep = torch.ones(len(counters), 1, dtype=counters.dtype, device=counters.device)
        self._keep_host = layer.pinned(self._keep.shape, counters.dtype)
        self._keep_values: NDArray[np.integer] = self._keep_host.numpy()
        self.overruns = 0
        """Sub-windows that found all snapshots still on their way, and took a new buffer."""

    def take(self, window: int) -> Snapshot:
        """The snapshot of sub-window `window`; on the main thread, after a forward pass. Zeroes the counters.

        One launch of a recorded sequence; `land` waits for it on another thread.
        """
        snapshot = self._free(window)
        snapshot.window = window
        if snapshot.number is not None:
            snapshot.number[0] = window + 1
        snapshot.fill()
        return snapshot

    def forget(self) -> None:
        """Zeroes the counters of the layers that `prepare_to_forget` named, on the main stream: part of a commit.

        One launch that is always the same, so that it can be recorded together with the commit's copies.
        """
        self._layer.launch(self._counters.mul_, self._keep)

    def prepare_to_forget(self, layers: NDArray[np.int64]) -> None:
        """`layers` `[n]` are those whose slots change meaning with the next commit, which `forget`s their counts.

        On the current (side) stream, behind the last `forget`, and not before the last call has reached the device.
        """
        self._keep_values[:] = 1
        self._keep_values[layers] = 0
        self._layer.copy(self._keep, self._keep_host)

    def land(self, snapshot: Snapshot) -> torch.Tensor:
        """`host` of one of the ring, there by now and until `release`. Off the main thread: waits for the device."""
        snapshot.landed.synchronize()
        snapshot.host.numpy()[0] = snapshot.window + 1
        return snapshot.host

    def release(self, snapshot: Snapshot) -> None:
        """Its buffer may be used again; of one on the board, rank 0 decides that."""
        snapshot.in_use = False

    def close(self) -> None:
        """The board's memory is the device's no more, unless it has yet to write there: then it keeps the pages."""
        unreach, self._unreach = self._unreach, None
        on_board, self._on_board = self._on_board, []
        with contextlib.suppress(RuntimeError):  # of a device that is broken, whose pages stay its own as well
            if unreach is not None and all(snapshot.landed.query() for snapshot in on_board):
                unreach()

    def _free(self, window: int) -> Snapshot:
        """On the board, or of the ring where rank 0 is far behind: a thread brings that to the board."""
        if self._on_board and self._board is not None and self._board.has_room(window):
            return self._on_board[window % len(self._on_board)]
        snapshot = self._ring[window % RING]
        if snapshot.in_use:
            self.overruns += 1
            with torch.inference_mode(False):  # threads outside of it could not write tensors made in it
                snapshot = self._ring[window % RING] = self._buffer()
        snapshot.in_use = True
        return snapshot

    def _buffer(self) -> Snapshot:
        """One of the ring."""
        layer, size = self._layer, self._counters.numel() + 1
        taken = torch.full((size,), -1, dtype=torch.int64, device=self._counters.device)
        empty = self._emptying_into(taken)
        host = layer.pinned((1 + size,), torch.int64)
        behind_number = host[1:]
        landed = layer.event()

        def fill() -> None:
            empty()
            layer.copy(behind_number, taken)
            layer.record(landed)

        return Snapshot(host, fill, landed)

    def _row(self, row: torch.Tensor) -> Snapshot:
        """One on the board."""
        layer, device = self._layer, self._counters.device
        taken = torch.full((len(row),), -1, dtype=torch.int64, device=device)
        number, checked, checksum = taken[:1], taken[:-1], taken[-1]
        empty = self._emptying_into(taken[1:-1])
        by = torch.from_numpy(factors(len(checked))).to(device)
        products = torch.empty_like(by)
        number_host = layer.pinned((1,), torch.int64)
        landed = layer.event()

        def fill() -> None:
            layer.copy(number, number_host)
            empty()
            layer.launch(_multiply, products, checked, by)
            layer.launch(_sum, checksum, products)
            layer.copy(row, taken)
            layer.record(landed)

        return Snapshot(row[:-1], fill, landed, number_host.numpy())

    def _emptying_into(self, taken: torch.Tensor) -> Callable[[], None]:
        """What launches the copy of counters and pass count to `taken` `[n + 1]`, and the counters' zeroing."""
        layer, counts, passes = self._layer, taken[:-1].view(self._counters.shape), taken[-1:]

        def empty() -> None:
            layer.copy(counts, self._counters)
            layer.launch(torch.Tensor.zero_, self._counters)
            if self._passes is not None:
                layer.copy(passes, self._passes)

        return empty


def _multiply(result: torch.Tensor, values: torch.Tensor, factors: torch.Tensor) -> None:
    torch.mul(values, factors, out=result)


def _sum(result: torch.Tensor, values: torch.Tensor) -> None:
    torch.sum(values, dim=0, out=result)
