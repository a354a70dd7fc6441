"""Dispatch tables from splits: whole columns, and the slots they name."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit, jit_inlined, jit_inner
from swiftbalancer_worker.kernels.dispatch import Effort, Split, split_layer
from swiftbalancer_worker.kernels.rounding import Rounding, round_layer, share_evenly
from swiftbalancer_worker.kernels.water import new_layer, new_scratch


class Wanted(NamedTuple):
    """What tables are for: `weight` `[layers, experts]` float64, loads; `place` `[layers, ranks, slots]` int64.

    `speed` `[ranks]` float64; `order` `[width]` int64, columns in the order in which a batch reaches them; `exact`:
    fractions are those of the split, not of the tables.
    """

    weight: NDArray[np.float64]
    place: NDArray[np.int64]
    speed: NDArray[np.float64]
    order: NDArray[np.int64]
    exact: bool


class Tables(NamedTuple):
    """`table` `[layers, experts, width]` int32, slots; `fractions` `[layers, slots]` float64.

    `fractions`: the part of its expert's tokens each slot serves.
    """

    table: NDArray[np.int32]
    fractions: NDArray[np.float64]


@jit
def solve_layers(wanted: Wanted, drift: NDArray[np.float64], effort: Effort) -> Tables:
    """`split_layers` and `round_layers` in one.

    Splits of all layers would take longer to get memory for than to fill; one layer's stays in the cache.
    """
    layers, ranks, slots = wanted.place.shape
    experts = wanted.weight.shape[1]
    out, columns = new_tables(wanted), np.empty((experts, effort.most), np.int64)
    layer = new_layer((ranks, slots, experts), 1, effort.most, wanted.speed, effort.uniform)
    scratch = new_scratch(effort.most)
    for i in range(layers):
        layer.place[:] = wanted.place[i]
        layer.weight[0] = wanted.weight[i]
        split_layer(layer, drift[:, i], effort, scratch)
        state = Rounding(
            layer.replicas, layer.host, layer.share[0], layer.load[0], columns, wanted.speed, len(wanted.order)
        )
        write_layer(state, wanted, i, out)
    return out


@jit
def round_layers(wanted: Wanted, split: Split) -> Tables:
    """Tables that come closest to `split`, which is used up."""
    out, columns = new_tables(wanted), np.empty_like(split.host[0])
    for i in range(len(split.load)):
        state = Rounding(
            split.replicas[i], split.host[i], split.share[i], split.load[i], columns, wanted.speed, len(wanted.order)
        )
        write_layer(state, wanted, i, out)
    return out


@jit_inner
def new_tables(wanted: Wanted) -> Tables:
    """Room for the tables of all layers."""
    layers, ranks, slots = wanted.place.shape
    table = np.empty((layers, wanted.weight.shape[1], len(wanted.order)), np.int32)
    return Tables(table, np.zeros((layers, ranks * slots)))


@jit_inner
def write_layer(state: Rounding, wanted: Wanted, layer: int, out: Tables) -> None:
    """Rounds a layer's split and writes its part of `out`."""
    slot = np.empty_like(state.host)
    find_slots(wanted.place[layer], state.replicas, state.host, slot)
    if wanted.exact:
        write_fractions(state.share, state.replicas, slot, out.fractions[layer])
    round_layer(state, wanted.weight[layer])
    owed = np.empty(slot.shape[1], np.int64)
    write_table(state.columns, slot, state.replicas, (wanted.order, owed), out.table[layer])
    if not wanted.exact:
        for e in range(len(slot)):
            for k in range(state.replicas[e]):
                out.fractions[layer, slot[e, k]] = state.columns[e, k] / state.width


@jit
def even_tables(split: Split, place: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int32]:
    """`[layers, experts, order.size]` int32, tables in which the replicas of an expert have equally many columns."""
    layers, experts, most = split.host.shape
    table = np.empty((layers, experts, len(order)), np.int32)
    slot, columns = np.empty((experts, most), np.int64), np.empty((experts, most), np.int64)
    owed = np.empty(most, np.int64)
    for i in range(layers):
        for e in range(experts):
            share_evenly(columns[e], split.replicas[i, e], len(order))
        find_slots(place[i], split.replicas[i], split.host[i], slot)
        write_table(columns, slot, split.replicas[i], (order, owed), table[i])
    return table


@jit
def exact_fractions(split: Split, place: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[layers, slots]` float64, the part of its expert's tokens each slot serves; even where nobody asked."""
    layers, experts, most = split.host.shape
    ranks, slots = place.shape[1:]
    out = np.zeros((layers, ranks * slots))
    slot = np.empty((experts, most), np.int64)
    for i in range(layers):
        find_slots(place[i], split.replicas[i], split.host[i], slot)
        write_fractions(split.share[i], split.replicas[i], slot, out[i])
    return out


@jit_inlined
def write_fractions(
    share: NDArray[np.float64], replicas: NDArray[np.int64], slot: NDArray[np.int64], fractions: NDArray[np.float64]
) -> None:
    """Writes a layer's `fractions` `[slots]` from the load `[experts, max_replicas]` of each replica."""
    for e in range(len(replicas)):
        num = replicas[e]
        total = 0.0
        for k in range(num):
            total += share[e, k]
        for k in range(num):
            fractions[slot[e, k]] = share[e, k] / total if total > 0.0 else 1.0 / num


@jit_inlined
def find_slots(
    place: NDArray[np.int64], replicas: NDArray[np.int64], host: NDArray[np.int64], slot: NDArray[np.int64]
) -> None:
    """Writes `slot` `[experts, max_replicas]`, where each replica of a layer is; -1 for an expert without any."""
    ranks, slots = place.shape
    slot[:, 0] = -1
    for r in range(ranks):
        for s in range(slots - 1, -1, -1):
            expert = place[r, s]
            for k in range(replicas[expert]):
                if host[expert, k] == r:
                    slot[expert, k] = r * slots + s


@jit_inlined
def write_table(
    columns: NDArray[np.int64],
    slot: NDArray[np.int64],
    replicas: NDArray[np.int64],
    turns: tuple[NDArray[np.int64], NDArray[np.int64]],
    table: NDArray[np.int32],
) -> None:
    """Writes a layer's `table` `[experts, width]`: slot `slot[e, k]` in `columns[e, k]` columns.

    `turns`: columns `[width]` in the order in which a batch reaches them, and room for `[max_replicas]`. Replicas
    take turns in proportion, so that every prefix of that order is about right (the smooth weighted round robin of
    nginx); ties start at another replica for each expert, so that first columns do not fall on the same ranks.
    """
    order, owed = turns
    width = len(order)
    for e in range(len(replicas)):
        num = replicas[e]
        if num <= 1 or columns[e, 0] == width:
            table[e, :] = slot[e, 0]
            continue
        owed[:num] = 0
        for column in order:
            best, k = -1, e % num
            for _ in range(num):
                owed[k] += columns[e, k]
                if columns[e, k] > 0 and (best < 0 or owed[k] > owed[best]):
                    best = k
                k = k + 1 if k + 1 < num else 0
            owed[best] -= width
            table[e, column] = slot[e, best]
