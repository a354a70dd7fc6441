"""The CPU as a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from swiftbalancer.device.collective import Gloo
from swiftbalancer.device.layer import DeviceLayer, Event, Stream


class HostLayer(DeviceLayer):
    """The CPU: every operation has run when its call returns, so streams and events are only names."""

    collective = Gloo()
    is_accelerator = False

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
    def reach(self, _memory: NDArray[np.uint8]) -> Callable[[], None] | None:
        return lambda: None

    @override
    def bind_thread(self) -> None:
        return None

    @override
    def synchronize(self) -> None:
        return None


class _HostEvent:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class _HostStream:
    def synchronize(self) -> None:
        return None
