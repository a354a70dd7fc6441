"""A layer under search: who holds what, what has been received, and how slow every rank is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit, jit_inlined
from swiftbalancer_worker.kernels.water import Layer, Scratch, locate, new_scratch, slowest


class Search(NamedTuple):
    """What a repair remembers.

    `held`, `held_before` `[ranks, experts]` bool; `received` `[ranks]` int64, experts new on each rank;
    `trial` `[scenarios, ranks]` float64, loads while an action is tried.
    """

    held: NDArray[np.bool_]
    held_before: NDArray[np.bool_]
    received: NDArray[np.int64]
    trial: NDArray[np.float64]
    scratch: Scratch


@jit
def begin(layer: Layer) -> Search:
    """The state before the first step; locates every expert."""
    scenarios, ranks = layer.load.shape
    experts, most = layer.host.shape
    held = np.zeros((ranks, experts), np.bool_)
    for r in range(ranks):
        for expert in layer.place[r]:
            if expert >= 0:
                held[r, expert] = True
    locate(layer)
    shape = (scenarios, ranks)
    return Search(held, held.copy(), np.zeros(ranks, np.int64), np.zeros(shape), new_scratch(most))


@jit
def add_replica(layer: Layer, search: Search, expert: int, rank: int, slot: int) -> None:
    """Puts an expert into a slot that holds nothing useful; it carries no load yet."""
    k = layer.replicas[expert]
    layer.place[rank, slot] = expert
    layer.host[expert, k] = rank
    layer.replicas[expert] = k + 1
    for c in range(len(layer.load)):
        layer.share[c, expert, k] = 0.0
        layer.load[c, rank] += layer.fixed[expert]
    search.held[rank, expert] = True
    if not search.held_before[rank, expert]:
        search.received[rank] += 1


@jit
def drop_replica(layer: Layer, search: Search, rank: int, slot: int) -> None:
    """Empties a slot; the load its replica carried is missing until the expert is refilled."""
    expert = layer.place[rank, slot]
    last = layer.replicas[expert] - 1
    k = replica_on(layer, expert, rank)
    for c in range(len(layer.load)):
        layer.load[c, rank] -= layer.share[c, expert, k] + layer.fixed[expert]
        layer.share[c, expert, k] = layer.share[c, expert, last]
    layer.host[expert, k] = layer.host[expert, last]
    layer.replicas[expert] = last
    layer.place[rank, slot] = -1
    search.held[rank, expert] = False
    if not search.held_before[rank, expert]:
        search.received[rank] -= 1


@jit_inlined
def replica_on(layer: Layer, expert: int, rank: int) -> int:
    """Which replica of an expert sits on a rank; -1 if none does."""
    for k in range(layer.replicas[expert]):
        if layer.host[expert, k] == rank:
            return k
    return -1


@jit_inlined
def is_new(search: Search, rank: int, expert: int) -> int:
    """1 if the expert would have to travel to the rank."""
    return 0 if search.held_before[rank, expert] else 1


@jit
def worst_scenario(layer: Layer) -> int:
    """The scenario whose slowest rank is slowest."""
    worst = 0
    for c in range(1, len(layer.load)):
        if slowest(layer, c) > slowest(layer, worst):
            worst = c
    return worst


@jit
def slowest_rank(layer: Layer, scenario: int) -> int:
    """The rank with the longest time."""
    worst = -1
    longest = -1.0
    for r in range(len(layer.speed)):
        if layer.speed[r] > 0.0 and layer.load[scenario, r] / layer.speed[r] > longest:
            worst, longest = r, layer.load[scenario, r] / layer.speed[r]
    return worst


@jit
def coldest(layer: Layer, scenario: int, num: int) -> NDArray[np.int64]:
    """`[<= num]` int64, ranks in order of their time in a scenario, the idlest first."""
    ranks = len(layer.speed)
    time = np.full(ranks, np.inf)
    live = 0
    for r in range(ranks):
        if layer.speed[r] > 0.0:
            time[r] = layer.load[scenario, r] / layer.speed[r]
            live += 1
    return np.argsort(time, kind="mergesort")[: min(num, live)]


@jit
def hottest(layer: Layer, scenario: int, num: int) -> NDArray[np.int64]:
    """`[<= num]` int64, experts with most load on the slowest ranks, heaviest first."""
    ranks, slots = layer.place.shape
    limit = 0.9995 * slowest(layer, scenario)
    carried = np.zeros(len(layer.replicas))
    found = np.empty(ranks * slots, np.int64)
    size = 0
    for r in range(ranks):
        if layer.speed[r] <= 0.0 or layer.load[scenario, r] < limit * layer.speed[r]:
            continue
        for expert in layer.place[r]:
            share = layer.share[scenario, expert, replica_on(layer, expert, r)]
            if share > 0.0:
                if carried[expert] == 0.0:
                    found[size] = expert
                    size += 1
                carried[expert] += share
    order = np.argsort(-carried[found[:size]], kind="mergesort")
    return found[:size][order[:num]]
