"""How rows travel to the ranks of their slots and back: all-to-all with uneven or with fixed splits.

Both count what arrived. A sender says of each row whether it is to be counted (not if it is padding, or its pass
a dummy or a warm-up), because ranks may serve while others idle: the receiver cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from swiftbalancer_adaptors.minimoe.experts import Rows


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """What came: `rows`, of which `counted` `[slots_per_rank]` int32 are load, and the way back."""

    rows: Rows
    counted: Tensor
    trip: Trip


@dataclass(frozen=True, slots=True, eq=False)
class Trip:
    """What the way back needs.

    `place` `[n * top_k]` int64: where each choice's row will be among those that come back; past their end: nowhere.
    `splits_out`, `splits_in`: rows to and from each rank on the way there, None if even.
    """

    place: Tensor
    splits_out: list[int] | None = None
    splits_in: list[int] | None = None


class Exchange(Protocol):
    """Sends rows to their slots and brings the results back."""

    def scatter(self, x: Tensor, slots: Tensor, counted: Tensor) -> Arrived:
        """`x` `[n, hidden]`, `slots` `[n, top_k]` int64 global slots, `counted` `[n]` int32 0 or 1."""
        ...

    def gather(self, out: Tensor, trip: Trip) -> Tensor:
        """`out` `[m, hidden]` in the order of arrival -> `[n * top_k, hidden]` in the order of the slots sent."""
        ...


class Peers:
    """The expert-parallel group, or this process alone if `group` is None."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def all_to_all(
        self, out: Tensor, given: Tensor, *, splits_out: list[int] | None = None, splits_in: list[int] | None = None
    ) -> Tensor:
        """Rows of `given` to the ranks in turn, `splits_in` each; fills `out`. Equal splits without lists."""
        if self._group is None:
            return out.copy_(given)
        dist.all_to_all_single(out, given, splits_out, splits_in, group=self._group)
        return out


def tally(slots: Tensor, values: Tensor, num: int) -> Tensor:
    """`[num]` int32, the sum of `values` `[n]` int32 for each of `slots` `[n]` int64; no host sync."""
    return torch.zeros(num, dtype=torch.int32, device=slots.device).scatter_add_(0, slots, values)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order` `[n]` int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class UnevenExchange:
    """Exactly the rows there are: one small all-to-all of counts, then one of rows. Syncs with the host once."""

    def __init__(self, peers: Peers, slots_per_rank: int, *, device: torch.device) -> None:
        self._peers = peers
        self._slots = slots_per_rank
        self._owners = torch.arange(slots_per_rank, device=device).repeat(peers.size)

    def scatter(self, x: Tensor, slots: Tensor, counted: Tensor) -> Arrived:
        """See `Exchange`."""
        top_k = slots.shape[1]
        flat = slots.flatten()
        order = flat.argsort(stable=True)
        sent, received = self._exchange_counts(flat, counted.repeat_interleave(top_k))
        splits = torch.stack([sent[:, 0].sum(1), received[:, 0].sum(1)]).tolist()
        x_in = x.new_empty(sum(splits[1]), x.shape[1])
        given = x.index_select(0, order.div(top_k, rounding_mode="floor"))
        self._peers.all_to_all(x_in, given, splits_out=splits[1], splits_in=splits[0])
        owner = self._owners.repeat_interleave(received[:, 0].flatten(), output_size=len(x_in))
        totals = received.sum(0, dtype=torch.int32)
        rows = Rows(x_in, owner.argsort(stable=True), totals[0])
        return Arrived(rows, totals[1], Trip(inverse(order), splits_out=splits[0], splits_in=splits[1]))

    def gather(self, out: Tensor, trip: Trip) -> Tensor:
        """See `Exchange`."""
        back = out.new_empty(len(trip.place), out.shape[1])
        self._peers.all_to_all(back, out, splits_out=trip.splits_out, splits_in=trip.splits_in)
        return back.index_select(0, trip.place)

    def _exchange_counts(self, flat: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """`[ranks, 2, slots_per_rank]` int32 sent to and received from each rank: rows, and those counted."""
        num = self._peers.size * self._slots
        pair = torch.stack([tally(flat, torch.ones_like(counted), num), tally(flat, counted, num)])
        sent = pair.view(2, self._peers.size, self._slots).transpose(0, 1).contiguous()
        return sent, self._peers.all_to_all(torch.empty_like(sent), sent)


class PaddedExchange:
    """Fixed splits of `capacity` rows per pair of ranks: shapes never change and the host is never asked.

    For captured graphs. A row beyond the capacity is dropped, its expert contributes zero, and `overflow` `[1]`
    int64 on the device counts it; `capacity = n * top_k` drops nothing.
    """

    def __init__(self, peers: Peers, slots_per_rank: int, *, capacity: int, device: torch.device) -> None:
        self._peers = peers
        self._slots = slots_per_rank
        self._capacity = capacity
        self.overflow = torch.zeros(1, dtype=torch.int64, device=device)

    def scatter(self, x: Tensor, slots: Tensor, counted: Tensor) -> Arrived:
        """See `Exchange`."""
        top_k = slots.shape[1]
        flat = slots.flatten()
        order = flat.argsort(stable=True)
        place = self._places(flat.index_select(0, order))
        token = order.div(top_k, rounding_mode="floor")
        label = flat.remainder(self._slots) * 2 + counted.repeat_interleave(top_k)
        rows = self._deliver(place, x.index_select(0, token), empty=0)
        labels = self._deliver(place, label.index_select(0, order).int()[:, None], empty=-1)[:, 0]
        local = torch.where(labels < 0, self._slots, labels >> 1).long()
        by_slot = local.argsort(stable=True)
        present = torch.ones_like(labels)
        counts = tally(local, present, self._slots + 1)[:-1]
        load = tally(local, labels & present, self._slots + 1)[:-1]
        trip = Trip(place.index_select(0, inverse(order)))
        return Arrived(Rows(rows, by_slot, counts), load, trip)

    def gather(self, out: Tensor, trip: Trip) -> Tensor:
        """See `Exchange`."""
        back = self._peers.all_to_all(torch.empty_like(out), out)
        fits = trip.place < len(back)
        rows = back.index_select(0, trip.place.clamp(max=len(back) - 1))
        return torch.where(fits[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))

    def _places(self, slots: Tensor) -> Tensor:
        """`[m]` int64, the row of the send buffer for each of the sorted `slots`; one past its end: dropped."""
        rank = slots.div(self._slots, rounding_mode="floor")
        per_rank = tally(rank, torch.ones_like(rank, dtype=torch.int32), self._peers.size).long()
        first = per_rank.cumsum(0) - per_rank
        nth = torch.arange(len(slots), device=slots.device) - first.index_select(0, rank)
        end = self._peers.size * self._capacity
        self.overflow += (nth >= self._capacity).sum()
        return torch.where(nth < self._capacity, rank * self._capacity + nth, end)

    def _deliver(self, place: Tensor, values: Tensor, *, empty: int) -> Tensor:
        """All-to-all of `values` `[m, width]` put at `place`; `[ranks * capacity, width]`, `empty` where none is."""
        end = self._peers.size * self._capacity
        buffer = values.new_full((end + 1, values.shape[1]), empty).index_copy_(0, place, values)[:end]
        return self._peers.all_to_all(torch.empty_like(buffer), buffer)
