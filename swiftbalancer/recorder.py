"""Takes the engine's token counters at the end of each sub-window, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer, Event

RING = 4
"""Snapshots in flight. One lands within a step or two; four sub-windows pass before a buffer is used again."""


@dataclass(slots=True)
class Snapshot:
    """Counters as they stood at the end of sub-window `window`.

    `host` `[n + 2]` int64, pinned: the window, the counters, flat, and the pass count (-1 where the engine has none).
    They are there once the device has passed `landed`.
    """

    host: torch.Tensor
    fill: Callable[[], None]
    """Launches the counters' copy to `host` and their zeroing, and records `landed`."""
    landed: Event
    window: int = -1
    in_use: bool = False


class LoadRecorder:
    """Brings the counters to the host and zeroes them, all on the main stream, where the engine counts.

    So no count is lost or doubled; a buffer is written again only after it has landed and was read. Counts from
    before the recorder was made are forgotten.
    """

    def __init__(self, layer: DeviceLayer, counters: torch.Tensor, passes: torch.Tensor | None) -> None:
        self._layer = layer
        self._counters = counters
        self._passes = passes
        self._ring = [self._buffer() for _ in range(RING)]
        layer.launch(torch.Tensor.zero_, counters)
        for snapshot in self._ring:
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
        snapshot = self._ring[window % RING]
        if snapshot.in_use:
            self.overruns += 1
            with torch.inference_mode(False):  # threads outside of it could not write tensors made in it
                snapshot = self._ring[window % RING] = self._buffer()
        snapshot.window, snapshot.in_use = window, True
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
        """`host`, there by now and until `release`. Off the main thread: waits for the device."""
        snapshot.landed.synchronize()
        snapshot.host.numpy()[0] = snapshot.window
        return snapshot.host

    def release(self, snapshot: Snapshot) -> None:
        """Its buffer may be used again."""
        snapshot.in_use = False

    def _buffer(self) -> Snapshot:
        layer, size = self._layer, self._counters.numel() + 1
        taken = torch.full((size,), -1, dtype=torch.int64, device=self._counters.device)
        counts, passes = taken[:-1].view(self._counters.shape), taken[-1:]
        host = layer.pinned((1 + size,), torch.int64)
        behind_window = host[1:]
        landed = layer.event()

        def fill() -> None:
            layer.copy(counts, self._counters)
            layer.launch(torch.Tensor.zero_, self._counters)
            if self._passes is not None:
                layer.copy(passes, self._passes)
            layer.copy(behind_window, taken)
            layer.record(landed)

        return Snapshot(host=host, fill=fill, landed=landed)
