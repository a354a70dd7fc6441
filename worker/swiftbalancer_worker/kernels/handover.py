"""Where reads of weights count: the few moves after which no rank reads more than its part.

Every expert is served by one of its replicas, as `concentrate` has it. Each step takes an expert off the slowest
rank: to a slot of another rank whose expert is served elsewhere, or can be (one move), or in exchange for an expert
that costs less (two moves). What lowers the sum of time^8 most for its price is done. The expert's old slot keeps a
spare replica. Between steps experts are handed on among the replicas there are, which costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.candidates import Rules
from swiftbalancer_worker.kernels.compiler import jit, jit_inlined, jit_inner
from swiftbalancer_worker.kernels.concentrate import Choice, choose_each, hand_on, slowest, time_with
from swiftbalancer_worker.kernels.layers import Demand
from swiftbalancer_worker.kernels.repair import goal
from swiftbalancer_worker.kernels.search import Ground

LEAST_GAIN = 1e-4
"""Drop of the sum of time^8 for its price below which a layer is left as it is; the ideal time is 1."""


class Table(NamedTuple):
    """A layer's slots. `place` `[ranks, slots]` int64; `fresh` `[ranks, slots]` bool: filled by this plan, to be left
    alone; `received` `[ranks]` int64, experts new on each rank."""

    place: NDArray[np.int64]
    fresh: NDArray[np.bool_]
    received: NDArray[np.int64]


class Shift(NamedTuple):
    """`expert` leaves the slowest rank for slot `slot` of `rank`.

    `taker`: the rank that then serves the expert of that slot, -1 if it was served elsewhere anyway; `own_slot`:
    where that expert goes on the slowest rank, -1 if nowhere. `gain`: drop of the sum of time^8 over the price.
    """

    expert: int
    rank: int
    slot: int
    taker: int
    own_slot: int
    gain: float


@jit
def hand_over(place: NDArray[np.int64], price: NDArray[np.float64], demand: Demand, rules: Rules) -> None:
    """Improves `place` `[layers, ranks, slots]` in place; `price` `[layers, experts]`: tokens and reads of each.

    Layers with an expert that no serving rank holds stay as they are.
    """
    layers, ranks, slots = place.shape
    experts = price.shape[1]
    for i in range(layers):
        ideal = price[i].sum() / demand.speed.sum()
        if ideal <= 0.0:
            continue
        choice = Choice(
            np.zeros(experts, np.int64), np.zeros(experts, np.int64), np.zeros((experts, ranks), np.int64),
            price[i] / ideal, np.zeros(ranks), demand.speed,
        )  # fmt: skip
        table = Table(place[i], np.zeros((ranks, slots), np.bool_), np.zeros(ranks, np.int64))
        find_hosts(choice, table)
        if choice.replicas.min() > 0:
            choose_each(choice)
            improve(choice, table, Ground(demand.node, demand.far, demand.home[i]), rules)


@jit_inner
def find_hosts(choice: Choice, table: Table) -> None:
    """The serving ranks that hold each expert."""
    ranks, slots = table.place.shape
    for r in range(ranks):
        for s in range(slots):
            expert = table.place[r, s]
            if choice.speed[r] > 0.0 and expert >= 0 and not holds(choice, expert, r):
                add_host(choice, expert, r)


@jit_inner
def improve(choice: Choice, table: Table, ground: Ground, rules: Rules) -> None:
    """Shifts experts within the rules until the target is met or nothing helps."""
    used = 0
    hand_on(choice)
    while used < rules.budget:
        hot = slowest(choice)
        if choice.load[hot] / choice.speed[hot] <= (rules.target if used == 0 else goal(rules)):
            break
        shift = best_shift(choice, table, ground, (hot, rules.staging, rules.budget - used))
        if shift.expert < 0:
            break
        used += carry_out(choice, table, shift, hot)
        hand_on(choice)


@jit_inner
def best_shift(choice: Choice, table: Table, ground: Ground, limits: tuple[int, int, int]) -> Shift:
    """What gains most for its price; `limits`: the slowest rank, experts a rank may receive, moves left."""
    hot, staging, left = limits
    ranks, slots = table.place.shape
    best = Shift(-1, -1, -1, -1, -1, LEAST_GAIN)
    for own in range(slots):
        expert = table.place[hot, own]
        if expert < 0 or served_from(choice, expert) != hot or table.fresh[hot, own]:
            continue
        for r in range(ranks):
            if r == hot or table.received[r] >= staging or not may_hold(choice, ground, expert, r):
                continue
            cost = price_of(choice, ground, expert, r)
            for s in range(slots):
                other = table.place[r, s]
                if table.fresh[r, s]:
                    continue
                if is_spare(choice, table, r, s):
                    gain = gain_of(choice, expert, -1, (hot, r, -1)) / cost
                    if gain > best.gain:
                        best = Shift(expert, r, s, -1, -1, gain)
                elif choice.replicas[other] > 1:
                    taker = cheapest_other(choice, other, r)
                    gain = gain_of(choice, expert, other, (hot, r, taker)) / cost
                    if gain > best.gain:
                        best = Shift(expert, r, s, taker, -1, gain)
                elif left > 1 and table.received[hot] < staging and may_hold(choice, ground, other, hot):
                    both = cost + price_of(choice, ground, other, hot)
                    gain = gain_of(choice, expert, other, (hot, r, hot)) / both
                    if gain > best.gain:
                        best = Shift(expert, r, s, hot, own, gain)
    return best


@jit_inner
def carry_out(choice: Choice, table: Table, shift: Shift, hot: int) -> int:
    """Does a shift; returns the moves it costs."""
    other = table.place[shift.rank, shift.slot]
    table.place[shift.rank, shift.slot] = shift.expert
    table.fresh[shift.rank, shift.slot] = True
    table.received[shift.rank] += 1
    moves = 1
    if shift.own_slot >= 0:
        table.place[hot, shift.own_slot] = other
        table.fresh[hot, shift.own_slot] = True
        table.received[hot] += 1
        moves = 2
        add_host(choice, other, hot)
    add_host(choice, shift.expert, shift.rank)
    if shift.taker >= 0:
        serve_from(choice, other, shift.taker)
    serve_from(choice, shift.expert, shift.rank)
    if other >= 0 and not in_row(table, shift.rank, other):
        drop_host(choice, other, shift.rank)
    if shift.own_slot >= 0 and not in_row(table, hot, shift.expert):
        drop_host(choice, shift.expert, hot)
    return moves


@jit_inlined
def gain_of(choice: Choice, expert: int, other: int, ranks: tuple[int, int, int]) -> float:
    """By how much the sum of time^8 falls if `expert` goes from the first of `ranks` to the second, and what that one
    served, `other` or -1, to the third."""
    hot, rank, taker = ranks
    price = choice.price[expert]
    displaced = choice.price[other] if other >= 0 else 0.0
    back = displaced if taker == hot else 0.0
    gain = eighth(choice, hot, 0.0) - eighth(choice, hot, back - price)
    gain += eighth(choice, rank, 0.0) - eighth(choice, rank, price - displaced)
    if taker >= 0 and taker != hot:
        gain += eighth(choice, taker, 0.0) - eighth(choice, taker, displaced)
    return float(gain)


@jit_inlined
def eighth(choice: Choice, rank: int, more: float) -> float:
    """time^8 of a rank with so much more load."""
    squared = ((choice.load[rank] + more) / choice.speed[rank]) ** 2
    return float(squared * squared * squared * squared)


@jit_inlined
def served_from(choice: Choice, expert: int) -> int:
    """The rank that serves an expert."""
    return int(choice.host[expert, choice.place[expert]])


@jit_inlined
def holds(choice: Choice, expert: int, rank: int) -> bool:
    """Whether a serving rank has the expert."""
    found = False
    for k in range(choice.replicas[expert]):
        found = found or choice.host[expert, k] == rank
    return found


@jit_inlined
def may_hold(choice: Choice, ground: Ground, expert: int, rank: int) -> bool:
    """Whether a serving rank that has not got the expert may get it."""
    home = ground.home[expert]
    return choice.speed[rank] > 0.0 and (home < 0 or home == ground.node[rank]) and not holds(choice, expert, rank)


@jit_inlined
def price_of(choice: Choice, ground: Ground, expert: int, rank: int) -> float:
    """Of a move of the expert to the rank, one within a node being 1."""
    price = ground.far
    for k in range(choice.replicas[expert]):
        if ground.node[choice.host[expert, k]] == ground.node[rank]:
            price = 1.0
    return float(price)


@jit_inlined
def is_spare(choice: Choice, table: Table, rank: int, slot: int) -> bool:
    """Whether nothing is served from a slot, or its rank has the expert once more."""
    expert = table.place[rank, slot]
    again = False
    for s in range(table.place.shape[1]):
        again = again or (s != slot and table.place[rank, s] == expert)
    return expert < 0 or again or served_from(choice, expert) != rank


@jit_inlined
def in_row(table: Table, rank: int, expert: int) -> bool:
    """Whether some slot of the rank holds the expert."""
    found = False
    for s in range(table.place.shape[1]):
        found = found or table.place[rank, s] == expert
    return found


@jit_inlined
def cheapest_other(choice: Choice, expert: int, rank: int) -> int:
    """The host of an expert, other than `rank`, that needs least time with it."""
    best = -1
    for k in range(choice.replicas[expert]):
        if choice.host[expert, k] == rank:
            continue
        if best < 0 or time_with(choice, expert, k) < time_with(choice, expert, best):
            best = k
    return int(choice.host[expert, best])


@jit_inlined
def serve_from(choice: Choice, expert: int, rank: int) -> None:
    """Serves an expert from another of its hosts."""
    choice.load[served_from(choice, expert)] -= choice.price[expert]
    choice.load[rank] += choice.price[expert]
    for k in range(choice.replicas[expert]):
        if choice.host[expert, k] == rank:
            choice.place[expert] = k


@jit_inlined
def add_host(choice: Choice, expert: int, rank: int) -> None:
    """A rank more that has the expert."""
    choice.host[expert, choice.replicas[expert]] = rank
    choice.replicas[expert] += 1


@jit_inlined
def drop_host(choice: Choice, expert: int, rank: int) -> None:
    """A rank less; one from which the expert is not served."""
    last = choice.replicas[expert] - 1
    for k in range(last):
        if choice.host[expert, k] == rank:
            choice.host[expert, k] = choice.host[expert, last]
            if choice.place[expert] == last:
                choice.place[expert] = k
    choice.replicas[expert] = last
