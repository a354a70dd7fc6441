"""The commit's copies as one launch, on devices with kernels of ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer
from swiftbalancer.device.operators import has_kernels


class BlockCopy:
    """A launch that copies what its table says; the table is filled anew for each batch, off the forward path."""

    def __init__(
        self, layer: DeviceLayer, *, num_bytes: int, num_blocks: int, beside: Callable[[], None], record: bool
    ) -> None:
        """For at most `num_blocks` blocks of `num_bytes` in all, on the current stream.

        `beside` launches what else belongs to every commit, always the same; its kernels have run before. It does not
        run now. `record` makes later launches cheaper, and may fail beside an engine that frees device memory just
        then: it is for an engine at rest.
        """
        from swiftbalancer.kernels.copy_blocks import copy_tiles, table_size

        self._layer = layer
        size = (table_size(num_bytes, num_blocks),)
        self._table = table = torch.zeros(size, dtype=torch.int64, device=layer.device)
        self._host = layer.pinned(size, torch.int64)

        def launch() -> None:
            layer.launch(copy_tiles, table)
            beside()

        layer.launch(copy_tiles, table)  # empty as yet: to compile it now
        self.launch = layer.recorded(launch, loaded=True) if record else launch

    @staticmethod
    def usable(layer: DeviceLayer) -> bool:
        """Whether the device has kernels of ours."""
        return has_kernels(layer.device)

    def fill(self, blocks: NDArray[np.int64]) -> None:
        """What `launch` is to copy next: `[n, 3]`, addresses to read and to write on the device, and bytes.

        The table goes there on the current stream; no launch may still have to read the one before, nor that copy
        still be under way.
        """
        from swiftbalancer.kernels.copy_blocks import tile_table

        values = torch.from_numpy(tile_table(blocks))
        self._host[: len(values)] = values
        self._layer.copy(self._table[: len(values)], self._host[: len(values)])
