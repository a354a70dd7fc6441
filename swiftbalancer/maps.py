"""A map sink for engines whose kernels read a dispatch table tensor of our own shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer


@dataclass(frozen=True, slots=True, eq=False)
class StagedMaps:
    """Rows on the device, waiting for the commit; `layers` `[n]` int64. The host copies live as long as these."""

    layers: torch.Tensor
    table: torch.Tensor
    physical_to_logical_map: torch.Tensor
    host: tuple[torch.Tensor, ...]


class TableMaps:
    """Writes `table` `[layers, experts, width]` int32 and `physical_to_logical_map` `[layers, slots]` int32 in place.

    The tensors belong to the engine; kernels and captured graphs may read them at fixed addresses.
    """

    def __init__(self, layer: DeviceLayer, table: torch.Tensor, physical_to_logical_map: torch.Tensor) -> None:
        self._layer = layer
        self._table = table
        self._map = physical_to_logical_map

    def prepare(self, update: MapUpdate) -> StagedMaps:
        """Brings the rows to the device on the current (side) stream."""
        arrays = (update.layers, update.table, update.physical_to_logical_map)
        host = tuple(self._pinned(torch.from_numpy(array)) for array in arrays)
        layers, table, rows = (self._to_device(tensor) for tensor in host)
        return StagedMaps(layers, table, rows, host)

    def commit(self, prepared: StagedMaps) -> None:
        """Two launches on the current stream."""
        self._layer.launch(self._table.index_copy_, 0, prepared.layers, prepared.table)
        self._layer.launch(self._map.index_copy_, 0, prepared.layers, prepared.physical_to_logical_map)

    def _pinned(self, source: torch.Tensor) -> torch.Tensor:
        pinned = self._layer.pinned(source.shape, source.dtype)
        pinned.copy_(source)
        return pinned

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        target = torch.empty(host.shape, dtype=host.dtype, device=self._table.device)
        self._layer.copy(target, host)
        return target
