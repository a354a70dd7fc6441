"""The weights of a rank's slots as plain bytes, whatever their dtype and strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from swiftbalancer.border import ExpertTensor
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer.kernels.segments import BYTES, COLUMNS, FIRST_WORD, READ, WRITE, first_words

ALIGNMENT = 256
"""Bytes; each tensor begins at such a boundary in staging memory, as kernels and copy engines like it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor of an expert lies in a staging entry, in bytes."""

    offset: int
    num_bytes: int
    divisible: bool
    """Whether the slot's memory is one dense block, which may travel in pieces without packing."""


class ExpertWeights:
    """All expert tensors of this rank: `[layers][kinds]`, each indexable by local slot.

    Every rank must bind tensors of the same shapes, dtypes and strides, layer by layer. The engine owns them.
    """

    def __init__(self, weights: Sequence[Sequence[ExpertTensor]], *, slots_per_rank: int) -> None:
        self._weights = [list(kinds) for kinds in weights]
        self.slots_per_rank = slots_per_rank
        self.num_layers = len(self._weights)
        self._parts = [self._layout(layer) for layer in range(self.num_layers)]
        # Made once: a view costs microseconds under the interpreter's lock, which the forward path needs, too.
        self._flat = [
            [[dense_bytes(tensor) for tensor in self.slot(layer, slot)] for slot in range(slots_per_rank)]
            for layer in range(self.num_layers)
        ]
        self.num_kinds = max(map(len, self._parts), default=0)
        """Tensors an expert has, in the layer that has most."""
        self.sizes = np.zeros((self.num_layers, self.num_kinds), np.int64)
        """Bytes of each tensor; 0 for none."""
        self.offsets = np.zeros_like(self.sizes)
        """Where each lies in a staging entry."""
        self.segments = np.zeros((self.num_layers, slots_per_rank, self.num_kinds, COLUMNS), np.int64)
        """Of each tensor in each slot, its row in a table of kernels, read and written at its own address; that is 0
        for none, and for one that is not a dense block."""
        self._fill_tables()
        self.loose = bool(((self.segments[..., READ] == 0) & (self.segments[..., BYTES] > 0)).any())
        """Whether there are tensors that are not dense blocks."""
        self.entry_bytes = max((_end(parts) for parts in self._parts), default=0)

    def slot(self, layer: int, local_slot: int) -> list[torch.Tensor]:
        """The live tensors of one slot."""
        return [kind[local_slot] for kind in self._weights[layer]]

    def flat(self, layer: int, local_slot: int) -> list[torch.Tensor | None]:
        """The slot's tensors as `[n]` uint8 sharing their memory; None for one that is not a dense block."""
        return self._flat[layer][local_slot]

    def parts(self, layer: int) -> list[Part]:
        """The layout of one expert of a layer in a staging entry."""
        return self._parts[layer]

    def payload_bytes(self, layer: int) -> int:
        """Bytes of one expert of a layer that travel."""
        return self._payloads[layer]

    @property
    def device(self) -> torch.device:
        return self.slot(0, 0)[0].device

    def _fill_tables(self) -> None:
        """Numbers for kernels' tables, so that a batch's take no loop under the interpreter's lock."""
        for layer, parts in enumerate(self._parts):
            self.sizes[layer, : len(parts)] = [part.num_bytes for part in parts]
            self.offsets[layer, : len(parts)] = [part.offset for part in parts]
            for slot, blocks in enumerate(self._flat[layer]):
                known = [0 if block is None else block.data_ptr() for block in blocks]
                self.segments[layer, slot, : len(parts), READ] = known
        self.segments[..., WRITE] = self.segments[..., READ]
        self.segments[..., BYTES] = self.sizes[:, None]
        self.segments[..., FIRST_WORD] = first_words(self.sizes)[:, None]
        self._payloads: list[int] = self.sizes.sum(1).tolist()

    def _layout(self, layer: int) -> list[Part]:
        parts: list[Part] = []
        for number, kind in enumerate(self._weights[layer]):
            if len(kind) < self.slots_per_rank:
                raise UnsupportedEngine(
                    f"layer {layer}: expert tensor {number} has {len(kind)} slots, "
                    f"this rank holds {self.slots_per_rank}"
                )
            tensor = kind[0]
            offset = -(-_end(parts) // ALIGNMENT) * ALIGNMENT
            parts.append(Part(offset, tensor.numel() * tensor.element_size(), dense_bytes(tensor) is not None))
        return parts


def dense_bytes(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor's memory as `[n]` uint8, sharing storage; None if it has gaps or overlaps.

    Dimensions are taken in the order of their strides, so transposed weights qualify. Equal strides on both
    ends make equal bytes equal weights.
    """
    order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], -tensor.shape[dim]))
    ordered = tensor.detach().permute(order)
    return ordered.reshape(-1).view(torch.uint8) if ordered.is_contiguous() else None


def as_words(data: torch.Tensor) -> torch.Tensor:
    """`[n]` uint8 seen as int64 where length and address allow, so that copies run in few, wide accesses."""
    wide = data.numel() % 8 == 0 and data.data_ptr() % 8 == 0
    return data.view(torch.int64) if wide else data


def _end(parts: Sequence[Part]) -> int:
    return parts[-1].offset + parts[-1].num_bytes if parts else 0
