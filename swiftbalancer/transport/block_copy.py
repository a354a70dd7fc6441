"""The commit's copies as one launch, on devices with kernels of ours."""

from __future__ import annotations

from collections.abc import Callable

from swiftbalancer.device import DeviceLayer
from swiftbalancer.device.operators import has_kernels
from swiftbalancer.transport.segment_table import SegmentTable


class BlockCopy:
    """A launch that copies what its table says; the table is filled anew for each batch, off the forward path."""

    def __init__(self, layer: DeviceLayer, table: SegmentTable, *, beside: Callable[[], None], record: bool) -> None:
        """`table` has no rows yet.

        `beside` launches what else belongs to every commit, always the same; its kernels have run before. It does not
        run now. `record` makes later launches cheaper, and may fail beside an engine that frees device memory just
        then: it is for an engine at rest.
        """
        from swiftbalancer.kernels.copy_blocks import copy_blocks

        self.table = table

        def launch() -> None:
            layer.launch(copy_blocks, table.on_device)
            beside()

        layer.launch(copy_blocks, table.on_device)  # to compile it now
        self.launch = layer.recorded(launch, loaded=True) if record else launch

    @staticmethod
    def usable(layer: DeviceLayer) -> bool:
        """Whether the device has kernels of ours."""
        return has_kernels(layer.device)
