"""CUDA memory that other processes of this host write into.

The memory comes straight from the driver, not from torch's caching allocator, since only whole allocations can
be shared and the allocator's segments may not be shareable at all. Copies are plain `cudaMemcpyAsync` between
two devices' addresses, which the driver gives to the copy engines; no multiprocessor is used.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from swiftbalancer.device.peer_memory import PeerMemory
from swiftbalancer.errors import TransferFailed

HANDLE_BYTES = 64
GRANULE_BYTES = 2 << 20
"""The driver puts smaller allocations together in one block, and a handle names the block, not the allocation."""
_LAZY_PEER_ACCESS = 1
_COPY_DEFAULT = 4


class CudaPeerMemory(PeerMemory):
    """By CUDA's handles for memory between processes, `HANDLE_BYTES` long."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._runtime = ctypes.CDLL(_loaded_runtime())
        self._runtime.cudaGetErrorString.restype = ctypes.c_char_p
        # With its types declared, so that a call costs as little of the interpreter's lock as it can.
        self._copy_async = self._runtime.cudaMemcpyAsync
        self._copy_async.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_void_p,
        )
        self._own = ctypes.c_void_p()
        self._mapped: list[int] = []

    @override
    def allocate(self, num_bytes: int) -> torch.Tensor:
        assert not self._own, "one allocation each"
        torch.cuda.synchronize(self._device)  # a fresh process has no context yet; this makes one
        whole = -(-num_bytes // GRANULE_BYTES) * GRANULE_BYTES
        self._call("cudaMalloc", ctypes.byref(self._own), ctypes.c_size_t(whole))
        assert self._own.value is not None
        return torch.as_tensor(_Bytes(self._own.value, num_bytes), device=self._device)

    @override
    def handle(self) -> bytes:
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), self._own)
        return bytes(handle)

    @override
    def map(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        raw = _Handle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), raw, ctypes.c_uint(_LAZY_PEER_ACCESS))
        assert address.value is not None
        self._mapped.append(address.value)
        return address.value

    @override
    def push(self, address: int, source: int, num_bytes: int) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        status = self._copy_async(address, source, num_bytes, _COPY_DEFAULT, stream)
        if status:
            self._raise("cudaMemcpyAsync", status)

    @override
    def unmap(self) -> None:
        while self._mapped:
            self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(self._mapped.pop()))

    @override
    def free(self) -> None:
        if self._own:
            self._call("cudaFree", self._own)
            self._own = ctypes.c_void_p()

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._runtime, name)(*args)
        if status:
            self._raise(name, status)

    def _raise(self, name: str, status: int) -> None:
        text = self._runtime.cudaGetErrorString(status)
        raise TransferFailed(f"{name}: {text.decode()} ({status})")


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class _Bytes:
    """Device memory as torch takes it, by the CUDA array interface."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def forget_error() -> None:
    """Of a call of this thread that failed, and was taken for an answer: torch would raise it at its next launch."""
    with contextlib.suppress(TransferFailed):
        ctypes.CDLL(_loaded_runtime()).cudaGetLastError()


def _loaded_runtime() -> str:
    """The CUDA runtime torch itself has loaded, so that both share contexts and streams."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith("libcudart.so"):
            return path
    raise TransferFailed("this process has not loaded the CUDA runtime as a shared library")
