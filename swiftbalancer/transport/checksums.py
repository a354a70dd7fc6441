"""Checksums of a batch's experts, launched in portions and read together, in memory allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swiftbalancer.device import DeviceLayer
from swiftbalancer.verify import checksums_into


class ChecksumReader:
    """Launches on the current stream; `values` are those of all portions since `begin`, once the stream has run."""

    def __init__(self, layer: DeviceLayer) -> None:
        self._layer = layer
        self._num = 0
        self._grow(16)

    def begin(self, num_experts: int) -> None:
        """Room for so many; what was launched before must have run."""
        self._num = 0
        if num_experts > len(self._host):
            self._grow(2 * num_experts)

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
        self.launch([[data]])
        self._layer.current_stream().synchronize()
        self.begin(0)

    def _grow(self, room: int) -> None:
        self._sums = torch.zeros(room, dtype=torch.int64, device=self._layer.device)
        self._host = self._layer.pinned((room,), torch.int64)
