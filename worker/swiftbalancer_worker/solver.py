"""The dispatch solver: how each expert's tokens are split over its replicas, exactly and as tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm, column_order, slot_fractions, uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer_worker.kernels.dispatch import FINE, Effort, Split, round_layers, split_layers, write_tables

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """A split of every expert's tokens over its slots.

    `fractions` `[layers, slots]` float64: the share of its expert's tokens each slot serves; 0 on ranks that
    serve nothing. `table` `[layers, experts, width]` int32 expresses it.
    """

    placement: Placement
    fractions: FloatArray
    table: NDArray[np.int32]

    @classmethod
    def of_table(cls, placement: Placement, table: NDArray[np.int32]) -> Dispatch:
        """The split a dispatch table makes."""
        return cls(placement, slot_fractions(table, placement), table)

    def rank_loads(self, loads: FloatArray) -> FloatArray:
        """`[..., layers, experts]` tokens -> `[..., layers, ranks]` tokens if they are split this way."""
        return loads_of_fractions(self.placement, self.fractions, loads)


def loads_of_fractions(placement: Placement, fractions: FloatArray, loads: FloatArray) -> FloatArray:
    """`[..., layers, experts]` tokens, split by `fractions` `[layers, slots]` -> `[..., layers, ranks]` tokens."""
    rows = np.broadcast_to(placement.physical_to_logical_map, (*loads.shape[:-1], fractions.shape[-1]))
    per_slot = np.take_along_axis(loads, rows.astype(np.int64), -1) * fractions
    topology = placement.topology
    ranks: FloatArray = per_slot.reshape(*loads.shape[:-1], topology.num_ranks, topology.slots_per_rank).sum(-1)
    return ranks


def rank_times(placement: Placement, rank_loads: FloatArray) -> FloatArray:
    """`[..., ranks]` loads over speed, of the ranks that serve: what waits for what."""
    speed = placement.topology.speeds()
    times: FloatArray = rank_loads[..., speed > 0] / speed[speed > 0]
    return times


def slowest_over_ideal(placement: Placement, rank_loads: FloatArray) -> FloatArray:
    """`[..., ranks]` loads -> the slowest rank's time over that of a perfect split; 1.0 is perfect.

    With equal speeds and no excluded rank this is max/mean, the imbalance.
    """
    speed = placement.topology.speeds()
    ideal = rank_loads.sum(-1) / speed.sum()
    slowest = rank_times(placement, rank_loads).max(-1)
    ratio: FloatArray = np.divide(slowest, ideal, out=np.ones_like(ideal), where=ideal > 0)
    return ratio


def split(placement: Placement, loads: FloatArray, *, uniform: bool = False, tolerance: float = FINE) -> Split:
    """The best split of `loads` `[layers, experts]` in real numbers; by default within 0.1 % of the optimum."""
    shape = (placement.num_layers, placement.topology.num_ranks, placement.topology.slots_per_rank)
    place = placement.physical_to_logical_map.reshape(shape).astype(np.int64)
    effort = Effort(most_replicas(placement), uniform, tolerance)
    return split_layers(place, np.ascontiguousarray(loads), placement.topology.speeds(), effort)


def most_replicas(placement: Placement) -> int:
    """The largest number of ranks that can host one expert."""
    return max(1, min(int(placement.logical_replica_count().max(initial=1)), placement.topology.num_ranks))


def solve(placement: Placement, loads: FloatArray, form: DispatchForm) -> Dispatch:
    """The best dispatch of expected `loads` `[layers, experts]` that `form` can express."""
    exact = split(placement, loads, uniform=form.kind == "uniform")
    slot = slots_of_hosts(placement, exact)
    if form.kind == "uniform":
        served = fractions_of(placement, slot, _over(exact.share, loads, exact.replicas))
        return Dispatch(placement, served, _uniform_table(placement, slot, exact, form.width))
    width = placement.topology.num_ranks if form.kind == "static" else form.width
    speed = placement.topology.speeds()
    columns = round_layers(exact, np.ascontiguousarray(loads), speed, width)
    table = write_tables(columns, slot, column_order(width))
    share = _over(exact.share, loads, exact.replicas) if form.kind == "exact" else columns / width
    return Dispatch(placement, fractions_of(placement, slot, share), table)


def slots_of_hosts(placement: Placement, exact: Split) -> NDArray[np.int64]:
    """`[layers, experts, max_replicas]` int64, the slot of each replica in a split; -1 padded."""
    place = placement.physical_to_logical_map
    layer = np.arange(place.shape[0])[:, None]
    slots_per_rank = placement.topology.slots_per_rank
    first = np.full((place.shape[0], placement.num_experts, placement.topology.num_ranks), -1, np.int64)
    for slot in range(slots_per_rank - 1, -1, -1):
        at = np.arange(slot, place.shape[1], slots_per_rank)
        first[layer, place[:, at], at // slots_per_rank] = at
    slots = np.take_along_axis(first, exact.host, 2)
    unused = np.arange(exact.host.shape[2]) >= exact.replicas[:, :, None]
    return np.where(unused, -1, slots)


def fractions_of(placement: Placement, slot: NDArray[np.int64], share: FloatArray) -> FloatArray:
    """`[layers, slots]` float64 from the share of each replica."""
    out = np.zeros(placement.physical_to_logical_map.shape)
    layer, expert, nth = np.nonzero(slot >= 0)
    out[layer, slot[layer, expert, nth]] = share[layer, expert, nth]
    return out


def _over(share: FloatArray, loads: FloatArray, count: NDArray[np.int64]) -> FloatArray:
    """Shares of load as shares of one; even where an expert has no load."""
    even = np.broadcast_to(1.0 / np.maximum(count, 1)[:, :, None], share.shape)
    load = np.broadcast_to(loads[:, :, None], share.shape)
    return np.divide(share, load, out=even.copy(), where=load > 0)


def _uniform_table(placement: Placement, slot: NDArray[np.int64], exact: Split, width: int) -> NDArray[np.int32]:
    if not placement.topology.excluded_ranks:
        return uniform_table(placement, width)
    nth = np.arange(exact.host.shape[2])
    count = np.maximum(exact.replicas, 1)[:, :, None]
    columns = np.where(nth < count, width // count + (nth < width % count), 0)
    return write_tables(columns, slot, column_order(width))
