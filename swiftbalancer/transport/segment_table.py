"""The table that kernels of ours work through (`swiftbalancer.kernels.segments`), on the device, filled per batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer
from swiftbalancer.kernels.segments import COLUMNS, HEADER, table_size


class SegmentTable:
    """Memory for the rows of `num_experts`, allocated once: write the `rows`, then `send` them."""

    def __init__(self, layer: DeviceLayer, *, num_experts: int, num_tensors: int) -> None:
        self._layer = layer
        self._num_tensors = num_tensors
        size = (table_size(num_experts * num_tensors),)
        self.on_device = torch.zeros(size, dtype=torch.int64, device=layer.device)
        """Of no rows, until some are sent."""
        self._host = layer.pinned(size, torch.int64)
        self._values: NDArray[np.int64] = self._host.numpy()

    def larger(self, num_experts: int) -> SegmentTable:
        """Another one."""
        return SegmentTable(self._layer, num_experts=num_experts, num_tensors=self._num_tensors)

    def rows(self, num_experts: int) -> NDArray[np.int64]:
        """`[experts, tensors, 4]` to be written; what was sent before must have arrived."""
        shape = (num_experts, self._num_tensors, COLUMNS)
        return self._values[HEADER : HEADER + num_experts * self._num_tensors * COLUMNS].reshape(shape)

    def send(self, num_experts: int) -> None:
        """Makes the rows of so many experts the table, on the current stream; no launch may still have to read it."""
        self._values[:HEADER] = num_experts * self._num_tensors, self._num_tensors
        used = table_size(num_experts * self._num_tensors)
        self._layer.copy(self.on_device[:used], self._host[:used])
