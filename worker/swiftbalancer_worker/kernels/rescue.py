"""What a layer needs before anything else: every expert served, and no slot wasted on a second copy."""

from __future__ import annotations

import numpy as np

from swiftbalancer_worker.kernels.compiler import jit_inlined, jit_inner
from swiftbalancer_worker.kernels.search import Search, add_replica, drop_replica
from swiftbalancer_worker.kernels.water import Layer


@jit_inner
def fill_empty_slots(layer: Layer, search: Search) -> int:
    """Serves experts that no serving rank holds and fills slots that hold nothing useful; returns the moves used."""
    ranks, slots = layer.place.shape
    used = 0
    for expert in range(len(layer.replicas)):
        if layer.replicas[expert] == 0:
            used += rescue(layer, search, expert)
    for r in range(ranks):
        for s in range(slots):
            if layer.speed[r] > 0.0 and layer.place[r, s] < 0:
                best = -1
                for e in range(len(layer.replicas)):
                    if not search.barred[r, e] and (best < 0 or need(layer, e) > need(layer, best)):
                        best = e
                if best >= 0:
                    add_replica(layer, search, best, r, s)
                    used += 1
    return used


@jit_inner
def rescue(layer: Layer, search: Search, expert: int) -> int:
    """Gives an expert without a serving replica the slot that is missed least, on the rank that receives least."""
    ranks, slots = layer.place.shape
    best_rank, best_slot, least = -1, -1, np.inf
    for r in range(ranks):
        for s in range(slots):
            other = layer.place[r, s]
            if layer.speed[r] <= 0.0 or (other >= 0 and layer.replicas[other] < 2):
                continue
            price = search.received[r] * 1e12 + (need(layer, other) if other >= 0 else -1.0)
            if price < least:
                best_rank, best_slot, least = r, s, price
    if best_rank < 0:
        return 0
    if layer.place[best_rank, best_slot] >= 0:
        drop_replica(layer, search, best_rank, best_slot)
    add_replica(layer, search, expert, best_rank, best_slot)
    return 1


@jit_inlined
def need(layer: Layer, expert: int) -> float:
    """Load per replica, summed over scenarios."""
    total = 0.0
    for c in range(len(layer.weight)):
        total += layer.weight[c, expert]
    return float(total / layer.replicas[expert])
