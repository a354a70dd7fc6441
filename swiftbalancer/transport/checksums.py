"""Checksums of a batch's experts, read together, in memory allocated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer
from swiftbalancer.device.operators import has_kernels
from swiftbalancer.verify import checksums_into

IntArray = NDArray[np.int64]


class ChecksumReader:
    """Launches on the current stream; `values` are there once the stream has run."""

    def __init__(self, layer: DeviceLayer, *, num_experts: int, num_tensors: int, record: bool) -> None:
        """Room for `num_experts` of `num_tensors` each; more than that makes new room, and launches cost more then.

        `record` makes launches cheaper. It is for an engine at rest, see `BlockCopy`.
        """
        self._layer = layer
        self._num_tensors = num_tensors
        self._make_room(num_experts, record=record)

    @property
    def by_address(self) -> bool:
        """Whether there is a kernel, for `prepare`; else `launch` is for this device."""
        return self._kernel is not None

    def prepare(self, addresses: IntArray, sizes: IntArray) -> Callable[[], None]:
        """Makes ready, and gives what launches: experts `[n, tensors]`, by address on the device and bytes.

        What was launched before must have run. The memory must stay until the stream has run.
        """
        self.fit(len(sizes))
        assert self._kernel is not None
        return self._kernel.fill(addresses, sizes)

    def launch(self, experts: Sequence[Sequence[torch.Tensor]], *, first: int) -> None:
        """Experts number `first` and so on, each a list of `[n]` uint8 on the device.

        They must stay until the stream has run. There must be room, see `fit`.
        """
        portion = slice(first, first + len(experts))
        self._layer.launch(checksums_into, self._sums[portion], experts)
        self._layer.copy(self._host[portion], self._sums[portion])

    def values(self, num_experts: int) -> list[int]:
        """Of the first so many, in the order launched; the caller has waited for the stream."""
        values: list[int] = self._host[:num_experts].tolist()
        return values

    def rehearse(self) -> None:
        """Compiles what it takes now, not beside the first steps that move."""
        data = torch.zeros(64, dtype=torch.uint8, device=self._layer.device)
        if self.by_address:
            self.prepare(np.array([[data.data_ptr()]]), np.array([[data.numel()]]))()
        else:
            self.launch([[data]], first=0)
        self._layer.current_stream().synchronize()

    def fit(self, num_experts: int) -> None:
        """Makes room for so many; what was launched before must have run."""
        if num_experts > len(self._sums):
            self._make_room(2 * num_experts, record=False)

    def _make_room(self, room: int, *, record: bool) -> None:
        self._sums = torch.zeros(room, dtype=torch.int64, device=self._layer.device)
        self._host = self._layer.pinned((room,), torch.int64)
        self._kernel: _Kernel | None = None
        if has_kernels(self._layer.device):
            num_segments = room * self._num_tensors
            self._kernel = _Kernel(self._layer, self._sums, self._host, num_segments=num_segments, record=record)


class _Kernel:
    """One launch for a batch, always the same: its table is on the device, and another once that one has run."""

    def __init__(
        self, layer: DeviceLayer, sums: torch.Tensor, host: torch.Tensor, *, num_segments: int, record: bool
    ) -> None:
        from swiftbalancer.kernels.checksum import add, table_size

        self._layer = layer
        self._table = table = torch.zeros(table_size(num_segments), dtype=torch.int64, device=layer.device)
        self._on_host = layer.pinned((len(self._table),), torch.int64)

        def launch() -> None:
            layer.launch(torch.Tensor.zero_, sums)
            layer.launch(add, sums, table)
            layer.copy(host, sums)

        launch()  # with an empty table, to compile it now
        self._launch = layer.recorded(launch, loaded=True) if record else launch

    def fill(self, addresses: IntArray, sizes: IntArray) -> Callable[[], None]:
        from swiftbalancer.kernels.checksum import segment_table

        values = torch.from_numpy(segment_table(addresses, sizes))
        part = self._on_host[: len(values)]
        part.copy_(values)
        self._layer.copy(self._table[: len(values)], part)
        return self._launch
