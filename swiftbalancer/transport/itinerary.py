"""Which bytes a rank sends and receives in which round; every rank derives its share from the same moves."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from swiftbalancer.transport.experts import ExpertWeights, Part
from swiftbalancer.transport.seam import TransferBatch


class Leg(Struct, frozen=True, gc=False):
    """One move as one rank sees it. `entry` is its place in the receiver's staging memory.

    Made by the hundred while the forward pass wants the interpreter lock: see `swiftbalancer.cycle.Vote`.
    """

    number: int
    layer: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int
    entry: int
    wave: int


class Piece(Struct, frozen=True, gc=False):
    """Bytes `[start, stop)` of one tensor of an expert: the `number`-th piece of its leg, in its `turn`-th round."""

    kind: int
    part: Part
    start: int
    stop: int
    number: int
    turn: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def legs_of(batch: TransferBatch, slots_per_rank: int) -> list[Leg]:
    """All moves of a batch, in order, each in the first wave in which its two ranks are free.

    In a wave a rank sends at most one expert and receives at most one, so both ends of every pair meet in the
    same order and no ring of ranks can wait for each other. Local slots count from 0 on their rank.
    """
    legs: list[Leg] = []
    sends: dict[int, int] = {}
    receives: dict[int, int] = {}
    arrivals: dict[int, int] = {}
    for number, (layer, _, source, target) in enumerate(batch.moves.tolist()):
        from_rank, from_slot = divmod(source, slots_per_rank)
        to_rank, to_slot = divmod(target, slots_per_rank)
        wave = max(sends.get(from_rank, 0), receives.get(to_rank, 0))
        sends[from_rank] = receives[to_rank] = wave + 1
        entry = arrivals.get(to_rank, 0)
        arrivals[to_rank] = entry + 1
        legs.append(Leg(number, layer, from_rank, from_slot, to_rank, to_slot, entry, wave))
    return legs


def pieces_of(weights: ExpertWeights, layer: int, chunk_bytes: int) -> Iterator[Piece]:
    """The pieces one expert of a layer travels in, several small ones to a round of `chunk_bytes`.

    A tensor that is not one dense block stays whole, however large.
    """
    number = turn = filled = 0
    for kind, part in enumerate(weights.parts(layer)):
        step = chunk_bytes if part.divisible else max(part.num_bytes, 1)
        for start in range(0, part.num_bytes, step):
            stop = min(start + step, part.num_bytes)
            if filled and filled + stop - start > chunk_bytes:
                turn, filled = turn + 1, 0
            yield Piece(kind, part, start, stop, number, turn)
            number, filled = number + 1, filled + stop - start
