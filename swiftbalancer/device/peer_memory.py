"""Device memory that other processes of this host write into."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class PeerMemory(ABC):
    """One allocation of this process that peers may map, and the peers' allocations mapped here.

    Calls must come from a thread whose current device is the memory's. Failing calls raise `TransferFailed`.
    """

    @abstractmethod
    def allocate(self, num_bytes: int) -> torch.Tensor:
        """`[num_bytes]` uint8 of device memory, valid until `free`."""

    @abstractmethod
    def handle(self) -> bytes:
        """What a peer needs to map the allocation; as long on every rank."""

    @abstractmethod
    def map(self, handle: bytes) -> int:
        """The address, in this process, of the peer's allocation."""

    @abstractmethod
    def push(self, address: int, source: int, num_bytes: int) -> None:
        """Enqueues a copy to an address of a mapped allocation, on the current stream.

        `source` is an address of this device, whose memory must stay until the stream has run.
        """

    @abstractmethod
    def unmap(self) -> None:
        """Lets go of the peers' allocations; no copy to them may be in flight."""

    @abstractmethod
    def free(self) -> None:
        """Frees the own allocation; no peer may have it mapped any more."""
