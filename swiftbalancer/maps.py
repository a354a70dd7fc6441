"""A map sink for engines whose kernels read a dispatch table tensor of our own shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer

IntArray = NDArray[np.integer]
ALIGNMENT = 64
"""Bytes; tensors begin at such boundaries in a common block."""


class RowWriter:
    """Writes rows of live tensors `[layers, ...]` in place by launches that are always the same.

    That makes them cheap to repeat (`DeviceLayer.recorded`): an update of fewer layers repeats its first one in the
    places that are left, which writes the same rows again. Memory is allocated once, in one block, so that an update
    of all layers, the usual one, is one copy to the device.
    """

    def __init__(self, layer: DeviceLayer, targets: Sequence[torch.Tensor]) -> None:
        self._layer = layer
        parts = [torch.arange(len(targets[0]), device=targets[0].device), *targets]
        ends = [sum(_padded_bytes(part) for part in parts[:number]) for number in range(len(parts) + 1)]
        self._block = torch.empty(ends[-1], dtype=torch.uint8, device=targets[0].device)
        self._host_block = layer.pinned(self._block.shape, torch.uint8)
        self._staged = [_part_of(self._block, start, part) for start, part in zip(ends, parts, strict=False)]
        self._host = [_part_of(self._host_block, start, part) for start, part in zip(ends, parts, strict=False)]
        self._values = [host.numpy() for host in self._host]
        for staged, part in zip(self._staged, parts, strict=True):
            staged.copy_(part)
        index, *rows = self._staged

        def commit() -> None:
            for live, values in zip(targets, rows, strict=True):
                layer.launch(live.index_copy_, 0, index, values)

        self.launches: Callable[[], None] = commit
        """What `commit` does, one by one."""
        self.commit = layer.recorded(commit)
        """Launches the copies of the rows filled last to the live tensors, on the current stream."""

    def fill(self, layers: IntArray, *rows: IntArray) -> list[torch.Tensor]:
        """Brings `layers` `[n]` and the rows `[n, ...]` of each target, n > 0, to the device on the current stream.

        Gives the rows there, where they stay until the next `fill`. That one must come behind the commit of these on
        its stream, and not before they have arrived.
        """
        num = len(layers)
        for values, given in zip(self._values, (layers, *rows), strict=True):
            np.copyto(values[:num], given)
        if num == len(self._values[0]):
            self._layer.copy(self._block, self._host_block)
            return self._staged[1:]
        for staged, host in zip(self._staged, self._host, strict=True):
            self._layer.copy(staged[:num], host[:num])
            self._layer.copy(staged[num:], staged[:1].expand(len(staged) - num, *staged.shape[1:]))
        return [staged[:num] for staged in self._staged[1:]]


def _padded_bytes(part: torch.Tensor) -> int:
    return -(-part.numel() * part.element_size() // ALIGNMENT) * ALIGNMENT


def _part_of(block: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """Bytes of a block from `start` on as a tensor of the shape and type of another."""
    num_bytes = like.numel() * like.element_size()
    return block[start : start + num_bytes].view(like.dtype).view(like.shape)


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
