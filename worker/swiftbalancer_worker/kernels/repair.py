"""Budgeted repair: the few moves that relieve a layer's slowest ranks most, starting from where experts are.

Every step looks at the slowest rank of the worst scenario, tries to give the experts that load it another
replica on an idle rank (one move) or to exchange an expert with an idle rank (two moves), scores each by how far
the sum over scenarios and ranks of time^8 falls per move once the touched experts are split afresh, and takes
the best. It ends at the target, at the budget, or where nothing helps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit
from swiftbalancer_worker.kernels.layout import power
from swiftbalancer_worker.kernels.water import (
    Layer,
    Scratch,
    fill,
    locate,
    new_scratch,
    refill,
    settle,
    slowest,
    spread_evenly,
)

NOTHING, REPLACE, SWAP = 0, 1, 2
TOLERANCE, SWEEPS = 1e-3, 20


class Rules(NamedTuple):
    """`budget`: moves in all; `staging`: experts one rank may receive; `target`: slowest time good enough;
    `hot`, `cold`: experts and ranks considered in each step."""

    budget: int
    staging: int
    target: float
    hot: int
    cold: int


class Search(NamedTuple):
    """What a repair remembers.

    `held`, `held_before` `[ranks, experts]` bool; `received` `[ranks]` int64, experts new on each rank;
    `trial` `[scenarios, ranks]` float64, loads while an action is tried, otherwise equal to the layer's;
    `score` `[scenarios, ranks]` float64, time^8.
    """

    held: NDArray[np.bool_]
    held_before: NDArray[np.bool_]
    received: NDArray[np.int64]
    trial: NDArray[np.float64]
    score: NDArray[np.float64]
    scratch: Scratch


class Action(NamedTuple):
    """`REPLACE`: `expert` takes slot `slot` of `rank`. `SWAP`: it changes places with that slot's expert.

    `gain`: score drop per move; `own_slot`: where `expert` sits on the slowest rank (`SWAP`).
    """

    kind: int
    expert: int
    own_slot: int
    rank: int
    slot: int
    gain: float


class Exchange(NamedTuple):
    """`expert` is to take the place of `leaving` on `rank`."""

    expert: int
    leaving: int
    rank: int


class Reach(NamedTuple):
    """Where a step looks: the scenario that hurts, the rules left, and the idle ranks, idlest first."""

    scenario: int
    rules: Rules
    ranks: NDArray[np.int64]


@jit
def repair(layer: Layer, rules: Rules) -> int:
    """Improves `layer` in place within `rules`; returns the moves used. Loads are scaled to a mean time of 1."""
    search = begin(layer)
    used = fill_empty_slots(layer, search)
    settle(layer, TOLERANCE, SWEEPS, search.scratch)
    for _ in range(64):
        scenario = worst_scenario(layer)
        if slowest(layer, scenario) <= rules.target:
            break
        left = Rules(rules.budget - used, rules.staging, rules.target, rules.hot, rules.cold)
        action = best_action(layer, search, scenario, left)
        if action.kind == NOTHING:
            break
        used += apply(layer, search, action, scenario)
        settle(layer, TOLERANCE, SWEEPS, search.scratch)
    return used


@jit
def begin(layer: Layer) -> Search:
    """The state before the first step; locates and splits every expert."""
    scenarios, ranks = layer.load.shape
    experts, most = layer.host.shape
    held = np.zeros((ranks, experts), np.bool_)
    for r in range(ranks):
        for expert in layer.place[r]:
            if expert >= 0:
                held[r, expert] = True
    locate(layer)
    spread_evenly(layer)
    shape = (scenarios, ranks)
    return Search(held, held.copy(), np.zeros(ranks, np.int64), np.zeros(shape), np.zeros(shape), new_scratch(most))


@jit
def refresh(layer: Layer, search: Search) -> float:
    """Brings `trial` and `score` up to date; returns the sum of scores."""
    total = 0.0
    scenarios, ranks = layer.load.shape
    for c in range(scenarios):
        for r in range(ranks):
            search.trial[c, r] = layer.load[c, r]
            search.score[c, r] = score_of(layer, r, layer.load[c, r])
            total += search.score[c, r]
    return total


@jit
def score_of(layer: Layer, rank: int, load: float) -> float:
    """A rank's time^8 with this load; 0 for a rank that serves nothing."""
    return power(load / layer.speed[rank]) if layer.speed[rank] > 0.0 else 0.0


@jit
def worst_scenario(layer: Layer) -> int:
    """The scenario whose slowest rank is slowest."""
    worst = 0
    for c in range(1, len(layer.load)):
        if slowest(layer, c) > slowest(layer, worst):
            worst = c
    return worst


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


@jit
def replica_on(layer: Layer, expert: int, rank: int) -> int:
    """Which replica of an expert sits on a rank; -1 if none does."""
    for k in range(layer.replicas[expert]):
        if layer.host[expert, k] == rank:
            return k
    return -1


@jit
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
                    if not search.held[r, e] and (best < 0 or need(layer, e) > need(layer, best)):
                        best = e
                if best >= 0:
                    add_replica(layer, search, best, r, s)
                    used += 1
    for c in range(len(layer.load)):
        for e in range(len(layer.replicas)):
            refill(layer, c, e, search.scratch)
    return used


@jit
def need(layer: Layer, expert: int) -> float:
    """Load per replica, summed over scenarios."""
    total = 0.0
    for c in range(len(layer.weight)):
        total += layer.weight[c, expert]
    return float(total / layer.replicas[expert])


@jit
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


@jit
def best_action(layer: Layer, search: Search, scenario: int, rules: Rules) -> Action:
    """The action with the largest score drop per move within `rules.budget`."""
    total = refresh(layer, search)
    ranks = coldest(layer, scenario, rules.cold)
    best = Action(NOTHING, -1, -1, -1, -1, 1e-4 * total)
    best = best_replace(layer, search, Reach(scenario, rules, ranks), best)
    return best_swap(layer, search, Reach(scenario, rules, ranks), best)


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


@jit
def best_replace(layer: Layer, search: Search, reach: Reach, best: Action) -> Action:
    """`best`, or a replica for a hot expert in a slot of an idle rank if that gains more per move."""
    rules = reach.rules
    limit = 0.9995 * slowest(layer, reach.scenario)
    for expert in hottest(layer, reach.scenario, rules.hot):
        if layer.replicas[expert] >= layer.host.shape[1]:
            continue
        for rank in reach.ranks:
            if search.held[rank, expert] or layer.load[reach.scenario, rank] >= limit * layer.speed[rank]:
                continue
            for slot in range(layer.place.shape[1]):
                leaving = layer.place[rank, slot]
                if layer.replicas[leaving] < 2:
                    continue
                cost = is_new(search, rank, expert) - is_new(search, rank, leaving)
                if cost > rules.budget or search.received[rank] + cost > rules.staging:
                    continue
                gain = replace_gain(layer, search, Exchange(expert, leaving, rank)) / max(cost, 0.5)
                if gain > best.gain:
                    best = Action(REPLACE, expert, -1, rank, slot, gain)
    return best


@jit
def is_new(search: Search, rank: int, expert: int) -> int:
    """1 if the expert would have to travel to the rank."""
    return 0 if search.held_before[rank, expert] else 1


@jit
def replace_gain(layer: Layer, search: Search, new: Exchange) -> float:
    """The score drop if `new.expert` takes the place of `new.leaving` on `new.rank`."""
    gain = 0.0
    for c in range(len(layer.load)):
        try_without(layer, search, c, new)
        try_with(layer, search, c, new)
        gain += untry(layer, search, c, new.rank)
        for k in range(layer.replicas[new.leaving]):
            gain += untry(layer, search, c, layer.host[new.leaving, k])
        for k in range(layer.replicas[new.expert]):
            gain += untry(layer, search, c, layer.host[new.expert, k])
    return gain


@jit
def try_without(layer: Layer, search: Search, scenario: int, new: Exchange) -> None:
    """Trial loads after the leaving expert's load went to its other replicas."""
    expert, trial, scratch = new.leaving, search.trial[scenario], search.scratch
    host, share = layer.host[expert], layer.share[scenario, expert]
    num = 0
    for k in range(layer.replicas[expert]):
        if host[k] == new.rank:
            trial[new.rank] -= share[k] + layer.fixed[expert]
        else:
            scratch.base[num] = trial[host[k]] - share[k]
            scratch.pace[num] = layer.speed[host[k]]
            num += 1
    divide(layer, num, layer.weight[scenario, expert], scratch)
    num = 0
    for k in range(layer.replicas[expert]):
        if host[k] != new.rank:
            trial[host[k]] = scratch.base[num] + scratch.part[num]
            num += 1


@jit
def try_with(layer: Layer, search: Search, scenario: int, new: Exchange) -> None:
    """Trial loads after the new expert shares its load with its replica on the rank."""
    expert, trial, scratch = new.expert, search.trial[scenario], search.scratch
    host, share, num = layer.host[expert], layer.share[scenario, expert], layer.replicas[expert]
    for k in range(num):
        scratch.base[k] = trial[host[k]] - share[k]
        scratch.pace[k] = layer.speed[host[k]]
    scratch.base[num] = trial[new.rank] + layer.fixed[expert]
    scratch.pace[num] = layer.speed[new.rank]
    divide(layer, num + 1, layer.weight[scenario, expert], scratch)
    for k in range(num):
        trial[host[k]] = scratch.base[k] + scratch.part[k]
    trial[new.rank] = scratch.base[num] + scratch.part[num]


@jit
def divide(layer: Layer, num: int, weight: float, scratch: Scratch) -> None:
    """Writes `scratch.part`: `weight` over `num` replicas as this layer's engine splits it."""
    if layer.uniform:
        for k in range(num):
            scratch.part[k] = weight / num
    else:
        fill(num, weight, scratch)


@jit
def untry(layer: Layer, search: Search, scenario: int, rank: int) -> float:
    """The score drop of one rank's trial load, which is set back."""
    tried, load = search.trial[scenario, rank], layer.load[scenario, rank]
    if tried == load:
        return 0.0
    search.trial[scenario, rank] = load
    return float(search.score[scenario, rank]) - score_of(layer, rank, tried)


@jit
def best_swap(layer: Layer, search: Search, reach: Reach, best: Action) -> Action:
    """`best`, or an exchange of an expert of the slowest rank with one of an idle rank if that gains more."""
    hot = slowest_rank(layer, reach.scenario)
    for own_slot in range(layer.place.shape[1]):
        expert = layer.place[hot, own_slot]
        for rank in reach.ranks:
            if rank == hot or search.held[rank, expert]:
                continue
            for slot in range(layer.place.shape[1]):
                other = layer.place[rank, slot]
                if search.held[hot, other]:
                    continue
                arrives = is_new(search, rank, expert) - is_new(search, rank, other)
                comes_back = is_new(search, hot, other) - is_new(search, hot, expert)
                cost = arrives + comes_back
                if (
                    cost > reach.rules.budget
                    or search.received[rank] + arrives > reach.rules.staging
                    or search.received[hot] + comes_back > reach.rules.staging
                ):
                    continue
                gain = swap_gain(layer, search, Exchange(expert, other, rank), hot) / max(cost, 0.5)
                if gain > best.gain:
                    best = Action(SWAP, expert, own_slot, rank, slot, gain)
    return best


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
def swap_gain(layer: Layer, search: Search, new: Exchange, hot: int) -> float:
    """The score drop if two replicas change ranks and keep their loads."""
    own = replica_on(layer, new.expert, hot)
    other = replica_on(layer, new.leaving, new.rank)
    gain = 0.0
    for c in range(len(layer.load)):
        moved = layer.share[c, new.expert, own] + layer.fixed[new.expert]
        moved -= layer.share[c, new.leaving, other] + layer.fixed[new.leaving]
        gain += search.score[c, hot] - score_of(layer, hot, layer.load[c, hot] - moved)
        gain += search.score[c, new.rank] - score_of(layer, new.rank, layer.load[c, new.rank] + moved)
    return gain


@jit
def apply(layer: Layer, search: Search, action: Action, scenario: int) -> int:
    """Does an action and splits the touched experts afresh; returns the moves it costs."""
    before = search.received.sum()
    leaving = layer.place[action.rank, action.slot]
    hot = slowest_rank(layer, scenario)
    drop_replica(layer, search, action.rank, action.slot)
    if action.kind == SWAP:
        drop_replica(layer, search, hot, action.own_slot)
        add_replica(layer, search, leaving, hot, action.own_slot)
    add_replica(layer, search, action.expert, action.rank, action.slot)
    for c in range(len(layer.load)):
        refill(layer, c, leaving, search.scratch)
        refill(layer, c, action.expert, search.scratch)
    return int(search.received.sum() - before)
