"""A layer under search: who holds what, what has been received, and how slow every rank is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit_inlined, jit_inner
from swiftbalancer_worker.kernels.water import Layer, Scratch, locate, new_scratch, slowest


class Ground(NamedTuple):
    """Where ranks are. `node` `[ranks]` int64; `far`: price of a move between nodes, one within a node being 1.

    `home` `[experts]` int64: the only node that may get replicas of an expert, -1: all nodes may.
    """

    node: NDArray[np.int64]
    far: float
    home: NDArray[np.int64]


class Search(NamedTuple):
    """What a repair remembers.

    `barred` `[ranks, experts]` bool: the rank has the expert, or is not on its home node. `held_before` `[ranks,
    experts]` bool; `price` `[nodes, experts]` float64, of bringing an expert to a node that it was not on or was;
    `node` `[ranks]` int64; `received` `[ranks]` int64, experts new on each rank. `sent` `[ranks]` bool: its link to
    other nodes is taken; `senders` `[experts]` int64, holders whose link is not. `arrived`, `sender` `[ranks]` int64:
    the expert that comes to it from another node, and its holder there; -1 if none. `slow` `[ranks]` float64, one
    over speed. `trial` `[scenarios, ranks]` float64, loads while an action is tried; `own`, `others`
    `[scenarios, slots]` float64, loads of two ranks' slots.
    """

    barred: NDArray[np.bool_]
    held_before: NDArray[np.bool_]
    price: NDArray[np.float64]
    node: NDArray[np.int64]
    received: NDArray[np.int64]
    sent: NDArray[np.bool_]
    senders: NDArray[np.int64]
    arrived: NDArray[np.int64]
    sender: NDArray[np.int64]
    slow: NDArray[np.float64]
    trial: NDArray[np.float64]
    own: NDArray[np.float64]
    others: NDArray[np.float64]
    scratch: Scratch


@jit_inner
def begin(layer: Layer, ground: Ground) -> Search:
    """The state before the first step; locates every expert."""
    scenarios, ranks = layer.load.shape
    experts, most = layer.host.shape
    slots = layer.place.shape[1]
    held = np.zeros((ranks, experts), np.bool_)
    barred = np.zeros((ranks, experts), np.bool_)
    price = np.full((ground.node.max() + 1, experts), ground.far)
    for r in range(ranks):
        for expert in layer.place[r]:
            if expert >= 0:
                held[r, expert] = True
                price[ground.node[r], expert] = 1.0
        for expert in range(experts):
            barred[r, expert] = held[r, expert] or (
                ground.home[expert] >= 0 and ground.home[expert] != ground.node[r]
            )
    locate(layer)
    slow = np.zeros(ranks)
    senders = np.zeros(experts, np.int64)
    for r in range(ranks):
        slow[r] = 1.0 / layer.speed[r] if layer.speed[r] > 0.0 else 0.0
        for expert in range(experts):
            senders[expert] += 1 if held[r, expert] else 0
    return Search(
        barred, held, price, ground.node, np.zeros(ranks, np.int64), np.zeros(ranks, np.bool_), senders,
        np.full(ranks, -1), np.full(ranks, -1), slow, np.zeros((scenarios, ranks)), np.zeros((scenarios, slots)),
        np.zeros((scenarios, slots)), new_scratch(most),
    )  # fmt: skip


@jit_inlined
def attach(layer: Layer, expert: int, rank: int) -> None:
    """Gives an expert a replica on a rank; it carries no load yet."""
    k = layer.replicas[expert]
    layer.host[expert, k] = rank
    layer.replicas[expert] = k + 1
    for c in range(len(layer.load)):
        layer.share[c, expert, k] = 0.0
        layer.load[c, rank] += layer.fixed[expert]


@jit_inlined
def detach(layer: Layer, expert: int, rank: int) -> None:
    """Takes an expert's replica off a rank; the load it carried is missing until the expert is refilled."""
    last = layer.replicas[expert] - 1
    k = replica_on(layer, expert, rank)
    for c in range(len(layer.load)):
        layer.load[c, rank] -= layer.share[c, expert, k] + layer.fixed[expert]
        layer.share[c, expert, k] = layer.share[c, expert, last]
    layer.host[expert, k] = layer.host[expert, last]
    layer.replicas[expert] = last


@jit_inlined
def add_replica(layer: Layer, search: Search, expert: int, rank: int, slot: int) -> None:
    """Puts an expert into a slot that holds nothing useful."""
    attach(layer, expert, rank)
    layer.place[rank, slot] = expert
    search.barred[rank, expert] = True
    if not search.held_before[rank, expert]:
        search.received[rank] += 1


@jit_inlined
def drop_replica(layer: Layer, search: Search, rank: int, slot: int) -> None:
    """Empties a slot."""
    expert = layer.place[rank, slot]
    detach(layer, expert, rank)
    layer.place[rank, slot] = -1
    search.barred[rank, expert] = False
    if not search.held_before[rank, expert]:
        search.received[rank] -= 1
        give_link_back(search, rank, expert)


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


@jit_inlined
def price_of(search: Search, rank: int, expert: int) -> float:
    """What it costs that an expert travels to a rank; 0 if it was there before."""
    return 0.0 if search.held_before[rank, expert] else float(search.price[search.node[rank], expert])


@jit_inlined
def can_travel(search: Search, rank: int, expert: int) -> bool:
    """False if the expert would have to come from another node, and that link or all its holders' are taken."""
    if search.held_before[rank, expert] or search.price[search.node[rank], expert] <= 1.0:
        return True
    return bool(search.arrived[rank] < 0 and search.senders[expert] > 0)


@jit_inlined
def take_link(search: Search, rank: int, expert: int) -> None:
    """Notes the links an expert takes on its way to a rank, if it comes from another node."""
    if search.held_before[rank, expert] or search.price[search.node[rank], expert] <= 1.0:
        return
    search.arrived[rank] = expert
    for holder in range(len(search.sent)):
        if search.held_before[holder, expert] and not search.sent[holder]:
            search.sender[rank] = holder
            search.sent[holder] = True
            for other in range(len(search.senders)):
                search.senders[other] -= 1 if search.held_before[holder, other] else 0
            return


@jit_inlined
def give_link_back(search: Search, rank: int, expert: int) -> None:
    """Frees the links of an expert that is not to come after all."""
    if search.arrived[rank] != expert:
        return
    holder = search.sender[rank]
    search.arrived[rank], search.sender[rank] = -1, -1
    if holder < 0:
        return
    search.sent[holder] = False
    for other in range(len(search.senders)):
        search.senders[other] += 1 if search.held_before[holder, other] else 0


@jit_inlined
def loads_of_slots(layer: Layer, rank: int, out: NDArray[np.float64]) -> None:
    """Writes `[scenarios, slots]`, the load that each slot of a rank carries."""
    for s in range(layer.place.shape[1]):
        expert = layer.place[rank, s]
        k = replica_on(layer, expert, rank)
        for c in range(len(layer.load)):
            out[c, s] = layer.share[c, expert, k] + layer.fixed[expert]


@jit_inlined
def worst_scenario(layer: Layer) -> int:
    """The scenario whose slowest rank is slowest."""
    worst = 0
    for c in range(1, len(layer.load)):
        if slowest(layer, c) > slowest(layer, worst):
            worst = c
    return worst


@jit_inlined
def slowest_rank(layer: Layer, scenario: int) -> int:
    """The rank with the longest time."""
    worst = -1
    longest = -1.0
    for r in range(len(layer.speed)):
        if layer.speed[r] > 0.0 and layer.load[scenario, r] / layer.speed[r] > longest:
            worst, longest = r, layer.load[scenario, r] / layer.speed[r]
    return worst


@jit_inner
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


@jit_inner
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
