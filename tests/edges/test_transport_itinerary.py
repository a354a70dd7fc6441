"""The order of sends and receives: the same at both ends, as NCCL and HCCL demand, and complete."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftbalancer.transport.experts import ExpertWeights, dense_bytes
from swiftbalancer.transport.itinerary import Leg, legs_of, pieces_of
from swiftbalancer.transport.seam import TransferBatch

RANKS, SLOTS = 5, 4
slot = st.integers(0, RANKS * SLOTS - 1)
move_lists = st.lists(st.tuples(st.integers(0, 2), slot, slot), max_size=30)


def batch(moves: list[tuple[int, int, int]]) -> TransferBatch:
    return TransferBatch(1, 0, np.array([(layer, 0, a, b) for layer, a, b in moves], np.int32).reshape(-1, 4))


@settings(max_examples=300, deadline=None)
@given(move_lists)
def test_in_a_wave_a_rank_sends_once_and_receives_once_at_most(moves: list[tuple[int, int, int]]) -> None:
    sends: set[tuple[int, int]] = set()
    receives: set[tuple[int, int]] = set()
    for leg in legs_of(batch(moves), SLOTS):
        assert (leg.wave, leg.source_rank) not in sends
        assert (leg.wave, leg.target_rank) not in receives
        sends.add((leg.wave, leg.source_rank))
        receives.add((leg.wave, leg.target_rank))


@settings(max_examples=300, deadline=None)
@given(move_lists)
def test_every_move_is_a_leg_and_arrivals_have_entries_of_their_own(moves: list[tuple[int, int, int]]) -> None:
    legs = legs_of(batch(moves), SLOTS)
    back = [
        (leg.layer, leg.source_rank * SLOTS + leg.source_slot, leg.target_rank * SLOTS + leg.target_slot)
        for leg in legs
    ]
    assert back == moves
    entries = defaultdict(list)
    for leg in legs:
        entries[leg.target_rank].append(leg.entry)
    assert all(given == list(range(len(given))) for given in entries.values())


@settings(max_examples=300, deadline=None)
@given(move_lists)
def test_batches_of_a_collective_library_never_wait_in_a_ring(moves: list[tuple[int, int, int]]) -> None:
    """Plays the waves: each rank does its next wave only when its peers are at the same one."""
    own: dict[int, list[list[Leg]]] = {}
    for rank in range(RANKS):
        waves: dict[int, list[Leg]] = defaultdict(list)
        for leg in legs_of(batch(moves), SLOTS):
            if rank in (leg.source_rank, leg.target_rank) and leg.source_rank != leg.target_rank:
                waves[leg.wave].append(leg)
        own[rank] = [waves[wave] for wave in sorted(waves)]
    while any(own.values()):
        ready = [
            rank
            for rank, todo in own.items()
            if todo and all(leg in (own[_peer(leg, rank)] or [[]])[0] for leg in todo[0])
        ]
        assert ready, f"every rank waits: {own}"
        done = {leg.number for rank in ready for leg in own[rank][0]}
        for rank in {r for r in own for leg in (own[r] or [[]])[0] if leg.number in done}:
            own[rank][0] = [leg for leg in own[rank][0] if leg.number not in done]
            if not own[rank][0]:
                own[rank].pop(0)


def _peer(leg: Leg, rank: int) -> int:
    return leg.target_rank if leg.source_rank == rank else leg.source_rank


def test_pieces_cover_every_byte_once_and_keep_gapped_tensors_whole() -> None:
    kinds = [torch.empty(2, 100, 7), torch.empty(2, 64, 9)[:, :, :5], torch.empty(2, dtype=torch.float16)]
    weights = ExpertWeights([kinds], slots_per_rank=2)
    covered: dict[int, list[tuple[int, int]]] = defaultdict(list)
    turns: dict[int, int] = defaultdict(int)
    for number, piece in enumerate(pieces_of(weights, 0, 512)):
        assert piece.number == number
        turns[piece.turn] += piece.num_bytes
        covered[piece.kind].append((piece.start, piece.stop))
    assert covered == {
        0: [(0, 512), (512, 1024), (1024, 1536), (1536, 2048), (2048, 2560), (2560, 2800)],
        1: [(0, 1280)],
        2: [(0, 2)],
    }
    assert turns == {0: 512, 1: 512, 2: 512, 3: 512, 4: 512, 5: 240, 6: 1280, 7: 2}
    parts = weights.parts(0)
    assert all(part.offset % 256 == 0 for part in parts)
    assert weights.payload_bytes(0) == 2800 + 1280 + 2


def test_dense_memory_is_recognised_whatever_the_order_of_dimensions() -> None:
    base = torch.arange(24, dtype=torch.int16).view(2, 3, 4)
    for tensor in (base, base.permute(2, 0, 1), base[1], base[:, :, :4].transpose(0, 1), base[0, 0, 0]):
        flat = dense_bytes(tensor)
        assert flat is not None
        assert flat.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
        assert flat.numel() == tensor.numel() * 2
    for gapped in (base[:, :, 1:3], base[:, 0], torch.zeros(1, 4).expand(3, 4)):
        assert dense_bytes(gapped) is None


def test_small_tensors_share_a_round() -> None:
    kinds = [
        torch.empty(1, 300, dtype=torch.uint8),
        torch.empty(1, dtype=torch.uint8),
        torch.empty(1, 8),
        torch.empty(1, 60),
    ]
    weights = ExpertWeights([kinds], slots_per_rank=1)
    assert [piece.turn for piece in pieces_of(weights, 0, 256)] == [0, 1, 1, 1, 2]
