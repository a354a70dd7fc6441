"""Checksums of a batch's experts, launched in portions and read together, in memory allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer
from swiftbalancer.device.operators import has_kernels
from swiftbalancer.verify import checksums_into

IntArray = NDArray[np.int64]


class ChecksumReader:
    """Launches on the current stream; `values` are those of all portions since `begin`, once the stream has run."""

    def __init__(self, layer: DeviceLayer, *, num_experts: int, num_tensors: int, record: bool) -> None:
        """Room for `num_experts` of `num_tensors` each; more than that makes new room, and launches cost more then.

        `record` makes launches cheaper. It is for start-up only, see `BlockCopy`.
        """
        self._layer = layer
        self._num_tensors = num_tensors
        self._num = 0
        self._make_room(num_experts, record=record)

    def begin(self, num_experts: int) -> None:
        """Room for so many; what was launched before must have run."""
        self._num = 0
        if num_experts > len(self._sums):
            self._make_room(2 * num_experts, record=False)
        elif self._kernel is not None:
            self._kernel.begin()

    @property
    def by_address(self) -> bool:
        """Whether there is a kernel, for `launch_at`; else `launch` is for this device."""
        return self._kernel is not None

    def launch_at(self, addresses: IntArray, sizes: IntArray) -> None:
        """The next experts, `[n, tensors]`, by address on the device and bytes; the memory must stay until the stream
        has run."""
        assert self._kernel is not None
        self._kernel.launch(addresses, sizes, first=self._num)
        self._num += len(sizes)

    def launch(self, experts: Sequence[Sequence[torch.Tensor]]) -> None:
        """The next experts, each a list of `[n]` uint8 on the device, which must stay until the stream has run."""
        portion = slice(self._num, self._num + len(experts))
        self._num = portion.stop
        self._layer.launch(checksums_into, self._sums[portion], experts)
        self._layer.copy(self._host[portion], self._sums[portion])

    def values(self) -> list[int]:
        """In the order launched; the caller has waited for the stream."""
        values: list[int] = self._host[: self._num].tolist()
        return values

    def rehearse(self) -> None:
        """Compiles what it takes now, not beside the first steps that move."""
        data = torch.zeros(64, dtype=torch.uint8, device=self._layer.device)
        if self.by_address:
            self.launch_at(np.array([[data.data_ptr()]]), np.array([[data.numel()]]))
        else:
            self.launch([[data]])
        self._layer.current_stream().synchronize()
        self.begin(0)

    def _make_room(self, room: int, *, record: bool) -> None:
        self._sums = torch.zeros(room, dtype=torch.int64, device=self._layer.device)
        self._host = self._layer.pinned((room,), torch.int64)
        self._kernel: _Kernel | None = None
        if has_kernels(self._layer.device):
            num_segments = room * self._num_tensors
            self._kernel = _Kernel(self._layer, self._sums, self._host, num_segments=num_segments, record=record)


class _Kernel:
    """One launch for a portion, always the same: its table is on the device, and another once that one has run."""

    def __init__(
        self, layer: DeviceLayer, sums: torch.Tensor, host: torch.Tensor, *, num_segments: int, record: bool
    ) -> None:
        from swiftbalancer.kernels.checksum import add, table_size

        self._layer = layer
        self._sums = sums
        self._table = torch.zeros(table_size(num_segments), dtype=torch.int64, device=layer.device)
        # A portion's part is not written again before `begin`: its copy to the device may still be under way.
        self._parts = layer.pinned((num_segments + len(self._table),), torch.int64)
        self._used = 0

        def launch() -> None:
            layer.launch(add, sums, self._table)
            layer.copy(host, sums)

        launch()  # with an empty table, to compile it now
        self._launch = layer.recorded(launch) if record else launch

    def begin(self) -> None:
        self._used = 0
        self._layer.launch(self._sums.zero_)

    def launch(self, addresses: IntArray, sizes: IntArray, *, first: int) -> None:
        from swiftbalancer.kernels.checksum import segment_table

        values = torch.from_numpy(segment_table(addresses, sizes, first=first))
        part = self._parts[self._used : self._used + len(values)]
        self._used += len(values)
        part.copy_(values)
        self._layer.copy(self._table[: len(values)], part)
        self._launch()
