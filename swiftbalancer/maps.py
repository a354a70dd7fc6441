"""A map sink for engines whose kernels read a dispatch table tensor of our own shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer

IntArray = NDArray[np.integer]


class RowWriter:
    """Writes rows of live tensors `[layers, ...]` in place by launches that are always the same.

    That makes them cheap to repeat (`DeviceLayer.recorded`): an update of fewer layers repeats its first one in the
    places that are left, which writes the same rows again. Memory is allocated once.
    """

    def __init__(self, layer: DeviceLayer, targets: Sequence[torch.Tensor]) -> None:
        self._layer = layer
        first = targets[0]
        index = torch.arange(len(first), device=first.device)
        rows = [torch.empty(live.shape, dtype=live.dtype, device=live.device).copy_(live) for live in targets]

        def commit() -> None:
            for live, values in zip(targets, rows, strict=True):
                layer.launch(live.index_copy_, 0, index, values)

        self._staged = (index, *rows)
        self._host = [layer.pinned(staged.shape, staged.dtype) for staged in self._staged]
        self.launches: Callable[[], None] = commit
        """What `commit` does, one by one."""
        self.commit = layer.recorded(commit)
        """Launches the copies of the rows filled last to the live tensors, on the current stream."""

    def fill(self, layers: IntArray, *rows: IntArray) -> tuple[torch.Tensor, ...]:
        """Brings `layers` `[n]` and the rows `[n, ...]` of each target, n > 0, to the device on the current stream.

        Gives the rows there, where they stay until the next `fill`. That one must come behind the commit of these on
        its stream, and not before they have arrived.
        """
        num = len(layers)
        for staged, host, values in zip(self._staged, self._host, (layers, *rows), strict=True):
            np.copyto(host[:num].numpy(), values)
            self._layer.copy(staged[:num], host[:num])
            if num < len(staged):
                self._layer.copy(staged[num:], staged[:1].expand(len(staged) - num, *staged.shape[1:]))
        return tuple(staged[:num] for staged in self._staged[1:])


class TableMaps:
    """Writes `table` `[layers, experts, width]` int32 and `physical_to_logical_map` `[layers, slots]` int32 in place.

    The tensors belong to the engine; kernels and captured graphs may read them at fixed addresses.
    """

    def __init__(self, layer: DeviceLayer, table: torch.Tensor, physical_to_logical_map: torch.Tensor) -> None:
        self._writer = RowWriter(layer, (table, physical_to_logical_map))
        self.launches = self._writer.launches

    def prepare(self, update: MapUpdate) -> None:
        """Brings the rows to the device on the current (side) stream."""
        self._writer.fill(update.layers, update.table, update.physical_to_logical_map)

    def commit(self, _prepared: None) -> None:
        """One recorded launch on the current stream, or two plain ones."""
        self._writer.commit()
