"""One batch on the mover's thread: meet the peers, carry the bytes, compare the checksums."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from msgspec import Struct
from numpy.typing import NDArray

from swiftbalancer.device import DeviceLayer, Event
from swiftbalancer.dispatch import nothing
from swiftbalancer.errors import TransferFailed
from swiftbalancer.groups import Group, GroupFactory
from swiftbalancer.kernels.segments import BYTES, READ
from swiftbalancer.transport.checksums import ChecksumReader
from swiftbalancer.transport.experts import ExpertWeights
from swiftbalancer.transport.itinerary import Leg, Piece, legs_of, pieces_of
from swiftbalancer.transport.ledger import Ledger
from swiftbalancer.transport.seam import (
    Carrier,
    ChecksumMismatch,
    ChunkOp,
    TransferBatch,
    TransferLimits,
    TransferTimedOut,
)
from swiftbalancer.transport.staging import CommitCopies, Staging

IntArray = NDArray[np.int64]
GLOO_SLACK_S = 0.05
"""gloo counts timeouts in whole milliseconds on a clock of its own, and may give up a little early."""
READY_TAG = 1
CHECKSUM_TAG = 2
FIRST_CHUNK_TAG = 1 << 12
"""Chunk tags are `leg number + 1` in the high bits and the piece's number in the low twelve."""
CHECKSUM_SHARE = 16
"""Where there is no kernel for checksums, a byte summed is paced as this part of a byte carried."""


@dataclass(frozen=True, slots=True, eq=False)
class Workplace:
    """What every generation of a transport works with."""

    weights: ExpertWeights
    layer: DeviceLayer
    groups: GroupFactory
    limits: TransferLimits
    beside_commit: Callable[[], None] = nothing
    """Launched on the main stream with the copies of every commit; always the same launches."""
    rest: Callable[[], None] = nothing
    """Called between pieces of work, see `StepTimes`; likewise the next."""
    adapt: Callable[[], None] = nothing
    """Called whenever bytes were allowed."""
    is_dear: Callable[[], bool] = lambda: False
    """Whether steps get longer by what the transport's thread computes."""
    nudge: Callable[[], None] = nothing
    """Called when a batch begins to wait for bytes, and when it is over; see `Ledger`."""


@dataclass(frozen=True, slots=True, eq=False)
class Links:
    """What one generation has connected: the control group, the payload's carrier, the staging memory."""

    control: Group
    carrier: Carrier
    staging: Staging
    sent: ChecksumReader
    arrived: ChecksumReader
    """On a device with kernels it reads the table that `staging` fills."""
    settled: Event


class Job(Struct, frozen=True, eq=False):
    """A batch to stage. `readable` marks the end of what wrote live slots on the main stream."""

    batch: TransferBatch
    readable: Event
    deadline: float
    """`time.monotonic()` seconds."""


class Calls(Struct, frozen=True, eq=False):
    """Messages on their way at the beginning of a batch: `[cycle, batch]`, ours and each receiver's."""

    token: torch.Tensor
    heard: dict[int, torch.Tensor]
    works: list[dist.Work]


class RoundPlan(Struct):
    """This rank's share of a round, not yet turned into operations."""

    halves: list[tuple[Leg, Piece]] = []

    def cost(self) -> int:
        """Bytes of the larger direction: what is sent and what is received go side by side."""
        sizes: dict[int, int] = {}
        for leg, piece in self.halves:
            sizes[leg.number] = sizes.get(leg.number, 0) + piece.num_bytes
        return max(sizes.values())


class BatchRun:
    """Runs with the side stream current. Every wait is of this thread alone and bounded by the job's deadline."""

    def __init__(self, place: Workplace, links: Links, job: Job) -> None:
        self._place = place
        self._links = links
        self._job = job
        self._me = place.groups.rank
        self._keep: list[torch.Tensor] = []
        """What kernels and messages read until the batch is over."""
        legs = legs_of(job.batch, place.weights.slots_per_rank)
        self._sends = [leg for leg in legs if leg.source_rank == self._me]
        self._arrivals = [leg for leg in legs if leg.target_rank == self._me]

    def run(self, ledger: Ledger) -> CommitCopies:
        """Stages the batch and gives the copies that commit it; raises `TransferFailed`.

        What can be made ready is, while messages are on their way.
        """
        links, rest = self._links, self._place.rest
        rest()
        self._check_room()
        self._job.readable.synchronize()
        calls = self._call_peers()
        rest()
        self._sum_sent(ledger)
        rest()
        copies = links.staging.commit_copies([(leg.layer, leg.target_slot) for leg in self._arrivals])
        rest()
        self._meet(calls)
        rest()
        self._carry(ledger)
        self._settle()
        rest()
        sent = self._read(links.sent, self._sends)
        told = self._tell_checksums(sent)
        rest()
        expected = sent | self._hear_checksums()
        self._finish(told, "telling peers that all was sent")
        self._sum_arrived(ledger)
        rest()
        self._settle()
        self._compare(expected, self._read(links.arrived, self._arrivals))
        return copies

    def _check_room(self) -> None:
        room = Staging.num_entries(self._place.weights, self._place.limits.staging_bytes)
        if len(self._arrivals) > room:
            raise TransferFailed(f"a batch brings {len(self._arrivals)} experts to a rank whose staging holds {room}")

    def _call_peers(self) -> Calls:
        """Tells senders that staging here is free, and asks receivers."""
        control = self._links.control
        token = torch.tensor([self._job.batch.cycle, self._job.batch.batch])
        heard = {peer: torch.empty_like(token) for peer in _peers(self._sends, self._me)}
        works = [control.send(token, peer, READY_TAG) for peer in _peers(self._arrivals, self._me)]
        works += [control.recv(tensor, peer, READY_TAG) for peer, tensor in heard.items()]
        return Calls(token, heard, works)

    def _meet(self, calls: Calls) -> None:
        """Waits for peers to call, before anybody writes.

        It also keeps a collective library's kernels from spinning on the device for a peer that is late.
        """
        self._finish(calls.works, "waiting for peers to begin the batch")
        for peer, tensor in calls.heard.items():
            if not torch.equal(tensor, calls.token):
                raise TransferFailed(f"rank {peer} is at cycle, batch {tensor.tolist()}, here {calls.token.tolist()}")

    def _carry(self, ledger: Ledger) -> None:
        plans = self._rounds()
        costs = [plan.cost() for plan in plans]
        self._place.rest()
        first = 0
        while first < len(plans):
            taken = self._take(ledger, costs[first:])
            self._carry_some(plans[first : first + taken])
            ledger.moved(sum(costs[first : first + taken]))
            first += taken
            self._place.rest()

    def _take(self, ledger: Ledger, costs: Sequence[int]) -> int:
        at_once = self._links.carrier.at_once if self._place.is_dear() else 0
        taken = ledger.take(costs, self._job.deadline, at_once=at_once)
        self._place.adapt()
        return taken

    def _carry_some(self, plans: Sequence[RoundPlan]) -> None:
        rounds: list[list[ChunkOp]] = []
        for plan in plans:
            rounds.append([self._op(leg, piece) for leg, piece in plan.halves if leg.source_rank != leg.target_rank])
        local = [half for plan in plans for half in plan.halves if half[0].source_rank == half[0].target_rank]
        for leg, piece in local:
            here = slice(piece.start, piece.stop)
            self._place.layer.copy(self._staged(leg, piece)[here], self._block(leg, piece)[here])
        self._links.carrier.carry([ops for ops in rounds if ops], self._job.deadline)
        if local:
            self._settle()

    def _rounds(self) -> list[RoundPlan]:
        rounds: dict[tuple[int, int], RoundPlan] = {}
        arrivals = self._arrivals if self._links.carrier.receives else []
        mine = {leg.number: leg for leg in [*self._sends, *arrivals]}
        for number in sorted(mine):
            leg = mine[number]
            for piece in pieces_of(self._place.weights, leg.layer, self._place.limits.chunk_bytes):
                rounds.setdefault((leg.wave, piece.turn), RoundPlan()).halves.append((leg, piece))
        return [rounds[key] for key in sorted(rounds)]

    def _op(self, leg: Leg, piece: Piece) -> ChunkOp:
        is_send = leg.source_rank == self._me
        return ChunkOp(
            is_send=is_send,
            block=self._block(leg, piece) if is_send else self._staged(leg, piece),
            start=piece.start,
            stop=piece.stop,
            peer=leg.target_rank if is_send else leg.source_rank,
            offset=self._links.staging.offset(leg.entry, piece.part.offset + piece.start),
            tag=(leg.number + 1) * FIRST_CHUNK_TAG + piece.number,
        )

    def _staged(self, leg: Leg, piece: Piece) -> torch.Tensor:
        return self._links.staging.tensors(leg.entry, leg.layer)[piece.kind]

    def _block(self, leg: Leg, piece: Piece) -> torch.Tensor:
        dense = self._place.weights.flat(leg.layer, leg.source_slot)[piece.kind]
        if dense is not None:
            return dense
        return self._packed(self._place.weights.slot(leg.layer, leg.source_slot)[piece.kind])

    def _live_bytes(self, leg: Leg) -> list[torch.Tensor]:
        flat = self._place.weights.flat(leg.layer, leg.source_slot)
        blocks = [dense for dense in flat if dense is not None]
        if len(blocks) == len(flat):
            return blocks
        live = self._place.weights.slot(leg.layer, leg.source_slot)
        return [self._packed(t) if dense is None else dense for dense, t in zip(flat, live, strict=True)]

    def _staged_bytes(self, leg: Leg) -> list[torch.Tensor]:
        return self._links.staging.tensors(leg.entry, leg.layer)

    def _packed(self, live: torch.Tensor) -> torch.Tensor:
        """The bytes of a tensor with gaps, in a copy without."""
        packed = torch.empty(live.shape, dtype=live.dtype, device=live.device)
        self._place.layer.copy(packed, live.detach())
        return packed.view(-1).view(torch.uint8)

    # -- verification -----------------------------------------------------------------------------------------

    def _sum_sent(self, ledger: Ledger) -> None:
        """Launches the checksum of each expert that leaves, in its slot.

        A kernel reads a batch in less than half a millisecond, and what that costs shows in the steps that the pacer
        measures. Other devices take many times as long, and are paced.
        """
        if not (self._place.limits.verify and self._sends):
            return
        reader, num = self._links.sent, len(self._sends)
        reader.fit(num)
        if reader.table is None:
            self._sum_paced(reader, self._sends, ledger)
            return
        layers, slots = np.array([(leg.layer, leg.source_slot) for leg in self._sends]).T
        rows = reader.table.rows(num)
        rows[:] = self._place.weights.segments[layers, slots]
        if self._place.weights.loose:
            self._pack_loose(rows)
        reader.table.send(num)
        reader.launch_table()

    def _sum_arrived(self, ledger: Ledger) -> None:
        """The same in staging."""
        if not (self._place.limits.verify and self._arrivals):
            return
        if self._links.arrived.table is None:
            self._sum_paced(self._links.arrived, self._arrivals, ledger)
        else:
            self._links.arrived.launch_table()

    def _sum_paced(self, reader: ChecksumReader, legs: Sequence[Leg], ledger: Ledger) -> None:
        bytes_of = self._staged_bytes if legs is self._arrivals else self._live_bytes
        costs = [self._place.weights.payload_bytes(leg.layer) // CHECKSUM_SHARE for leg in legs]
        first = 0
        while first < len(legs):
            taken = self._take(ledger, costs[first:])
            reader.launch([bytes_of(leg) for leg in legs[first : first + taken]], first=first)
            first += taken

    def _pack_loose(self, rows: IntArray) -> None:
        """Reads copies of the tensors that are not dense blocks."""
        weights = self._place.weights
        for number, kind in np.argwhere((rows[..., READ] == 0) & (rows[..., BYTES] > 0)).tolist():
            leg = self._sends[number]
            packed = self._packed(weights.slot(leg.layer, leg.source_slot)[kind])
            self._keep.append(packed)
            rows[number, kind, READ] = packed.data_ptr()

    def _read(self, reader: ChecksumReader, legs: Sequence[Leg]) -> dict[int, int]:
        """Leg number -> checksum; zeros where nothing is verified."""
        values = reader.values(len(legs)) if self._place.limits.verify else [0] * len(legs)
        return dict(zip((leg.number for leg in legs), values, strict=True))

    def _tell_checksums(self, sent: dict[int, int]) -> list[dist.Work]:
        """A message to each receiver, which also says: all has left me."""
        works: list[dist.Work] = []
        for peer in _peers(self._sends, self._me):
            values = torch.tensor([sent[leg.number] for leg in self._sends if leg.target_rank == peer])
            self._keep.append(values)
            works.append(self._links.control.send(values, peer, CHECKSUM_TAG))
        return works

    def _hear_checksums(self) -> dict[int, int]:
        """Leg number -> the sender's checksum, of what other ranks sent; all of it is here then."""
        known: dict[int, int] = {}
        for peer in _peers(self._arrivals, self._me):
            legs = [leg for leg in self._arrivals if leg.source_rank == peer]
            heard = torch.empty(len(legs), dtype=torch.int64)
            work = self._links.control.recv(heard, peer, CHECKSUM_TAG)
            self._finish([work], f"waiting for rank {peer} to finish sending")
            known |= zip([leg.number for leg in legs], heard.tolist(), strict=True)
        return known

    def _compare(self, expected: dict[int, int], arrived: dict[int, int]) -> None:
        for leg in self._arrivals:
            value = arrived[leg.number]
            if value != expected[leg.number]:
                _, expert, source, target = self._job.batch.moves[leg.number].tolist()
                raise ChecksumMismatch(
                    f"layer {leg.layer}, expert {expert}: slot {source} sent checksum {expected[leg.number]:#x}, "
                    f"what arrived for slot {target} has {value:#x}"
                )

    # -- waiting ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Waits for the side stream to have run what was launched so far."""
        event = self._links.settled
        self._place.layer.record(event)
        event.synchronize()

    def _finish(self, works: Sequence[dist.Work], doing: str) -> None:
        finish(self._links.control, works, self._job.deadline, doing)


def finish(group: Group, works: Sequence[dist.Work], deadline: float, doing: str) -> None:
    """Waits for `works` of a gloo group; raises `TransferTimedOut` or `TransferFailed` saying what was going on."""
    for work in works:
        try:
            group.wait(work, max(deadline - time.monotonic(), 0.001))
        except RuntimeError as error:
            kind = TransferTimedOut if time.monotonic() >= deadline - GLOO_SLACK_S else TransferFailed
            raise kind(f"{doing}: {error}") from error


def _peers(legs: Sequence[Leg], me: int) -> list[int]:
    """The other ends of `legs` as seen from rank `me`, without `me`, ascending."""
    ends = {leg.target_rank if leg.source_rank == me else leg.source_rank for leg in legs}
    return sorted(ends - {me})
