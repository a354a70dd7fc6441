"""Experts really move: every tensor of an expert, between ranks, when and as far as allowed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.transport import (
    TransferLimits,
    TransferState,
    TransferStatus,
    Transport,
    Workplace,
)
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from swiftbalancer.transport.experts import ExpertWeights
from swiftbalancer.transport.seam import ROUNDS_AT_ONCE, Carrier
from swiftbalancer.transport.staging import entry_stride
from tests.edges.engines import wait_for
from tests.edges.host_kernels import Install, host_kernels, no_kernels
from tests.edges.ranks import run_ranks
from tests.edges.transport_case import (
    DEADLINE_S,
    MOVES,
    SLOTS,
    Held,
    LocalPeerMemory,
    all_layouts,
    batch_of,
    carry_out,
    cpu_gloo,
    finish_batch,
    held_on,
    place_on,
    pushing,
    reference_after,
    reload,
    staged_gloo,
    together,
)

FEWER_MOVES = ((0, 3, 7), (1, 5, 1))
"""Of which one rank gets none."""


@pytest.mark.parametrize("kernels", [no_kernels, host_kernels])
@pytest.mark.parametrize("carrier", [cpu_gloo, staged_gloo, pushing])
def test_every_tensor_of_an_expert_arrives_bit_for_bit(
    carrier: Callable[[Workplace], Carrier], kernels: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels(monkeypatch)

    def body(rank: int, store: TCPStore) -> tuple[Held, Held, Held]:
        place = place_on(rank, store, size=3)
        transport = Transport(place, lambda: carrier(place), name="t")
        transport.connect(DEADLINE_S)
        carry_out(place, transport, batch_of(*MOVES))
        first = held_on(rank, place.weights)
        reload(place.weights, seed=1000 * rank)
        reloaded = held_on(rank, place.weights)
        carry_out(place, transport, batch_of(*FEWER_MOVES, batch=1))
        transport.close(DEADLINE_S)
        return first, reloaded, held_on(rank, place.weights)

    first, reloaded, after = (together(parts) for parts in zip(*run_ranks(3, body), strict=True))
    assert first == reference_after(MOVES, 3)
    assert after == reloaded | {(layer, target): reloaded[layer, source] for layer, source, target in FEWER_MOVES}


@pytest.mark.parametrize("kernels", [no_kernels, host_kernels])
def test_a_rank_may_send_more_experts_than_it_has_room_for(kernels: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch)
    moves = ((0, 0, 3), (0, 1, 6), (0, 2, 7), (1, 0, 4), (1, 1, 2))

    def body(rank: int, store: TCPStore) -> Held:
        room = 2 * entry_stride(ExpertWeights(all_layouts(rank), slots_per_rank=SLOTS))
        place = place_on(rank, store, size=3, limits=TransferLimits(room, DEADLINE_S))
        transport = Transport(place, lambda: pushing(place), name="t")
        transport.connect(DEADLINE_S)
        assert transport.staging_experts == 2
        carry_out(place, transport, batch_of(*moves))
        transport.close(DEADLINE_S)
        return held_on(rank, place.weights)

    assert together(run_ranks(3, body)) == reference_after(moves, 3)


def test_live_weights_do_not_change_before_the_commit() -> None:
    def body(rank: int, store: TCPStore) -> bool:
        place = place_on(rank, store, size=3)
        before = held_on(rank, place.weights)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of(*MOVES))
        assert finish_batch(transport).state is TransferState.DONE
        after = held_on(rank, place.weights)
        transport.abort()
        transport.close(DEADLINE_S)
        return before == after

    assert all(run_ranks(3, body))


def test_nothing_is_carried_before_bytes_are_allowed() -> None:
    limits = TransferLimits(staging_bytes=1 << 16, deadline_s=DEADLINE_S, chunk_bytes=256, verify=False)

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2, limits=limits)
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


@pytest.mark.parametrize("dear", [True, False])
def test_where_waking_costs_a_batch_waits_until_some_pieces_are_allowed(dear: bool) -> None:
    limits = TransferLimits(staging_bytes=1 << 16, deadline_s=DEADLINE_S, chunk_bytes=256, verify=False)
    moved_of = []

    def body(rank: int, store: TCPStore) -> None:
        place = replace(place_on(rank, store, size=2, limits=limits), is_dear=lambda: dear)
        carrier = pushing(place)
        carrier.at_once = 3 * 256
        transport = Transport(place, lambda: carrier, name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of((0, 0, 3), (0, 4, 1)))
        transport.advance(0)  # it begins
        wait_for(lambda: transport.advance(0))
        missing = transport.advance(1)
        wait_for(lambda: dear or transport.poll().bytes_moved)
        assert (missing > 0) == (transport.poll().bytes_moved == 0) == dear
        transport.advance(missing)
        wait_for(lambda: transport.poll().bytes_moved)
        moved_of.append(transport.poll().bytes_moved)
        assert finish_batch(transport, grant=300).state is TransferState.DONE
        transport.close(DEADLINE_S)

    run_ranks(2, body)
    assert all((moved > 2 * 256) == dear for moved in moved_of)


def test_a_copy_engine_s_thread_rests_after_some_rounds_but_not_after_the_last() -> None:
    rests: list[int] = []

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=1)
        carrier = CopyEngineCarrier(place.layer, place.groups, LocalPeerMemory, lambda: rests.append(1))
        carrier.open("t", place.groups.create("t", timeout_s=DEADLINE_S), 1 << 16)
        carrier.carry([[]] * (3 * ROUNDS_AT_ONCE), DEADLINE_S)
        carrier.close()

    run_ranks(1, body)
    assert len(rests) == 2


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


def test_checksums_are_paced_too() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=2)
        transport = Transport(place, lambda: cpu_gloo(place), name="t")
        transport.connect(DEADLINE_S)
        transport.start(batch_of((0, 0, 3), (0, 4, 1)))
        transport.advance(1)  # pays for the first checksum only, and leaves a debt
        time.sleep(0.3)
        assert transport.poll() == TransferStatus(TransferState.MOVING)
        assert finish_batch(transport, grant=300).state is TransferState.DONE
        transport.close(DEADLINE_S)

    run_ranks(2, body)
