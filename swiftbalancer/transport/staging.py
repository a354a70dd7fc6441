"""Staging memory: where experts wait for the commit, and the copies that bring them to their slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import nothing
from swiftbalancer.transport.block_copy import BlockCopy
from swiftbalancer.transport.experts import ExpertWeights, as_words

IntArray = NDArray[np.int64]


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

    def commit_copies(self, arrivals: list[tuple[int, int]], rest: Callable[[], None] = nothing) -> CommitCopies:
        """The copies for `arrivals` `[(layer, local slot)]`, entry `i` holding arrival `i`.

        `rest` is called amid the work. Tables are on their way to the device on the current stream: wait
        for it before the copies are used.
        """
        layers, slots = (np.array([arrival[end] for arrival in arrivals], np.int64) for end in (0, 1))
        sizes, targets = self._weights.sizes[layers], self._weights.addresses[layers, slots]
        in_blocks = (targets > 0) & (sizes > 0) & (self._blocks is not None)
        groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for entry, kind in np.argwhere((sizes > 0) & ~in_blocks).tolist():
            target, source = self._ends(entry, *arrivals[entry], kind)
            pair = groups.setdefault(target.dtype, ([], []))
            pair[0].append(target)
            pair[1].append(source)
        loose = [pair[0] for pair in groups.values()], [pair[1] for pair in groups.values()]
        if self._blocks is None:
            return CommitCopies(*loose, self._beside)
        sources = self.addresses(np.arange(len(arrivals)), layers)
        blocks = np.stack([sources, targets, sizes], axis=-1)[in_blocks]
        rest()
        self._blocks.fill(blocks)
        return CommitCopies(*loose, self._blocks.launch)

    def addresses(self, entries: IntArray, layers: IntArray) -> IntArray:
        """`[n, kinds]` of the tensors of experts of `layers` `[n]` in `entries` `[n]`."""
        starts: IntArray = entries[:, None] * entry_stride(self._weights) + self._weights.offsets[layers]
        return starts + self.memory.data_ptr()

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
