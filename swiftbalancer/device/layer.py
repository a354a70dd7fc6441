"""What the rest of swiftbalancer asks of a device, whatever its vendor.

Everything that orders work on a device goes through a `DeviceLayer`, so that the same code runs on every
accelerator and, synchronously, on a CPU, and so that a test can run it on a scripted device whose copies land
late. Operations are handed to `launch`, which runs them on the current stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device.collective import Collective
from swiftbalancer.device.peer_memory import PeerMemory
from swiftbalancer.errors import TransferFailed


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

    collective: Collective
    """The collective library of this device."""
    is_accelerator = True
    """True where work runs later than it is launched."""
    can_share_memory = False
    """Whether processes of one host can write into each other's memory of this device, see `peer_memory`."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    @staticmethod
    def for_device(device: torch.device | str) -> DeviceLayer:
        """The layer of a device; raises `ConfigError` if its vendor's torch extension is not usable here."""
        from swiftbalancer.device.known import layer_of

        return layer_of(device)

    @property
    def backend(self) -> str:
        """The collective library by torch's name for it."""
        return self.collective.name

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

    def reach(self, _memory: NDArray[np.uint8]) -> Callable[[], None] | None:
        """Lets the device write to host memory of ours as to `pinned` memory, until what this gives is called.

        The memory begins with a page. None where that cannot be.
        """
        return None

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

    def recorded(
        self,
        work: Callable[[], None],
        *,
        loaded: bool = False,  # noqa: ARG002 - for devices that record
    ) -> Callable[[], None]:
        """`work`, whose launches are the same each time, made cheap to repeat where the device can record them.

        It may run once or twice now, but does not where all its kernels are `loaded`, having run before. What it
        launches must use the same memory whenever it is called, and what only `work` refers to lives as long as the
        result. An event that it records is recorded by every call.
        """
        return work

    def peer_memory(self) -> PeerMemory:
        """New memory that peers may map; raises `TransferFailed` where `can_share_memory` is False."""
        raise TransferFailed(f"{self.device.type} memory cannot be shared between processes")

    def has_private_format(self, _tensor: torch.Tensor) -> bool:
        """Whether the bytes lie in another order than the tensor's shape and strides say."""
        return False


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
