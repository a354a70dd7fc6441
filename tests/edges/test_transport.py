"""Experts really move: gloo between ranks, every tensor of an expert, and what happens when it fails."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer.cycle import Fault
from swiftbalancer.device import DeviceLayer
from swiftbalancer.errors import ConfigError, TransferFailed
from swiftbalancer.groups import GroupFactory
from swiftbalancer.peer_memory import HANDLE_BYTES, PeerMemory
from swiftbalancer.transport import (
    ExpertWeights,
    TransferBatch,
    TransferLimits,
    TransferState,
    TransferStatus,
    Transport,
    Workplace,
    choose,
)
from swiftbalancer.transport import candidates as choosing
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from swiftbalancer.transport.p2p import GlooCarrier, HostStagedCarrier
from swiftbalancer.transport.seam import Carrier
from tests.edges.ranks import run_ranks
from tests.edges.scripted_device import ScriptedEvent, ScriptedLayer

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


class LocalPeerMemory(PeerMemory):
    """Ranks are threads here, so a peer's memory is at its plain address, and a push is a copy of bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.own = torch.empty(0, dtype=torch.uint8)
        self.freed = False

    @override
    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.own = torch.empty(num_bytes, dtype=torch.uint8)
        return self.own

    @override
    def handle(self) -> bytes:
        return self.own.data_ptr().to_bytes(HANDLE_BYTES, "little")

    @override
    def map(self, handle: bytes) -> int:
        return int.from_bytes(handle, "little")

    @override
    def push(self, address: int, data: torch.Tensor) -> None:
        ctypes.memmove(address, data.data_ptr(), data.numel())

    @override
    def unmap(self) -> None:
        return None

    @override
    def free(self) -> None:
        self.freed = True


def pushing(place: Workplace) -> Carrier:
    return CopyEngineCarrier(place.layer, place.groups, LocalPeerMemory)


@pytest.mark.parametrize("carrier", [cpu_gloo, staged_gloo, pushing])
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


def test_memory_peers_may_still_write_to_is_not_freed() -> None:
    memories: dict[int, LocalPeerMemory] = {}

    def body(rank: int, store: TCPStore) -> None:
        def make(device: torch.device) -> PeerMemory:
            memories[rank] = LocalPeerMemory(device)
            return memories[rank]

        place = place_on(rank, store, size=2)
        carrier = CopyEngineCarrier(place.layer, place.groups, make)
        control = place.groups.create("control", timeout_s=DEADLINE_S)
        carrier.open("g", control, 100)
        if rank == 0:
            carrier.close()  # rank 1 never says that it has stopped writing

    run_ranks(2, body)
    assert not memories[0].freed


def test_a_path_that_loses_bytes_is_found_when_connecting() -> None:
    class Lossy(LocalPeerMemory):
        @override
        def push(self, address: int, data: torch.Tensor) -> None:
            return None

    def body(rank: int, store: TCPStore) -> str:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: CopyEngineCarrier(place.layer, place.groups, Lossy), name="t")
        with pytest.raises(TransferFailed) as caught:
            transport.connect(DEADLINE_S)
        transport.close(DEADLINE_S)
        return str(caught.value)

    assert "bytes pushed by ranks [1] did not arrive in rank 0's memory" in run_ranks(2, body)[0]


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


CHAIN = ((0, 0, 3), (0, 3, 1), (0, 1, 4), (0, 4, 2), (0, 2, 5))
"""Each move reads the slot the one before has just been committed to."""


def chain_on_scripted_device(make_layer: Callable[[int], DeviceLayer]) -> list[bytes]:
    """Runs CHAIN over 2 ranks, a batch per move, on devices that work late; gives what the last slot holds."""

    def body(rank: int, store: TCPStore) -> list[bytes]:
        plain = place_on(rank, store, size=2)
        place = Workplace(plain.weights, make_layer(rank), plain.groups, plain.limits)
        transport = Transport(place, lambda: staged_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        for number, move in enumerate(CHAIN):
            transport.start(batch_of(move, batch=number))
            status = finish_batch(transport)
            assert status.state is TransferState.DONE, status.reason
            commit(place, transport)  # enqueued only; nothing here waits for it
        transport.close(DEADLINE_S)
        place.layer.synchronize()
        return expert_bytes(place.weights.slot(0, 2))

    return list(run_ranks(2, body)[1])


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_reads_what_the_commit_before_it_wrote_on_a_late_device(seed: int) -> None:
    held = chain_on_scripted_device(lambda rank: ScriptedLayer(seed * 10 + rank, hurry=0.1 * seed))
    assert held == reference_after(((0, 0, 5),), 2)[0, 5]


class ImpatientLayer(ScriptedLayer):
    """Its first event per batch, the one that marks the last commit, is believed to have run at once."""

    @override
    def event(self, *, timing: bool = False) -> Any:
        event = super().event()
        if threading.current_thread().name.startswith("swiftbalancer"):
            return event
        assert isinstance(event, ScriptedEvent)
        return Believed(event)


class Believed:
    """An event nobody waits for."""

    def __init__(self, event: ScriptedEvent) -> None:
        self.event = event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


def test_without_the_wait_for_the_commit_the_late_device_shows_it() -> None:
    def make(rank: int) -> DeviceLayer:
        layer = ImpatientLayer(rank, hurry=0.0)
        layer.record = lambda event, stream=None: ScriptedLayer.record(layer, getattr(event, "event", event), stream)  # type: ignore[method-assign]
        return layer

    assert chain_on_scripted_device(make) != reference_after(((0, 0, 5),), 2)[0, 5]


@pytest.mark.parametrize(("kind", "name"), [("auto", "p2p-gloo"), ("copy_engine", "p2p-gloo"), ("p2p", "p2p-gloo")])
def test_cpu_ranks_always_get_gloo(kind: str, name: str) -> None:
    def body(rank: int, store: TCPStore) -> str:
        place = place_on(rank, store, size=2)
        agree = place.groups.create("agree", timeout_s=DEADLINE_S)
        transport = choose(kind, place, agree, one_node=True)
        transport.close(DEADLINE_S)
        return transport.name

    assert run_ranks(2, body) == [name, name]


def test_all_ranks_fall_back_when_one_cannot_connect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoPeerAccess(LocalPeerMemory):
        @override
        def map(self, handle: bytes) -> int:
            raise TransferFailed("cudaIpcOpenMemHandle: peer access is not supported (217)")

    def candidates(_kind: str, place: Workplace, *, one_node: bool) -> list[choosing.Candidate]:
        assert one_node
        memory = NoPeerAccess if place.groups.rank == 1 else LocalPeerMemory
        engine = choosing.Candidate("copy-engine", lambda: CopyEngineCarrier(place.layer, place.groups, memory))
        return [engine, choosing.Candidate("p2p-gloo", lambda: cpu_gloo(place))]

    monkeypatch.setattr(choosing, "_candidates", candidates)

    def body(rank: int, store: TCPStore) -> str:
        place = place_on(rank, store, size=2)
        agree = place.groups.create("agree", timeout_s=DEADLINE_S)
        transport = choose("auto", place, agree, one_node=True)
        transport.start(batch_of((0, 0, 3)))
        assert finish_batch(transport).state is TransferState.DONE
        transport.close(DEADLINE_S)
        return transport.name

    assert run_ranks(2, body) == ["p2p-gloo", "p2p-gloo"]
    lines = [record.getMessage() for record in caplog.records if "fell back" in record.getMessage()]
    assert len(lines) == 2, "one line per rank"
    assert any("peer access is not supported" in line for line in lines)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=1)
        agree = place.groups.create("agree", timeout_s=DEADLINE_S)
        with pytest.raises(ConfigError, match="unknown 'rdma'; known: auto, p2p, copy_engine, gloo"):
            choose("rdma", place, agree, one_node=True)

    run_ranks(1, body)
