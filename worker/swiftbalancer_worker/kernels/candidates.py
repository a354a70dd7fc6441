"""What a step of a repair may do, and what that would gain if only the experts it touches were split afresh."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit_inlined, jit_inner
from swiftbalancer_worker.kernels.gains import (
    arrival_gain,
    come_back,
    depart,
    levelling_gain,
    score_after_swap,
    score_of_rank,
)
from swiftbalancer_worker.kernels.search import (
    Search,
    can_travel,
    hottest,
    is_new,
    loads_of_slots,
    price_of,
    slowest_rank,
)
from swiftbalancer_worker.kernels.water import Layer, slowest

NOTHING, REPLACE, SWAP = 0, 1, 2
ALIKE = 2
"""Most actions of a shortlist that concern the same expert, or the same rank."""


class Rules(NamedTuple):
    """`budget`: moves in all; `staging`: experts one rank may receive.

    `target`: slowest time that needs no repair; a repair that has begun goes on to half its excess over 1.
    `hot`, `cold`: experts and ranks considered in each step; `tried`: actions tried out in each step.
    """

    budget: int
    staging: int
    target: float
    hot: int
    cold: int
    tried: int


class Action(NamedTuple):
    """`REPLACE`: `expert` takes slot `slot` of `rank`. `SWAP`: it changes places with that slot's expert.

    `own_slot`: where `expert` sits on the slowest rank (`SWAP`). `price`: what it costs; `gain`: score drop over it.
    """

    kind: int
    expert: int
    own_slot: int
    rank: int
    slot: int
    price: float
    gain: float


class Shortlist(NamedTuple):
    """The actions worth trying out: `expert`, `rank`, `slot` `[n]` int64, -1 where empty; `price`, `gain` `[n]`."""

    expert: NDArray[np.int64]
    rank: NDArray[np.int64]
    slot: NDArray[np.int64]
    price: NDArray[np.float64]
    gain: NDArray[np.float64]


class Reach(NamedTuple):
    """Where a step looks: the scenario that hurts, the rules left, and the idle ranks, idlest first."""

    scenario: int
    rules: Rules
    ranks: NDArray[np.int64]


@jit_inner
def new_shortlist(size: int, least: float) -> Shortlist:
    """No actions yet, room for `size` whose gain is above `least`."""
    return Shortlist(np.full(size, -1), np.full(size, -1), np.full(size, -1), np.zeros(size), np.full(size, least))


@jit_inlined
def offer(short: Shortlist, expert: int, rank: int, slot: int, worth: tuple[float, float]) -> None:
    """Puts a replacement of some `worth` (price, gain) on the list in place of a weaker one.

    Where enough are alike already, in place of one of those.
    """
    price, gain = worth
    same_expert, same_rank, least = 0, 0, gain
    for i in range(len(short.gain)):
        least = min(least, short.gain[i])
        same_expert += 1 if short.expert[i] == expert else 0
        same_rank += 1 if short.rank[i] == rank else 0
    if gain <= least:
        return
    weakest = -1
    for i in range(len(short.gain)):
        if same_expert >= ALIKE and short.expert[i] != expert:
            continue
        if same_expert < ALIKE and same_rank >= ALIKE and short.rank[i] != rank:
            continue
        if weakest < 0 or short.gain[i] < short.gain[weakest]:
            weakest = i
    if gain > short.gain[weakest]:
        short.expert[weakest], short.rank[weakest], short.slot[weakest] = expert, rank, slot
        short.price[weakest], short.gain[weakest] = price, gain


@jit_inner
def list_replacements(layer: Layer, search: Search, reach: Reach, short: Shortlist) -> None:
    """Lists replicas for a hot expert in slots of idle ranks whose experts have other replicas."""
    rules = reach.rules
    limit = 0.9995 * slowest(layer, reach.scenario)
    experts = hottest(layer, reach.scenario, rules.hot)
    search.trial[:] = layer.load
    for rank in reach.ranks:
        if layer.load[reach.scenario, rank] >= limit * layer.speed[rank]:
            continue
        for slot in range(layer.place.shape[1]):
            leaving = layer.place[rank, slot]
            if layer.replicas[leaving] < 2:
                continue
            departure = depart(layer, search, leaving, rank)
            for expert in experts:
                if search.barred[rank, expert] or layer.replicas[expert] >= layer.host.shape[1]:
                    continue
                cost = is_new(search, rank, expert) - is_new(search, rank, leaving)
                if cost > rules.budget or search.received[rank] + cost > rules.staging:
                    continue
                price = max(0.5, price_of(search, rank, expert) - price_of(search, rank, leaving))
                if not can_travel(search, rank, expert):
                    continue
                gain = (departure + arrival_gain(layer, search, expert, rank)) / price
                offer(short, expert, rank, slot, (price, gain))
            come_back(layer, search, leaving)


@jit_inlined
def best_swap(layer: Layer, search: Search, reach: Reach, best: Action) -> Action:
    """`best`, or an exchange of an expert of the slowest rank with one of an idle rank if that gains more.

    An exchange costs 2 or more unless it undoes an earlier step; ranks between which that cannot pay are passed over.
    """
    hot = slowest_rank(layer, reach.scenario)
    loads_of_slots(layer, hot, search.own)
    budget, staging = reach.rules.budget, reach.rules.staging
    for rank in reach.ranks:
        if rank == hot or levelling_gain(layer, hot, rank) <= 2.0 * best.gain:
            continue
        loads_of_slots(layer, rank, search.others)
        before = score_of_rank(layer, hot) + score_of_rank(layer, rank)
        for own_slot in range(layer.place.shape[1]):
            expert = layer.place[hot, own_slot]
            if search.barred[rank, expert]:
                continue
            for slot in range(layer.place.shape[1]):
                other = layer.place[rank, slot]
                lighter = search.others[reach.scenario, slot] < search.own[reach.scenario, own_slot]
                if not lighter or search.barred[hot, other]:
                    continue
                gain = before - score_after_swap(layer, search, (hot, rank), (own_slot, slot))
                if gain <= best.gain:
                    continue
                arrives = is_new(search, rank, expert) - is_new(search, rank, other)
                returns = is_new(search, hot, other) - is_new(search, hot, expert)
                if arrives + returns > budget or search.received[rank] + arrives > staging:
                    continue
                if search.received[hot] + returns > staging:
                    continue
                if not can_travel(search, rank, expert) or not can_travel(search, hot, other):
                    continue
                price = price_of(search, rank, expert) - price_of(search, rank, other)
                price = max(0.5, price + price_of(search, hot, other) - price_of(search, hot, expert))
                if gain / price > best.gain:
                    best = Action(SWAP, expert, own_slot, rank, slot, price, gain / price)
    return best
