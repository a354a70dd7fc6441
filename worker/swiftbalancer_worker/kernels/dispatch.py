"""Dispatch of all layers: fractions by water-filling, and tables that express them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit
from swiftbalancer_worker.kernels.water import (
    Layer,
    allow_for_drift,
    begin_split,
    locate,
    new_layer,
    new_scratch,
    settle,
    slowest,
)

MOST_SWEEPS = 200
FINE, ROUGH = 3e-4, 2e-3
"""Tolerances: for tables, and for comparing placements."""


class Split(NamedTuple):
    """Who serves each expert's tokens, and how many of them.

    `replicas` `[layers, experts]` int64; `host` `[layers, experts, max_replicas]` int64, ranks;
    `share` same shape float64, load of each replica; `load` `[layers, ranks]` float64, with the margin for drift.
    """

    replicas: NDArray[np.int64]
    host: NDArray[np.int64]
    share: NDArray[np.float64]
    load: NDArray[np.float64]


class Effort(NamedTuple):
    """`most`: bound of an expert's replicas on serving ranks; `uniform`: replicas share evenly; `tolerance`: change
    of a share, over the mean rank time, that ends the solver."""

    most: int
    uniform: bool
    tolerance: float


@jit
def split_layers(
    place: NDArray[np.int64],
    weight: NDArray[np.float64],
    drift: NDArray[np.float64],
    speed: NDArray[np.float64],
    effort: Effort,
) -> Split:
    """Splits `weight` `[layers, experts]` over the replicas of `place` `[layers, ranks, slots]`.

    With tolerance `FINE` the largest rank time is within 0.1 % of the least possible. With `drift` `[directions,
    layers, experts]`, ranks that it may load more are left that much idler, and `load` includes this margin.
    """
    most = effort.most
    layers, ranks, _ = place.shape
    experts = weight.shape[1]
    out = Split(
        np.zeros((layers, experts), np.int64),
        np.zeros((layers, experts, most), np.int64),
        np.zeros((layers, experts, most)),
        np.zeros((layers, ranks)),
    )
    scratch = new_scratch(most)
    for i in range(layers):
        layer = Layer(
            place[i].copy(), out.replicas[i], out.host[i], out.share[i : i + 1], out.load[i : i + 1],
            weight[i : i + 1], np.zeros(experts), speed, effort.uniform,
        )  # fmt: skip
        locate(layer)
        first = max(ROUGH, effort.tolerance) if len(drift) > 0 else effort.tolerance
        begin_split(layer, (first, MOST_SWEEPS), scratch)
        if len(drift) > 0 and not effort.uniform:
            allow_for_drift(layer, drift[:, i])
            settle(layer, (effort.tolerance, MOST_SWEEPS), scratch)
    return out


@jit
def least_times(
    place: NDArray[np.int64], weight: NDArray[np.float64], speed: NDArray[np.float64], effort: Effort
) -> NDArray[np.float64]:
    """`[judges, layers]` float64, the slowest rank's time for `weight` `[judges, layers, experts]`, best split."""
    judges, layers, experts = weight.shape
    ranks, slots = place.shape[1:]
    layer = new_layer((ranks, slots, experts), judges, effort.most, speed, effort.uniform)
    scratch = new_scratch(effort.most)
    out = np.empty((judges, layers))
    for i in range(layers):
        layer.place[:] = place[i]
        layer.weight[:] = weight[:, i]
        locate(layer)
        begin_split(layer, (effort.tolerance, MOST_SWEEPS), scratch)
        for c in range(judges):
            out[c, i] = slowest(layer, c)
    return out


@jit
def share_of_slots(
    slot: NDArray[np.int64], share: NDArray[np.float64], replicas: NDArray[np.int64], num_slots: int
) -> NDArray[np.float64]:
    """`[layers, num_slots]` float64, the part of its expert's tokens each slot serves; even where nobody asked.

    `slot`, `share` `[layers, experts, max_replicas]`: where each replica is and what it carries.
    """
    layers, experts, _ = slot.shape
    out = np.zeros((layers, num_slots))
    for i in range(layers):
        for e in range(experts):
            num = replicas[i, e]
            total = 0.0
            for k in range(num):
                total += share[i, e, k]
            for k in range(num):
                out[i, slot[i, e, k]] = share[i, e, k] / total if total > 0.0 else 1.0 / num
    return out


@jit
def slots_of_hosts(place: NDArray[np.int64], split: Split) -> NDArray[np.int64]:
    """`[layers, experts, max_replicas]` int64, the slot of each replica of a split; -1 padded."""
    layers, experts, most = split.host.shape
    slots = place.shape[2]
    out = np.full((layers, experts, most), -1, np.int64)
    for i in range(layers):
        for e in range(experts):
            for k in range(split.replicas[i, e]):
                rank = split.host[i, e, k]
                for s in range(slots - 1, -1, -1):
                    if place[i, rank, s] == e:
                        out[i, e, k] = rank * slots + s
    return out


@jit
def write_tables(columns: NDArray[np.int64], slot: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int32]:
    """`[layers, experts, width]` int32 dispatch tables: slot `slot[l, e, k]` in `columns[l, e, k]` columns.

    `order` `[width]`: columns in the order in which a batch reaches them. Replicas take turns in proportion, so
    that every prefix of that order is about right (the smooth weighted round robin of nginx); ties start at
    another replica for each expert, so that first columns do not fall on the same ranks.
    """
    layers, experts, most = columns.shape
    width = len(order)
    table = np.empty((layers, experts, width), np.int32)
    owed = np.empty(most, np.int64)
    for i in range(layers):
        for e in range(experts):
            num = 1
            while num < most and slot[i, e, num] >= 0:
                num += 1
            if num == 1 or columns[i, e, 0] == width:
                table[i, e, :] = slot[i, e, 0]
                continue
            owed[:] = 0
            for column in order:
                best, k = -1, e % num
                for _ in range(num):
                    owed[k] += columns[i, e, k]
                    if columns[i, e, k] > 0 and (best < 0 or owed[k] > owed[best]):
                        best = k
                    k = k + 1 if k + 1 < num else 0
                owed[best] -= width
                table[i, e, column] = slot[i, e, best]
    return table
