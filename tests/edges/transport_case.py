"""Weights, batches and carriers that the transport tests share."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer.device import DeviceLayer, PeerMemory
from swiftbalancer.groups import GroupFactory
from swiftbalancer.transport import (
    ExpertWeights,
    TransferBatch,
    TransferLimits,
    TransferState,
    TransferStatus,
    Transport,
    Workplace,
)
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from swiftbalancer.transport.p2p import GlooCarrier, HostStagedCarrier
from swiftbalancer.transport.seam import Carrier

SLOTS = 3
LAYERS = 2
DEADLINE_S = 20.0


Held = dict[tuple[int, int], list[bytes]]
"""Bytes of every tensor of the expert in a slot, by layer and slot."""


def fill(tensor: torch.Tensor, seed: int) -> None:
    """Random bytes, whatever the dtype; bit patterns such as NaN included."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), dtype=torch.uint8, generator=generator)
    tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


def reload(weights: ExpertWeights, *, seed: int) -> None:
    """Other bytes in every slot, as when an engine loads other weights."""
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            for tensor in weights.slot(layer, slot):
                seed += 1
                fill(tensor, seed)


def expert_bytes(tensors: list[torch.Tensor]) -> list[bytes]:
    return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def all_layouts(rank: int) -> list[list[Any]]:
    """`[layers][kinds]`: fp8, bf16 transposed, fp32 scales of odd size, int8 with gaps, a list of tensors."""
    layers: list[list[Any]] = []
    for layer in range(LAYERS):
        kinds: list[Any] = [
            torch.empty(SLOTS, 33, 17, dtype=torch.float8_e4m3fn),
            torch.empty(SLOTS, 16, 24, dtype=torch.bfloat16).transpose(1, 2),
            torch.empty(SLOTS, 7),
            torch.empty(SLOTS, 8, 20, dtype=torch.int8)[:, :, 3:14],
            [torch.empty(5, 5, dtype=torch.float16) for _ in range(SLOTS)],
            torch.empty(SLOTS, dtype=torch.float32),
        ]
        for number, kind in enumerate(kinds):
            for slot in range(SLOTS):
                fill(kind[slot], seed=((rank * LAYERS + layer) * SLOTS + slot) * 10 + number)
        layers.append(kinds)
    return layers


def place_on(rank: int, store: TCPStore, *, size: int, limits: TransferLimits | None = None) -> Workplace:
    weights = ExpertWeights(all_layouts(rank), slots_per_rank=SLOTS)
    layer = DeviceLayer.for_device("cpu")
    limits = limits or TransferLimits(staging_bytes=1 << 16, deadline_s=DEADLINE_S, chunk_bytes=256)
    return Workplace(weights, layer, GroupFactory(store, rank=rank, size=size), limits)


def batch_of(*moves: tuple[int, int, int], cycle: int = 1, batch: int = 0) -> TransferBatch:
    """Moves `(layer, source slot, target slot)`; the expert's number does not matter to a transport."""
    rows = [(layer, 0, source, target) for layer, source, target in moves]
    return TransferBatch(cycle, batch, np.array(rows, np.int32).reshape(-1, 4))


def finish_batch(transport: Transport, *, grant: int = 1 << 40) -> TransferStatus:
    """Steps as a main thread would: grants bytes, polls, goes on."""
    end = time.monotonic() + DEADLINE_S
    while (status := transport.poll()).state is TransferState.MOVING and time.monotonic() < end:
        transport.advance(grant)
        time.sleep(0.001)
    return status


def commit(place: Workplace, transport: Transport) -> None:
    transport.commit_copies().enqueue(place.layer)


def carry_out(place: Workplace, transport: Transport, batch: TransferBatch) -> None:
    """All of a batch, its commit enqueued; nothing waits for that."""
    transport.start(batch)
    status = finish_batch(transport)
    assert status.state is TransferState.DONE, status.reason
    commit(place, transport)


def held_on(rank: int, weights: ExpertWeights) -> Held:
    """What each slot of a rank holds."""
    return {
        (layer, rank * SLOTS + slot): expert_bytes(weights.slot(layer, slot))
        for layer in range(LAYERS)
        for slot in range(SLOTS)
    }


def together(parts: Iterable[Held]) -> Held:
    """What all ranks hold."""
    return {place: held for part in parts for place, held in part.items()}


MOVES = ((0, 0, 3), (0, 4, 8), (0, 6, 1), (1, 2, 5), (1, 2, 7), (1, 3, 4), (1, 8, 0), (0, 1, 2))
"""Over 3 ranks x 3 slots: crossing, one source for two targets, and two moves within a rank."""


def reference_after(moves: tuple[tuple[int, int, int], ...], size: int) -> Held:
    """What every slot must hold after the moves, from the weights before them."""
    before: Held = {}
    for rank in range(size):
        before |= held_on(rank, ExpertWeights(all_layouts(rank), slots_per_rank=SLOTS))
    return before | {(layer, target): before[layer, source] for layer, source, target in moves}


def cpu_gloo(place: Workplace) -> Carrier:
    return GlooCarrier(place.layer.device)


def staged_gloo(place: Workplace) -> Carrier:
    return HostStagedCarrier(place.layer, place.limits.chunk_bytes)


class LocalPeerMemory(PeerMemory):
    """Ranks are threads here, so a peer's memory is at its plain address, and a push is a copy of bytes."""

    def __init__(self) -> None:
        self.own = torch.empty(0, dtype=torch.uint8)
        self.freed = False

    @override
    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.own = torch.empty(num_bytes, dtype=torch.uint8)
        return self.own

    @override
    def handle(self) -> bytes:
        return self.own.data_ptr().to_bytes(8, "little")

    @override
    def map(self, handle: bytes) -> int:
        return int.from_bytes(handle, "little")

    @override
    def push(self, address: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(address, source, num_bytes)

    @override
    def unmap(self) -> None:
        return None

    @override
    def free(self) -> None:
        self.freed = True


def pushing(place: Workplace) -> Carrier:
    return CopyEngineCarrier(place.layer, place.groups, LocalPeerMemory)
