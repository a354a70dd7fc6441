"""What accelerators of all vendors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from typing_extensions import override

from swiftbalancer.device.layer import DeviceLayer, Event, Stream
from swiftbalancer.errors import ConfigError


class AcceleratorLayer(DeviceLayer):
    """On the device module of a vendor, which all have the same names.

    Streams and events are the module's own: `torch.Event` takes `blocking` and ignores it (torch 2.13), so that a
    thread of ours would spin where it should sleep, and a module's events do not take `torch.Stream`.
    """

    def __init__(self, device: torch.device, module: Any) -> None:
        """Raises `ConfigError` if the process sees no device of that number."""
        index = module.current_device() if device.index is None else device.index
        if index >= module.device_count():
            raise ConfigError(f"device: {device} is not there, this process sees {module.device_count()}")
        super().__init__(torch.device(device.type, index))
        self._module = module

    @property
    @override
    def num_devices(self) -> int:
        return int(self._module.device_count())

    @override
    def side_stream(self) -> Stream:
        stream: Stream = self._module.Stream(device=self.device, priority=0)
        return stream

    @override
    def current_stream(self) -> Stream:
        stream: Stream = self._module.current_stream(self.device)
        return stream

    @override
    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    @override
    def event(self, *, timing: bool = False) -> Event:
        event: Event = self._module.Event(enable_timing=timing, blocking=True)
        return event

    @override
    def record(self, event: Event, stream: Stream | None = None) -> None:
        target: Any = event
        target.record(self.current_stream() if stream is None else stream)

    @override
    def wait(self, stream: Stream, event: Event) -> None:
        waiter: Any = stream
        waiter.wait_event(event)

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    @override
    def bind_thread(self) -> None:
        self._module.set_device(self.device)

    @override
    def synchronize(self) -> None:
        self._module.synchronize(self.device)


def device_module(vendor: str) -> Any:
    """torch's module of a device type; raises `ConfigError` if the process sees no such device."""
    module = getattr(torch, vendor, None)
    if module is None or not module.is_available():
        raise ConfigError(f"device: torch {torch.__version__} sees no {vendor} device in this process")
    return module
