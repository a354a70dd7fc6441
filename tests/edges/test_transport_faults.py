"""What fails costs one batch: live weights stay, and the next batch succeeds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer.cycle import Fault
from swiftbalancer.device import HostLayer, PeerMemory
from swiftbalancer.errors import TransferFailed
from swiftbalancer.groups import Group
from swiftbalancer.transport import (
    TransferLimits,
    TransferState,
    Transport,
)
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from swiftbalancer.transport.p2p import GlooCarrier
from tests.edges.host_kernels import Install, host_kernels, no_kernels
from tests.edges.ranks import run_ranks
from tests.edges.transport_case import (
    DEADLINE_S,
    LocalPeerMemory,
    batch_of,
    carry_out,
    commit,
    cpu_gloo,
    expert_bytes,
    finish_batch,
    place_on,
    reference_after,
)


class FlippingCarrier(GlooCarrier):
    """Damages one bit of every arriving chunk."""

    @override
    def carry(self, rounds: Any, deadline: float) -> None:
        super().carry(rounds, deadline)
        for op in (op for ops in rounds for op in ops):
            if not op.is_send:
                op.data[-1] ^= 1


@pytest.mark.parametrize("kernels", [no_kernels, host_kernels])
def test_a_flipped_bit_fails_the_batch_and_the_next_one_succeeds(
    kernels: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels(monkeypatch)

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
        carry_out(place, transport, batch_of((1, 0, 4), cycle=2))
        transport.close(DEADLINE_S)
        if rank == 1:
            assert expert_bytes(place.weights.slot(1, 1)) == reference_after(((1, 0, 4),), 2)[1, 4]

    run_ranks(2, body)


def test_a_silent_peer_costs_the_batch_its_deadline_and_nothing_else() -> None:
    limits = TransferLimits(staging_bytes=1 << 16, deadline_s=5.0)
    given_up = threading.Event()

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
            given_up.set()
        assert given_up.wait(DEADLINE_S)
        transport.abort()
        transport.start(batch_of((0, 3, 1), cycle=2))
        assert finish_batch(transport).state is TransferState.DONE
        transport.close(DEADLINE_S)

    run_ranks(2, body)


def test_an_abort_in_flight_leaves_slots_alone_and_connects_anew() -> None:
    in_flight = threading.Barrier(2)

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        before = expert_bytes(place.weights.slot(0, 0))
        transport.start(batch_of((0, 3, 0), (0, 1, 5)))
        transport.advance(100)  # once: grants add up, and a peer that is late could make them enough for all
        end = time.monotonic() + DEADLINE_S
        while transport.poll().bytes_moved == 0 and time.monotonic() < end:
            time.sleep(0.001)
        in_flight.wait(DEADLINE_S)
        assert transport.poll().state is TransferState.MOVING, "some chunks have arrived, the rest is not allowed"
        in_flight.wait(DEADLINE_S)
        transport.abort()
        assert transport.poll().state is TransferState.IDLE
        assert expert_bytes(place.weights.slot(0, 0)) == before
        transport.start(batch_of((0, 3, 0), (0, 1, 5), cycle=2))
        assert finish_batch(transport).state is TransferState.DONE
        transport.close(DEADLINE_S)

    run_ranks(2, body)


class Memories:
    """What ranks that push have allocated."""

    def __init__(self) -> None:
        self.made: list[LocalPeerMemory] = []

    def make(self) -> LocalPeerMemory:
        self.made.append(LocalPeerMemory())
        return self.made[-1]

    @property
    def all_freed(self) -> bool:
        return all(memory.freed for memory in self.made)


def test_after_an_abort_peers_let_go_of_staging_though_one_waits_for_a_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rank 0 may send no more, and rank 1 waits to hear that all was sent."""
    memories, in_flight = Memories(), threading.Barrier(2)
    limits = TransferLimits(1 << 16, DEADLINE_S, chunk_bytes=256, verify=False)

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2, limits=limits)
        transport = Transport(place, lambda: CopyEngineCarrier(place.layer, place.groups, memories.make), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of((0, 0, 3), (0, 1, 5)))
        transport.advance(100)
        end = time.monotonic() + DEADLINE_S
        while rank == 0 and transport.poll().bytes_moved == 0:
            assert time.monotonic() < end
            time.sleep(0.001)
        in_flight.wait(DEADLINE_S)
        transport.abort()
        assert transport.settle(DEADLINE_S)

    run_ranks(2, body)
    assert len(memories.made) == 2
    assert memories.all_freed
    assert "did not let go" not in caplog.text


class BrokenCarrier(CopyEngineCarrier):
    """Pushes nothing."""

    @override
    def carry(self, rounds: Any, deadline: float) -> None:
        raise TransferFailed("broken")


def test_a_rank_that_fails_leaves_its_peers_waiting_until_all_abort() -> None:
    """Else they would fail for its leaving, and name that as the reason why the batch was lost."""
    memories, failed, looked = Memories(), threading.Event(), threading.Event()

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        kind = BrokenCarrier if rank == 1 else CopyEngineCarrier
        transport = Transport(place, lambda: kind(place.layer, place.groups, memories.make), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of((0, 3, 1)))
        if rank == 1:
            status = finish_batch(transport)
            assert (status.state, status.reason) == (TransferState.FAILED, "broken")
            failed.set()
            assert looked.wait(DEADLINE_S)
        else:
            transport.advance()
            assert failed.wait(DEADLINE_S)
            time.sleep(0.1)
            assert transport.poll().state is TransferState.MOVING
            looked.set()
        transport.abort()
        assert transport.settle(DEADLINE_S)

    run_ranks(2, body)
    assert memories.all_freed


def test_reopened_at_rest_a_transport_need_not_connect_beside_the_next_batch() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        first = transport._mover
        transport.reopen(DEADLINE_S)
        assert transport._mover is first, "what is open stays"
        for cycle in (1, 2):
            transport.start(batch_of((0, 3, 0), (0, 1, 5), cycle=cycle))
            transport.abort()
            assert transport.settle(DEADLINE_S)
            transport.reopen(DEADLINE_S)
            opened = transport._mover
            carry_out(place, transport, batch_of((0, 3, 0), (0, 1, 5), cycle=10 + cycle))
            assert transport._mover is opened is not first
        transport.close(DEADLINE_S)

    run_ranks(2, body)


def test_the_streams_of_generations_that_have_ended_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps what was free on a stream for that stream: with new ones, staging memory would add up."""

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        assert transport._mover is not None
        first = transport._mover.side
        for cycle in range(1, 5):
            transport.start(batch_of((0, 3, 0), (0, 1, 5), cycle=cycle))
            assert transport._mover.side is first
            transport.abort()
            assert transport.settle(DEADLINE_S)
            if cycle % 2:
                transport.reopen(DEADLINE_S)
        carry_out(place, transport, batch_of((0, 3, 0), (0, 1, 5), cycle=10))
        transport.abort()
        (aborted,) = transport._lingering
        with monkeypatch.context() as still:
            still.setattr(aborted, "join", lambda _: False)
            transport.start(batch_of((0, 3, 0), (0, 1, 5), cycle=11))
            assert transport._mover.side is not aborted.side, "it may wait there for what never comes"
        transport.close(DEADLINE_S)

    run_ranks(2, body)


class RehearsingLayer(HostLayer):
    """Runs at once what it is to record, as CUDA's does, unless its kernels are there."""

    recordings = 0

    @override
    def recorded(self, work: Callable[[], None], *, loaded: bool = False) -> Callable[[], None]:
        if not loaded:
            work()
        self.recordings += 1
        return work


def test_what_belongs_to_commits_is_launched_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was aborted has prepared maps: launched with anything but its commit, they would be in force."""
    host_kernels(monkeypatch)

    def body(rank: int, store: TCPStore) -> None:
        launched: list[int] = []
        place = place_on(rank, store, size=2)
        layer = RehearsingLayer(place.layer.device)
        place = replace(place, layer=layer, beside_commit=lambda: launched.append(1))
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        assert launched, "before anything is prepared, recording may launch it"
        launched.clear()
        for cycle, reopen in ((1, True), (2, False)):
            transport.start(batch_of((0, 3, 0), (0, 1, 5), cycle=cycle))
            transport.abort()
            assert transport.settle(DEADLINE_S)
            recordings = layer.recordings
            if reopen:
                transport.reopen(DEADLINE_S)
            transport.start(batch_of((0, 3, 0), (0, 1, 5), cycle=10 + cycle))
            assert finish_batch(transport).state is TransferState.DONE
            assert not launched
            assert (layer.recordings > recordings) == reopen, "beside forward passes nothing is recorded"
            commit(place, transport)
            assert launched == [1]
            launched.clear()
        transport.close(DEADLINE_S)

    run_ranks(2, body)


@pytest.mark.parametrize("closing", [1, 2])
def test_memory_is_freed_once_no_peer_writes_to_it_and_not_before(closing: int) -> None:
    memories: dict[int, LocalPeerMemory] = {}

    def body(rank: int, store: TCPStore) -> None:
        def make() -> PeerMemory:
            memories[rank] = LocalPeerMemory()
            return memories[rank]

        place = place_on(rank, store, size=2)
        carrier = CopyEngineCarrier(place.layer, place.groups, make)
        control = place.groups.create("control", timeout_s=DEADLINE_S)
        carrier.open("g", control, 100)
        if rank < closing:
            carrier.close()  # the others never say that they have stopped writing

    run_ranks(2, body)
    assert [memories[rank].freed for rank in range(2)] == [closing == 2] * 2


def test_a_path_that_loses_bytes_is_found_when_connecting() -> None:
    class Lossy(LocalPeerMemory):
        @override
        def push(self, address: int, source: int, num_bytes: int) -> None:
            return None

    def body(rank: int, store: TCPStore) -> str:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: CopyEngineCarrier(place.layer, place.groups, Lossy), name="t")
        with pytest.raises(TransferFailed) as caught:
            transport.connect(DEADLINE_S)
        transport.close(DEADLINE_S)
        return str(caught.value)

    assert "bytes pushed by ranks [1] did not arrive in rank 0's memory" in run_ranks(2, body)[0]


class StuckCarrier(GlooCarrier):
    """A library that waits for a peer that never comes, until it is told to give up."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._given_up = threading.Event()

    @override
    def open(self, name: str, control: Group, staging_bytes: int) -> torch.Tensor:
        self._given_up.wait()
        raise TransferFailed("given up")

    @override
    def cut(self) -> None:
        self._given_up.set()


def test_a_transport_that_never_connected_lets_go_of_its_thread() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=1)
        transport = Transport(place, lambda: StuckCarrier(place.layer.device), name="t")
        with pytest.raises(TransferFailed, match=r"did not connect within 0\.1 s"):
            transport.connect(0.1)
        transport.close(DEADLINE_S)
        assert transport.settle(0.0), "its thread still waits"

    run_ranks(1, body)
