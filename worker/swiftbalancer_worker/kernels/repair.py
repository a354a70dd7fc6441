"""Budgeted repair: the few moves that relieve a layer's slowest ranks most, starting from where experts are.

Every step looks at the slowest rank of the worst scenario, tries to give the experts that load it another
replica on an idle rank (one move) or to exchange an expert with an idle rank (two moves), scores each by how far
the sum over scenarios and ranks of time^8 falls once the touched experts are split afresh, over what the moves
cost, and takes the best. It ends at the target, at the budget, or where nothing helps.
"""

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
    total_score,
)
from swiftbalancer_worker.kernels.rescue import fill_empty_slots
from swiftbalancer_worker.kernels.search import (
    Ground,
    Search,
    add_replica,
    begin,
    can_travel,
    coldest,
    drop_replica,
    hottest,
    is_new,
    loads_of_slots,
    price_of,
    slowest_rank,
    take_link,
    worst_scenario,
)
from swiftbalancer_worker.kernels.water import Layer, begin_split, refill, settle, share_equally, slowest

NOTHING, REPLACE, SWAP = 0, 1, 2
EFFORT = (1e-3, 20)
"""Of the solver between steps: tolerance and most sweeps."""
LEAST_GAIN = 1e-4
"""Score drop over price, as a part of the score, below which a repair ends."""


class Rules(NamedTuple):
    """`budget`: moves in all; `staging`: experts one rank may receive.

    `target`: slowest time that needs no repair; a repair that has begun goes on to half its excess over 1.
    `hot`, `cold`: experts and ranks considered in each step.
    """

    budget: int
    staging: int
    target: float
    hot: int
    cold: int


class Action(NamedTuple):
    """`REPLACE`: `expert` takes slot `slot` of `rank`. `SWAP`: it changes places with that slot's expert.

    `gain`: score drop over price; `own_slot`: where `expert` sits on the slowest rank (`SWAP`).
    """

    kind: int
    expert: int
    own_slot: int
    rank: int
    slot: int
    gain: float


class Reach(NamedTuple):
    """Where a step looks: the scenario that hurts, the rules left, and the idle ranks, idlest first."""

    scenario: int
    rules: Rules
    ranks: NDArray[np.int64]


@jit_inner
def repair(layer: Layer, ground: Ground, rules: Rules) -> int:
    """Improves `layer` in place within `rules`; returns the moves used. Loads are scaled to a mean time of 1."""
    search = begin(layer, ground)
    used = fill_empty_slots(layer, search)
    begin_split(layer, EFFORT, search.scratch)
    for _ in range(64):
        scenario = worst_scenario(layer)
        if slowest(layer, scenario) <= (rules.target if used == 0 else 0.5 * (1.0 + rules.target)):
            break
        left = Rules(rules.budget - used, rules.staging, rules.target, rules.hot, rules.cold)
        action = best_action(layer, search, scenario, left)
        if action.kind == NOTHING:
            break
        used += apply(layer, search, action, scenario)
        settle(layer, EFFORT, search.scratch)
    return used


@jit_inner
def best_action(layer: Layer, search: Search, scenario: int, rules: Rules) -> Action:
    """The action with the largest score drop for its price within `rules.budget`."""
    search.trial[:] = layer.load
    reach = Reach(scenario, rules, coldest(layer, scenario, rules.cold))
    best = Action(NOTHING, -1, -1, -1, -1, LEAST_GAIN * total_score(layer))
    best = best_replace(layer, search, reach, best)
    return best_swap(layer, search, reach, best)


@jit_inner
def best_replace(layer: Layer, search: Search, reach: Reach, best: Action) -> Action:
    """`best`, or a replica for a hot expert in a slot of an idle rank if that gains more per move."""
    rules = reach.rules
    limit = 0.9995 * slowest(layer, reach.scenario)
    experts = hottest(layer, reach.scenario, rules.hot)
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
                if gain > best.gain:
                    best = Action(REPLACE, expert, -1, rank, slot, gain)
            come_back(layer, search, leaving)
    return best


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
                price += price_of(search, hot, other) - price_of(search, hot, expert)
                if gain / max(price, 0.5) > best.gain:
                    best = Action(SWAP, expert, own_slot, rank, slot, gain / max(price, 0.5))
    return best


@jit_inner
def apply(layer: Layer, search: Search, action: Action, scenario: int) -> int:
    """Does an action and splits the touched experts afresh; returns the moves it costs."""
    before = search.received.sum()
    leaving = layer.place[action.rank, action.slot]
    hot = slowest_rank(layer, scenario)
    drop_replica(layer, search, action.rank, action.slot)
    take_link(search, action.rank, action.expert)
    if action.kind == SWAP:
        take_link(search, hot, leaving)
        drop_replica(layer, search, hot, action.own_slot)
        add_replica(layer, search, leaving, hot, action.own_slot)
    add_replica(layer, search, action.expert, action.rank, action.slot)
    touched = np.array([leaving, action.expert])
    for c in range(len(layer.load)):
        if layer.uniform:
            share_equally(layer, c, touched)
        else:
            refill(layer, c, touched, 1.0, search.scratch)
    return int(search.received.sum() - before)
