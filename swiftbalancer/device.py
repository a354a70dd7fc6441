"""Streams, events and host copies of one device: the only module that names a vendor.

Everything that orders work on a device goes through a `DeviceLayer`, so that the same code runs on CUDA, on
Ascend NPUs and, synchronously, on a CPU, and so that a test can run it on a scripted device whose copies land
late. Operations are handed to `launch`, which runs them on the current stream.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Protocol

import torch
from typing_extensions import override

from swiftbalancer.errors import ConfigError

COLLECTIVE_BACKEND = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """True once everything before the point has run; never waits."""

    def synchronize(self) -> None:
        """Blocks the calling thread, without the GIL, until the point has run; not for the forward path."""


class Stream(Protocol):
    """A queue of device work, of torch's own classes on an accelerator."""

    def synchronize(self) -> None: ...


class DeviceLayer(ABC):
    """What swiftbalancer needs of a device. Streams and events it returns belong to the caller."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def for_device(device: torch.device | str) -> DeviceLayer:
        """The layer of a device; raises `ConfigError` if its vendor's torch extension is not usable here."""
        vendor = str(device).partition(":")[0]
        if vendor not in COLLECTIVE_BACKEND:
            raise ConfigError(f"device: unknown {vendor!r}; known: {', '.join(sorted(COLLECTIVE_BACKEND))}")
        if vendor == "cpu":
            return HostLayer(torch.device(device))
        module = _device_module(vendor)  # before torch.device, which knows `npu` only once torch_npu is loaded
        return AcceleratorLayer(torch.device(device), module)

    @property
    def backend(self) -> str:
        """The collective library of this device: nccl, hccl or gloo."""
        return COLLECTIVE_BACKEND[self.device.type]

    @property
    def is_accelerator(self) -> bool:
        """True where work runs later than it is launched."""
        return self.device.type != "cpu"

    @property
    def collective_version(self) -> tuple[int, ...]:
        """The version of the collective library, where it can be asked for; empty elsewhere."""
        if self.device.type != "cuda":
            return ()
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        return version

    @property
    def can_share_memory(self) -> bool:
        """Whether processes of one host can write into each other's memory of this device (`peer_memory`)."""
        return self.device.type == "cuda"

    @property
    def num_devices(self) -> int:
        """Devices of this kind that the process can use."""
        return 1

    @abstractmethod
    def side_stream(self) -> Stream:
        """A new stream of low priority beside the main one."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream of the calling thread."""

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """A context in which the calling thread launches on `stream`."""

    @abstractmethod
    def event(self, *, timing: bool = False) -> Event:
        """A new event, not yet recorded; a thread that waits for it sleeps."""

    @abstractmethod
    def record(self, event: Event, stream: Stream | None = None) -> None:
        """Marks the present end of `stream` (default: the current one) with `event`."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """Makes later work of `stream` wait for `event`; the host does not wait."""

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory a device copies to and from without blocking."""

    @abstractmethod
    def bind_thread(self) -> None:
        """Makes this device the calling thread's current one; a new thread starts on device 0 otherwise."""

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks until the device has run all that was launched, on any stream; not for the forward path."""

    def launch(self, op: Callable[..., Any], *args: Any) -> None:
        """Runs `op(*args)` on the current stream. `op` works in place and its result is dropped."""
        op(*args)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies between host and device, or within one; does not block when host memory is pinned."""
        self.launch(_copy, target, source)

    def copy_all(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """One fused copy of many tensors; addresses never change, so captured graphs stay valid."""
        if targets:
            self.launch(torch._foreach_copy_, targets, sources)


class HostLayer(DeviceLayer):
    """The CPU: every operation has run when its call returns, so streams and events are only names."""

    @override
    def side_stream(self) -> Stream:
        return _HostStream()

    @override
    def current_stream(self) -> Stream:
        return _HostStream()

    @override
    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        return nullcontext(stream)

    @override
    def event(self, *, timing: bool = False) -> Event:
        return _HostEvent()

    @override
    def record(self, event: Event, stream: Stream | None = None) -> None:
        return None

    @override
    def wait(self, stream: Stream, event: Event) -> None:
        return None

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    @override
    def bind_thread(self) -> None:
        return None

    @override
    def synchronize(self) -> None:
        return None


class AcceleratorLayer(DeviceLayer):
    """CUDA and NPU alike, on torch's device module (`torch.cuda`, `torch.npu`)."""

    def __init__(self, device: torch.device, module: Any) -> None:
        index = module.current_device() if device.index is None else device.index
        super().__init__(torch.device(device.type, index))
        self._module = module

    @property
    def num_devices(self) -> int:
        return int(self._module.device_count())

    def side_stream(self) -> Stream:
        stream: Stream = self._module.Stream(device=self.device, priority=0)
        return stream

    def current_stream(self) -> Stream:
        stream: Stream = self._module.current_stream(self.device)
        return stream

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def event(self, *, timing: bool = False) -> Event:
        event: Event = self._module.Event(enable_timing=timing, blocking=True)
        return event

    def record(self, event: Event, stream: Stream | None = None) -> None:
        target: Any = event
        target.record(self.current_stream() if stream is None else stream)

    def wait(self, stream: Stream, event: Event) -> None:
        waiter: Any = stream
        waiter.wait_event(event)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def bind_thread(self) -> None:
        self._module.set_device(self.device)

    def synchronize(self) -> None:
        self._module.synchronize(self.device)


class _HostEvent:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class _HostStream:
    def synchronize(self) -> None:
        return None


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _device_module(vendor: str) -> ModuleType:
    """`torch.cuda` or `torch.npu`; raises `ConfigError` with one line on what is missing."""
    if vendor == "npu":
        _load_npu()
    module: ModuleType | None = getattr(torch, vendor, None)
    if module is None or not module.is_available():
        raise ConfigError(f"device: torch {torch.__version__} sees no {vendor} device in this process")
    return module


def _load_npu() -> None:
    """Registers torch's `npu` device. Torch may do so itself at import; the base install never needs it."""
    try:
        importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        raise ConfigError(f"device: npu needs torch_npu ({error.name} is not installed)") from error
    except (ImportError, OSError, RuntimeError) as error:
        home = os.environ.get("ASCEND_HOME_PATH", "not set")
        raise ConfigError(
            f"device: torch_npu does not load ({error}); is CANN there? ASCEND_HOME_PATH is {home}"
        ) from error
