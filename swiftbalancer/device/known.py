"""The devices there are, by torch's names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from swiftbalancer.device.cuda import CudaLayer
from swiftbalancer.device.host import HostLayer
from swiftbalancer.device.layer import DeviceLayer
from swiftbalancer.device.npu import NpuLayer
from swiftbalancer.errors import ConfigError
from swiftbalancer.vendors import DEVICES

LAYERS: dict[str, Callable[[str], DeviceLayer]] = {"cpu": HostLayer, "cuda": CudaLayer, "npu": NpuLayer}


def layer_of(device: torch.device | str) -> DeviceLayer:
    """The layer of a device; raises `ConfigError` for an unknown one, or one that cannot be used here."""
    vendor, colon, index = str(device).partition(":")
    if vendor not in LAYERS:
        raise ConfigError(f"device: unknown {vendor!r}; known: {', '.join(DEVICES)}")
    if colon and not index.isdecimal():
        raise ConfigError(f"device: {str(device)!r} has no number after the colon, as in {vendor}:0")
    return LAYERS[vendor](str(device))


def best_layer() -> DeviceLayer:
    """The layer of the first accelerator that works, else the CPU's."""
    for vendor in reversed(DEVICES[1:]):
        try:
            return layer_of(vendor)
        except ConfigError:
            continue
    return layer_of(DEVICES[0])
