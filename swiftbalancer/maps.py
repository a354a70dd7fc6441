"""A map sink for engines whose kernels read a dispatch table tensor of our own shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer

NUM_BUFFERS = 2
"""One update is committed while the next is prepared."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """New rows of some layers on the device, in tensors as large as the whole maps; `layers` `[layers]` int64."""

    layers: torch.Tensor
    values: tuple[torch.Tensor, ...]
    commit: Callable[[], None]
    """Launches the copies to the live maps."""


class RowWriter:
    """Writes rows of live tensors `[layers, ...]` in place by launches that are always the same.

    That makes them cheap to repeat (`DeviceLayer.recorded`): an update of fewer layers repeats its first one in the
    places that are left, which writes the same rows again.
    """

    def __init__(self, layer: DeviceLayer, targets: Sequence[torch.Tensor]) -> None:
        self._layer = layer
        self._targets = tuple(targets)
        self._buffers = [self._buffer() for _ in range(NUM_BUFFERS)]
        self._next = 0

    def fill(self, layers: torch.Tensor, values: Sequence[torch.Tensor]) -> Rows:
        """Brings `layers` `[n]` and their rows `[n, ...]`, host tensors, n > 0, to the device on the current stream.

        The commit of the update before the last must come before on that stream.
        """
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % NUM_BUFFERS
        for target, value in zip((buffer.layers, *buffer.values), (layers, *values), strict=True):
            pinned = self._layer.pinned(value.shape, target.dtype)
            pinned.copy_(value)
            num = len(value)
            self._layer.copy(target[:num], pinned)
            if num < len(target):
                self._layer.copy(target[num:], target[:1].expand(len(target) - num, *target.shape[1:]))
        return buffer

    def _buffer(self) -> Rows:
        index = torch.arange(len(self._targets[0]), device=self._targets[0].device)
        values = tuple(torch.empty(live.shape, dtype=live.dtype, device=live.device) for live in self._targets)
        for value, live in zip(values, self._targets, strict=True):
            value.copy_(live)

        def commit() -> None:
            for live, value in zip(self._targets, values, strict=True):
                self._layer.launch(live.index_copy_, 0, index, value)

        return Rows(index, values, self._layer.recorded(commit))


class TableMaps:
    """Writes `table` `[layers, experts, width]` int32 and `physical_to_logical_map` `[layers, slots]` int32 in place.

    The tensors belong to the engine; kernels and captured graphs may read them at fixed addresses.
    """

    def __init__(self, layer: DeviceLayer, table: torch.Tensor, physical_to_logical_map: torch.Tensor) -> None:
        self._writer = RowWriter(layer, (table, physical_to_logical_map))

    def prepare(self, update: MapUpdate) -> Rows:
        """Brings the rows to the device on the current (side) stream."""
        values = (torch.from_numpy(update.table), torch.from_numpy(update.physical_to_logical_map))
        return self._writer.fill(torch.from_numpy(update.layers), values)

    def commit(self, prepared: Rows) -> None:
        """One recorded launch on the current stream, or two plain ones."""
        prepared.commit()
