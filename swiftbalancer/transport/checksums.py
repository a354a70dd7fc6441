"""Checksums of a batch's experts, read together, in memory allocated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import nothing
from swiftbalancer.transport.segment_table import SegmentTable
from swiftbalancer.verify import checksums_into


class ChecksumReader:
    """Launches on the current stream; `values` are there once the stream has run."""

    def __init__(self, layer: DeviceLayer, *, num_experts: int, table: SegmentTable | None, record: bool) -> None:
        """Room for `num_experts`. `table` is where there is a kernel, and has no rows yet.

        `record` makes launches cheaper. It is for an engine at rest, see `BlockCopy`.
        """
        self._layer = layer
        self.table = table
        self.launch_table: Callable[[], None] = nothing
        """Sums the experts of the table, whose memory must stay until the stream has run."""
        self._make_room(num_experts, record=record)

    def launch(self, experts: Sequence[Sequence[torch.Tensor]], *, first: int) -> None:
        """Without a table: experts number `first` and so on, each a list of `[n]` uint8 on the device.

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
        if self.table is None:
            self.launch([[torch.zeros(64, dtype=torch.uint8, device=self._layer.device)]], first=0)
        self._layer.current_stream().synchronize()

    def fit(self, num_experts: int) -> None:
        """Makes room for so many, where launches cost more from then on; what was launched before must have run."""
        if num_experts > len(self._sums):
            self.table = None if self.table is None else self.table.larger(2 * num_experts)
            self._make_room(2 * num_experts, record=False)

    def _make_room(self, room: int, *, record: bool) -> None:
        layer, table = self._layer, self.table
        sums = self._sums = torch.zeros(room, dtype=torch.int64, device=layer.device)
        host = self._host = layer.pinned((room,), torch.int64)
        if table is None:
            return
        from swiftbalancer.kernels.checksum import add

        def launch() -> None:
            layer.launch(torch.Tensor.zero_, sums)
            layer.launch(add, sums, table.on_device)
            layer.copy(host, sums)

        launch()  # of a table without rows, to compile it now
        self.launch_table = layer.recorded(launch, loaded=True) if record else launch
