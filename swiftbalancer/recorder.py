"""Takes the engine's token counters at the end of each sub-window, without the host waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swiftbalancer.device import DeviceLayer, Event

RING = 4
"""Snapshots in flight. One lands within a step or two; four sub-windows pass before a buffer is used again."""


@dataclass(slots=True)
class Snapshot:
    """Counters as they stood at the end of a sub-window, on their way to the host.

    `counts` has the counters' shape and `passes` is `[1]`; both int64, on the host, valid once `landed` has run.
    """

    counts: torch.Tensor
    passes: torch.Tensor
    taken: torch.Tensor
    taken_passes: torch.Tensor
    at: Event
    landed: Event
    window: int = -1
    in_use: bool = False


class LoadRecorder:
    """Snapshots and zeroes the counters on the main stream, copies to pinned memory on a side stream.

    Order, each by an event: the copy waits for the snapshot; a buffer is written again only after its last copy
    has landed. The zeroing and the engine's counting share the main stream, so no count is lost or doubled.
    """

    def __init__(self, layer: DeviceLayer, counters: torch.Tensor, passes: torch.Tensor | None) -> None:
        self._layer = layer
        self._counters = counters
        self._passes = passes
        self._stream = layer.side_stream()
        self._ring = [self._buffer() for _ in range(RING)]
        self.overruns = 0
        """Sub-windows whose counts were dropped because four snapshots were still on their way."""

    def take(self, window: int) -> Snapshot:
        """The snapshot of sub-window `window`; call on the main thread after a forward pass. Zeroes the counters.

        Give the snapshot back with `release` when its values have been read.
        """
        snapshot = self._ring[window % RING]
        if snapshot.in_use:
            self.overruns += 1
            snapshot = self._ring[window % RING] = self._buffer()
        snapshot.window, snapshot.in_use = window, True
        layer = self._layer
        layer.copy(snapshot.taken, self._counters)
        layer.launch(torch.Tensor.zero_, self._counters)
        if self._passes is not None:
            layer.copy(snapshot.taken_passes, self._passes)
        layer.record(snapshot.at)
        with layer.on(self._stream):
            layer.wait(self._stream, snapshot.at)
            layer.copy(snapshot.counts, snapshot.taken)
            layer.copy(snapshot.passes, snapshot.taken_passes)
            layer.record(snapshot.landed)
        return snapshot

    def release(self, snapshot: Snapshot) -> None:
        """The snapshot's buffers may be written again."""
        snapshot.in_use = False

    def _buffer(self) -> Snapshot:
        layer, shape = self._layer, self._counters.shape
        return Snapshot(
            counts=layer.pinned(shape, torch.int64),
            passes=layer.pinned((1,), torch.int64),
            taken=torch.zeros(shape, dtype=torch.int64, device=self._counters.device),
            taken_passes=torch.full((1,), -1, dtype=torch.int64, device=self._counters.device),
            at=layer.event(),
            landed=layer.event(),
        )
