"""vLLM's expert maps, written in place.

vLLM's kernels send a token to `logical_to_physical_map[layer, expert, hash(token) % logical_replica_count]`.
We fix the count at the width of our dispatch table and write the table there: a slot that stands in more columns
gets a larger share, with no change to any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import uniform_table
from swiftbalancer.maps import RowWriter
from swiftbalancer.placement import Placement


class VllmMaps:
    """Writes `physical_to_logical_map`, `logical_to_physical_map` and `logical_replica_count` of one model.

    The maps are vLLM's tensors `[layers, slots]`, `[layers, experts, 1024]` and `[layers, experts]`, all int64.
    """

    def __init__(self, model_state: Any, device: DeviceLayer, *, width: int) -> None:
        self._state = model_state
        self._device = device
        self.width = width
        columns = model_state.logical_to_physical_map[:, :, :width]
        self._writer = RowWriter(device, (model_state.physical_to_logical_map, columns))
        self.launches: Callable[[], None] | None = self._writer.launches

    def prepare(self, update: MapUpdate) -> Any:
        """Brings an update to the device on the current (side) stream."""
        self._fill(update)

    def commit(self, _prepared: Any) -> None:
        """Enqueues the writes on the current stream: two kernels, whatever the number of layers."""
        self._writer.commit()

    def _fill(self, update: MapUpdate) -> list[torch.Tensor]:
        """The rows `[n, slots]` and the table `[n, experts, width]` on the device, int64."""
        return self._writer.fill(update.layers, update.physical_to_logical_map, update.table)

    def write(self, placement: Placement) -> None:
        """Puts a placement with replicas in turn in force, waiting for the device; before serving only."""
        state = self._state
        state.physical_to_logical_map.copy_(torch.from_numpy(placement.physical_to_logical_map.astype(np.int64)))
        state.logical_to_physical_map.fill_(-1)
        table = torch.from_numpy(uniform_table(placement, self.width).astype(np.int64))
        state.logical_to_physical_map[:, :, : self.width].copy_(table)
        state.logical_replica_count.fill_(self.width)
        self._rehearse(placement)

    def _rehearse(self, placement: Placement) -> None:
        """Commits what is in force already: a device loads a kernel at its first use, which takes milliseconds."""
        layers = np.arange(placement.num_layers)
        table = uniform_table(placement, self.width)
        self.commit(self.prepare(MapUpdate(layers, placement.physical_to_logical_map, table, batch=0)))
        self._device.synchronize()

    def write_for_vllm(self, placement: Placement) -> None:
        """Puts a placement in force the way vLLM itself writes it: each replica once, counts true."""
        state = self._state
        slots = placement.logical_to_physical_map()
        state.physical_to_logical_map.copy_(torch.from_numpy(placement.physical_to_logical_map.astype(np.int64)))
        state.logical_to_physical_map.fill_(-1)
        state.logical_to_physical_map[:, :, : slots.shape[2]].copy_(torch.from_numpy(slots))
        state.logical_replica_count.copy_(torch.from_numpy(placement.logical_replica_count()))
