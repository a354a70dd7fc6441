"""Experts really move: gloo between ranks, every tensor of an expert, and what happens when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.cycle import Fault
from swiftbalancer.device import DeviceLayer
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
from swiftbalancer.transport.p2p import GlooCarrier, HostStagedCarrier
from swiftbalancer.transport.seam import Carrier
from tests.edges.ranks import run_ranks

SLOTS = 3
LAYERS = 2
DEADLINE_S = 20.0


def fill(tensor: torch.Tensor, seed: int) -> None:
    """Random bytes, whatever the dtype; bit patterns such as NaN included."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), dtype=torch.uint8, generator=generator)
    tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


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
    copies = transport.commit_copies()
    for targets, sources in zip(copies.targets, copies.sources, strict=True):
        place.layer.copy_all(targets, sources)


MOVES = ((0, 0, 3), (0, 4, 8), (0, 6, 1), (1, 2, 5), (1, 2, 7), (1, 3, 4), (1, 8, 0), (0, 1, 2))
"""Over 3 ranks x 3 slots: crossing, one source for two targets, and two moves within a rank."""


def reference_after(moves: tuple[tuple[int, int, int], ...], size: int) -> dict[tuple[int, int], list[bytes]]:
    """What every (layer, slot) must hold after the moves, from the weights before them."""
    before = {}
    for rank in range(size):
        weights = ExpertWeights(all_layouts(rank), slots_per_rank=SLOTS)
        for layer in range(LAYERS):
            for slot in range(SLOTS):
                before[layer, rank * SLOTS + slot] = expert_bytes(weights.slot(layer, slot))
    after = dict(before)
    for layer, source, target in moves:
        after[layer, target] = before[layer, source]
    return after


def cpu_gloo(place: Workplace) -> Carrier:
    return GlooCarrier(place.layer.device)


def staged_gloo(place: Workplace) -> Carrier:
    return HostStagedCarrier(place.layer, place.limits.chunk_bytes)


@pytest.mark.parametrize("carrier", [cpu_gloo, staged_gloo])
def test_every_tensor_of_an_expert_arrives_bit_for_bit(carrier: Callable[[Workplace], Carrier]) -> None:
    def body(rank: int, store: TCPStore) -> dict[tuple[int, int], list[bytes]]:
        place = place_on(rank, store, size=3)
        transport = Transport(place, lambda: carrier(place), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of(*MOVES))
        status = finish_batch(transport)
        assert status.state is TransferState.DONE, status.reason
        commit(place, transport)
        transport.close(DEADLINE_S)
        return {
            (layer, rank * SLOTS + slot): expert_bytes(place.weights.slot(layer, slot))
            for layer in range(LAYERS)
            for slot in range(SLOTS)
        }

    held: dict[tuple[int, int], list[bytes]] = {}
    for part in run_ranks(3, body):
        held |= part
    assert held == reference_after(MOVES, 3)


def test_live_weights_do_not_change_before_the_commit() -> None:
    def body(rank: int, store: TCPStore) -> bool:
        place = place_on(rank, store, size=3)
        before = [expert_bytes(place.weights.slot(layer, slot)) for layer in range(LAYERS) for slot in range(SLOTS)]
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of(*MOVES))
        assert finish_batch(transport).state is TransferState.DONE
        after = [expert_bytes(place.weights.slot(layer, slot)) for layer in range(LAYERS) for slot in range(SLOTS)]
        transport.abort()
        transport.close(DEADLINE_S)
        return before == after

    assert all(run_ranks(3, body))


def test_nothing_is_carried_before_bytes_are_allowed() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of((0, 0, 3), (0, 4, 1)))
        time.sleep(0.3)
        assert transport.poll() == TransferStatus(TransferState.MOVING)
        transport.advance(1)
        end = time.monotonic() + DEADLINE_S
        while transport.poll().bytes_moved == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert transport.poll().state is TransferState.MOVING
        assert 0 < transport.poll().bytes_moved <= place.limits.chunk_bytes
        assert finish_batch(transport, grant=300).state is TransferState.DONE
        transport.close(DEADLINE_S)

    run_ranks(2, body)


class FlippingCarrier(GlooCarrier):
    """Damages one bit of every arriving chunk while `damage` is set."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.damage = True

    def carry(self, rounds: Any, deadline: float) -> None:
        super().carry(rounds, deadline)
        for op in (op for ops in rounds for op in ops):
            if self.damage and not op.is_send:
                op.data[-1] ^= 1


def test_a_flipped_bit_fails_the_batch_and_the_next_one_succeeds() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        carriers = [FlippingCarrier(place.layer.device), GlooCarrier(place.layer.device)]
        transport = Transport(place, lambda: carriers.pop(0), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of((1, 0, 4)))
        status = finish_batch(transport)
        if rank == 1:
            assert (status.state, status.fault) == (TransferState.FAILED, Fault.CHECKSUM)
            assert "layer 1" in status.reason
        else:
            assert status.state is TransferState.DONE
        transport.abort()  # on every rank, as after the vote
        transport.start(batch_of((1, 0, 4), cycle=2))
        assert finish_batch(transport).state is TransferState.DONE
        commit(place, transport)
        transport.close(DEADLINE_S)
        if rank == 1:
            assert expert_bytes(place.weights.slot(1, 1)) == reference_after(((1, 0, 4),), 2)[1, 4]

    run_ranks(2, body)


def test_a_silent_peer_costs_the_batch_its_deadline_and_nothing_else() -> None:
    limits = TransferLimits(staging_bytes=1 << 16, deadline_s=1.0)

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2, limits=limits)
        before = expert_bytes(place.weights.slot(0, 1))
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        if rank == 0:
            transport.start(batch_of((0, 3, 1)))
            status = finish_batch(transport)
            assert (status.state, status.fault) == (TransferState.FAILED, Fault.TRANSFER_TIMEOUT)
            assert expert_bytes(place.weights.slot(0, 1)) == before
        else:
            time.sleep(1.5)
        transport.abort()
        transport.start(batch_of((0, 3, 1), cycle=2))
        assert finish_batch(transport).state is TransferState.DONE
        transport.close(DEADLINE_S)

    run_ranks(2, body)


def test_an_abort_in_flight_leaves_slots_alone_and_connects_anew() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        before = expert_bytes(place.weights.slot(0, 0))
        transport.start(batch_of((0, 3, 0), (0, 1, 5)))
        transport.advance(1)  # some chunks on their way, the rest not allowed
        transport.abort()
        assert transport.poll().state is TransferState.IDLE
        assert expert_bytes(place.weights.slot(0, 0)) == before
        transport.start(batch_of((0, 3, 0), (0, 1, 5), cycle=2))
        assert finish_batch(transport).state is TransferState.DONE
        transport.close(DEADLINE_S)

    run_ranks(2, body)


def test_peers_at_different_batches_are_found_out() -> None:
    def body(rank: int, store: TCPStore) -> TransferStatus:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of((0, 0, 3), (0, 3, 0), batch=rank))
        status = finish_batch(transport)
        transport.close(DEADLINE_S)
        return status

    statuses = run_ranks(2, body)
    assert all(status.state is TransferState.FAILED for status in statuses)
    assert any("is at cycle, batch" in status.reason for status in statuses)


def test_a_batch_larger_than_staging_is_refused() -> None:
    def body(rank: int, store: TCPStore) -> None:
        small = TransferLimits(staging_bytes=1 << 12, deadline_s=DEADLINE_S)
        place = place_on(rank, store, size=1, limits=small)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        assert transport.staging_experts == 1
        transport.start(batch_of((0, 0, 1), (1, 0, 1)))
        status = finish_batch(transport)
        transport.close(DEADLINE_S)
        assert status.state is TransferState.FAILED
        assert "2 experts" in status.reason

    run_ranks(1, body)
