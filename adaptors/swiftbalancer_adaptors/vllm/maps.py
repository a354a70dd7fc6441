"""vLLM's expert maps, written in place.

vLLM's kernels send a token to `logical_to_physical_map[layer, expert, hash(token) % logical_replica_count]`.
We fix the count at the width of our dispatch table and write the table there: a slot that stands in more columns
gets a larger share, with no change to any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer, Event
from swiftbalancer.dispatch import uniform_table
from swiftbalancer.placement import Placement

NUM_BUFFERS = 2
"""One update is committed while the next is prepared."""


@dataclass(slots=True, eq=False)
class _Side:
    """The three parts of an update, on the host (pinned) or on the device; int64, as vLLM's maps are."""

    layers: torch.Tensor
    rows: torch.Tensor
    table: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.layers, self.rows, self.table


@dataclass(slots=True, eq=False)
class PreparedMaps:
    """New maps of some layers on their way to the device; `copied` is when they are there."""

    host: _Side
    device: _Side
    copied: Event
    consumed: Event
    write: Callable[[], None]
    """Launches the copies to vLLM's maps."""
    filled: tuple[torch.Tensor, ...] = ()
    """The rows of `device` that this update fills."""


class VllmMaps:
    """Writes `physical_to_logical_map`, `logical_to_physical_map` and `logical_replica_count` of one model.

    The maps are vLLM's tensors `[layers, slots]`, `[layers, experts, 1024]` and `[layers, experts]`, all int64.
    Buffers are allocated once; `prepare` runs on one thread at a time.
    """

    def __init__(self, model_state: Any, device: DeviceLayer, *, width: int) -> None:
        self._state = model_state
        self._device = device
        self._stream = device.side_stream()
        self.width = width
        self._live_columns = model_state.logical_to_physical_map[:, :, :width]
        self._next = 0
        self._buffers = [self._buffer() for _ in range(NUM_BUFFERS)]

    def _buffer(self) -> PreparedMaps:
        layers, slots = self._state.physical_to_logical_map.shape
        experts = self._state.logical_to_physical_map.shape[1]
        shapes = ((layers,), (layers, slots), (layers, experts, self.width))
        host = _Side(*(self._device.pinned(shape, torch.int64) for shape in shapes))
        target = self._state.logical_to_physical_map.device
        device = _Side(*(torch.zeros(shape, dtype=torch.int64, device=target) for shape in shapes))
        device.layers.copy_(torch.arange(layers))
        device.rows.copy_(self._state.physical_to_logical_map)
        device.table.copy_(self._live_columns)

        def write() -> None:
            self._device.launch(self._state.physical_to_logical_map.index_copy_, 0, device.layers, device.rows)
            self._device.launch(self._live_columns.index_copy_, 0, device.layers, device.table)

        copied, consumed = self._device.event(), self._device.event()
        return PreparedMaps(host, device, copied, consumed, self._device.recorded(write))

    def prepare(self, update: MapUpdate) -> PreparedMaps:
        """Copies an update to the device on a stream of our own; may wait for an older commit to be done.

        Launches that are recorded write as many rows each time: what an update of fewer layers leaves repeats its
        first.
        """
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % NUM_BUFFERS
        buffer.copied.synchronize()
        buffer.consumed.synchronize()
        num = len(update.layers)
        parts: tuple[NDArray[np.integer], ...] = (update.layers, update.physical_to_logical_map, update.table)
        with self._device.on(self._stream):
            for host, device, values in zip(buffer.host.tensors(), buffer.device.tensors(), parts, strict=True):
                np.copyto(host[:num].numpy(), values)
                self._device.copy(device[:num], host[:num])
                if num < len(device):
                    self._device.copy(device[num:], device[:1].expand(len(device) - num, *device.shape[1:]))
            self._device.record(buffer.copied)
        layers, rows, table = buffer.device.tensors()
        buffer.filled = layers[:num], rows[:num], table[:num]
        return buffer

    def commit(self, prepared: PreparedMaps) -> None:
        """Enqueues the writes on the current stream: two kernels, whatever the number of layers."""
        self._device.wait(self._device.current_stream(), prepared.copied)
        prepared.write()
        self._device.record(prepared.consumed)

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

    def write_for_vllm(self, placement: Placement) -> None:
        """Puts a placement in force the way vLLM itself writes it: each replica once, counts true."""
        state = self._state
        slots = placement.logical_to_physical_map()
        state.physical_to_logical_map.copy_(torch.from_numpy(placement.physical_to_logical_map.astype(np.int64)))
        state.logical_to_physical_map.fill_(-1)
        state.logical_to_physical_map[:, :, : slots.shape[2]].copy_(torch.from_numpy(slots))
        state.logical_replica_count.copy_(torch.from_numpy(placement.logical_replica_count()))
