"""Expert weights in Ascend's private memory formats, made movable as plain bytes.

Quantised weights lie in FRACTAL_NZ: the shape is the matrix's, the bytes are in another order. Copying bytes
between two experts of one kind is right whatever the order is, but operators on such a tensor may convert it.
So the transport gets aliases: the same memory under a plain format.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch

from swiftbalancer.device import DeviceLayer
from swiftbalancer.errors import UnsupportedEngine


class Formats(Protocol):
    """How tensors lie in memory."""

    def is_private(self, _tensor: torch.Tensor) -> bool:
        """Whether the bytes are in another order than shape and strides say."""

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory as a tensor of a plain format; it does not keep the memory alive."""


class EngineFormats:
    """The device's formats; aliases by vllm-ascend's operator for weak references, a tensor over a given address."""

    def __init__(self, device: DeviceLayer) -> None:
        self._device = device

    def is_private(self, _tensor: torch.Tensor) -> bool:
        return self._device.has_private_format(_tensor)

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        alias: torch.Tensor = importlib.import_module("vllm_ascend.utils").weak_ref_tensor(tensor)
        return alias


def plain(kind: Sequence[torch.Tensor], formats: Formats, *, where: str) -> list[torch.Tensor]:
    """One expert weight of all slots, safe to move as bytes. The originals must outlive the result.

    Raises `UnsupportedEngine` if a private format pads a weight, since an alias would miss the padding.
    """
    if not formats.is_private(kind[0]):
        return list(kind)
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in kind)
    for tensor in kind:
        storage = tensor.untyped_storage()
        held, known = storage.nbytes(), sharing[storage.data_ptr()] * tensor.numel() * tensor.element_size()
        if held != known or not tensor.is_contiguous():
            raise UnsupportedEngine(
                f"{where}: an expert weight of shape {tuple(tensor.shape)} holds {held} bytes in a private format, "
                f"{known} expected; set VLLM_ASCEND_ENABLE_NZ=0, or drop the swiftbalancer flag"
            )
    return [formats.alias(tensor) for tensor in kind]
