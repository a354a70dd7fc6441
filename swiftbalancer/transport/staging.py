"""Staging memory: where experts wait for the commit, and the copies that bring them to their slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from swiftbalancer.device import DeviceLayer
from swiftbalancer.kernels.segments import READ
from swiftbalancer.transport.block_copy import BlockCopy
from swiftbalancer.transport.experts import ExpertWeights, as_words
from swiftbalancer.transport.segment_table import SegmentTable


@dataclass(slots=True)
class CommitCopies:
    """Copies for the main stream: `targets[i]` (a live slot) from `sources[i]` (staging), grouped by dtype.

    Each inner list has one dtype, so `torch._foreach_copy_` fuses it. On a device with kernels of ours `launch`
    copies all dense tensors instead, so that the main thread pays for one launch.
    """

    targets: list[list[torch.Tensor]] = field(default_factory=list)
    sources: list[list[torch.Tensor]] = field(default_factory=list)
    launch: Callable[[], None] | None = None
    """Does the rest of the commit."""

    def enqueue(self, layer: DeviceLayer) -> None:
        """Launches the copies on the current stream; never waits."""
        for targets, sources in zip(self.targets, self.sources, strict=True):
            layer.copy_all(targets, sources)
        if self.launch is not None:  # last: it marks the end of the commit
            self.launch()


class Staging:
    """`[entries, entry_bytes]` uint8 of device memory, an expert per entry; allocated once.

    `memory` must outlive every write into it, also those of peers.
    """

    def __init__(
        self, memory: torch.Tensor, weights: ExpertWeights, *, beside: Callable[[], None], blocks: BlockCopy | None
    ) -> None:
        """`beside` is launched with every commit. `blocks`, where the device has it, does that as well, and has room
        for all of `memory`."""
        self.memory = memory
        self._weights = weights
        self._beside = beside
        self._blocks = blocks
        self._entries = memory.data_ptr() + entry_stride(weights) * np.arange(memory.numel() // entry_stride(weights))
        """`[entries]` addresses."""
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}

    @staticmethod
    def num_entries(weights: ExpertWeights, staging_bytes: int) -> int:
        """How many experts `staging_bytes` hold."""
        return staging_bytes // entry_stride(weights)

    def offset(self, entry: int, part_offset: int) -> int:
        """Byte offset of a tensor of an entry in `memory`."""
        return entry * entry_stride(self._weights) + part_offset

    def tensors(self, entry: int, layer: int) -> list[torch.Tensor]:
        """The tensors of the expert in an entry, each `[n]` uint8."""
        known = self._views.get((entry, layer))
        if known is None:
            parts = self._weights.parts(layer)
            starts = [self.offset(entry, part.offset) for part in parts]
            known = [self.memory[a : a + part.num_bytes] for a, part in zip(starts, parts, strict=True)]
            self._views[entry, layer] = known
        return known

    def commit_copies(self, arrivals: Sequence[tuple[int, int]]) -> CommitCopies:
        """The copies for `arrivals` `[(layer, local slot)]`, entry `i` holding arrival `i`.

        The kernel's table is on its way to the device on the current stream: wait for it before the copies are used.
        """
        groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for entry, kind in self._loose(arrivals):
            target, source = self._ends(entry, *arrivals[entry], kind)
            pair = groups.setdefault(target.dtype, ([], []))
            pair[0].append(target)
            pair[1].append(source)
        loose = [pair[0] for pair in groups.values()], [pair[1] for pair in groups.values()]
        if self._blocks is None:
            return CommitCopies(*loose, self._beside)
        self._fill(self._blocks.table, arrivals)
        return CommitCopies(*loose, self._blocks.launch)

    def _loose(self, arrivals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Entry and kind of the tensors that the kernel does not copy."""
        if self._blocks is not None and not self._weights.loose:
            return []
        return [
            (entry, kind)
            for entry, (layer, slot) in enumerate(arrivals)
            for kind, dense in enumerate(self._weights.flat(layer, slot))
            if self._weights.sizes[layer, kind] and (dense is None or self._blocks is None)
        ]

    def _fill(self, table: SegmentTable, arrivals: Sequence[tuple[int, int]]) -> None:
        """Few operations, since each costs microseconds under the interpreter's lock."""
        rows = table.rows(len(arrivals))
        if arrivals:
            layers, slots = np.array(arrivals).T
            rows[:] = self._weights.segments[layers, slots]
            rows[..., READ] = self._entries[: len(arrivals), None] + self._weights.offsets[layers]
        table.send(len(arrivals))

    def _ends(self, entry: int, layer: int, local_slot: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Target and source of one tensor in the same dtype and shape, as wide as both allow."""
        staged, dense = self.tensors(entry, layer)[kind], self._weights.flat(layer, local_slot)[kind]
        if dense is None:
            target = self._weights.slot(layer, local_slot)[kind].detach()
            return target, staged.view(target.dtype).view(target.shape)
        wide, wide_staged = as_words(dense), as_words(staged)
        return (wide, wide_staged) if wide.dtype == wide_staged.dtype else (dense, staged)


def entry_stride(weights: ExpertWeights) -> int:
    """Bytes from one staging entry to the next."""
    return -(-max(weights.entry_bytes, 1) // 256) * 256
