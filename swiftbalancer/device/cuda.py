"""CUDA devices, with NCCL."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from typing_extensions import override

from swiftbalancer.device.accelerator import AcceleratorLayer, device_module
from swiftbalancer.device.collective import Collective, Membership, PeerOp
from swiftbalancer.device.cuda_memory import CudaPeerMemory, forget_error
from swiftbalancer.device.layer import Event, Stream
from swiftbalancer.device.peer_memory import PeerMemory

log = logging.getLogger(__name__)
TRUSTED = (2, 30)
"""The first NCCL that was not reported to hang."""


class Nccl(Collective):
    """NCCL as torch ships it."""

    name = "nccl"

    @override
    def join(self, membership: Membership) -> Any:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=False)
        options._timeout = membership.timeout
        if membership.max_ctas:
            options.config.min_ctas = 1
            options.config.max_ctas = membership.max_ctas
        group = dist.ProcessGroupNCCL(membership.store, membership.rank, membership.size, options)
        group._set_sequence_number_for_group()
        return group

    @override
    def exchange(self, raw: Any, ops: Sequence[PeerOp]) -> list[dist.Work]:
        raw._start_coalescing()
        for op in ops:
            op.post(raw)
        return [raw._end_coalescing()]

    @override
    def doubt(self) -> str:
        version = self.version()
        if version >= TRUSTED:
            return ""
        return (
            f"NCCL {'.'.join(map(str, version))}: versions before 2.30 were reported to hang beside other streams "
            "under high load (pytorch issue 174288); transport.kind copy_engine or gloo does not use NCCL"
        )

    def version(self) -> tuple[int, ...]:
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        return version


class Recording(torch.cuda.CUDAGraph):
    """Launches by the addresses that they use."""

    work: Callable[[], None]
    """Kept, since it alone may hold the memory at those addresses, which somebody else would get otherwise."""


class CudaLayer(AcceleratorLayer):
    """Devices that torch calls `cuda`."""

    collective = Nccl()
    can_share_memory = True

    def __init__(self, device: str) -> None:
        super().__init__(torch.device(device), device_module("cuda"))
        self._streams: dict[int, Stream] = {}
        # Without the layer of Python that torch puts on it; a torch without CUDA lacks it.
        self._record: Any = torch._C._CudaEventBase.record
        known = inspect.signature(torch.cuda.Event.__new__).parameters
        self._recordable = torch.version.hip is None and "external" in known
        """Whether an event in a graph can be waited for outside of it."""

    @override
    def current_stream(self) -> Stream:
        """By its handle, since making torch's object takes many times as long."""
        handle = torch._C._cuda_getCurrentRawStream(self.device.index)
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = super().current_stream()
        return stream

    @override
    def event(self, *, timing: bool = False) -> Event:
        if not self._recordable:
            return super().event(timing=timing)
        event: Event = self._module.Event(enable_timing=timing, blocking=True, external=True)
        return event

    @override
    def record(self, event: Event, stream: Stream | None = None) -> None:
        self._record(event, self.current_stream() if stream is None else stream)

    @override
    def recorded(self, work: Callable[[], None], *, loaded: bool = False) -> Callable[[], None]:
        """As a CUDA graph: one call, and one release of the interpreter lock, for all of its launches.

        As it is with a torch whose events in graphs are no good outside of them (before 2.8, and for ROCm).
        """
        if not self._recordable:
            return work
        if not loaded:
            work()  # a kernel's first launch loads it, which a capture forbids
        self.synchronize()
        graph = Recording()
        graph.work = work
        try:
            with self.on(self.side_stream()):
                graph.capture_begin(capture_error_mode="thread_local")
                work()
                graph.capture_end()
        except RuntimeError as error:
            log.debug("launches are not recorded: %s", error)
            return work
        replay: Callable[[], None] = graph.replay
        return replay

    @override
    def reach(self, memory: NDArray[np.uint8]) -> Callable[[], None] | None:
        """By registering it with CUDA, which locks its pages."""
        runtime, address = torch.cuda.cudart(), memory.ctypes.data  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device):
            status = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
        if status:
            forget_error()
            log.debug("host memory cannot be registered: CUDA error %d", status)
            return None

        def unreach() -> None:
            if int(runtime.cudaHostUnregister(address)):
                forget_error()

        return unreach

    @override
    def peer_memory(self) -> PeerMemory:
        return CudaPeerMemory(self.device)
