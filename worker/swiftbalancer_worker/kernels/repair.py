"""Budgeted repair: the few moves that relieve a layer's slowest ranks most, starting from where experts are.

Every step looks at the slowest rank of the worst scenario and lists what would help: giving the experts that load
it another replica on an idle rank (one move), or exchanging an expert with an idle rank (two moves). Each is scored
by how far the sum over scenarios and ranks of time^8 falls once the touched experts are split afresh, over what the
moves cost. The best of the list are tried out, with all experts split afresh, and the best of those is done. That
ends at the target, at the budget, or where nothing helps. If the target was not reached, moves that bring little are
taken back for others that bring more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.candidates import (
    NOTHING,
    REPLACE,
    SWAP,
    Action,
    Reach,
    Rules,
    Shortlist,
    best_swap,
    list_replacements,
    new_shortlist,
)
from swiftbalancer_worker.kernels.compiler import jit_inlined, jit_inner
from swiftbalancer_worker.kernels.gains import arrival_gain, come_back, depart, total_score
from swiftbalancer_worker.kernels.rehearsal import new_stage, rehearse
from swiftbalancer_worker.kernels.rescue import fill_empty_slots
from swiftbalancer_worker.kernels.search import (
    Ground,
    Search,
    add_replica,
    begin,
    coldest,
    drop_replica,
    slowest_rank,
    take_link,
    worst_scenario,
)
from swiftbalancer_worker.kernels.water import Layer, begin_split, refill, settle, share_equally, slowest

EFFORT = (1e-3, 20)
"""Of the solver between steps: tolerance and most sweeps."""
LEAST_GAIN = 1e-4
"""Score drop over price, as a part of the score, below which a repair ends."""
SECOND_THOUGHTS = 6
"""How many moves of a layer are taken back on trial."""


@jit_inner
def repair(layer: Layer, ground: Ground, rules: Rules) -> int:
    """Improves `layer` in place within `rules`; returns the moves used. Loads are scaled to a mean time of 1."""
    before = layer.place.copy()
    search = begin(layer, ground)
    used = fill_empty_slots(layer, search)
    begin_split(layer, EFFORT, search.scratch)
    stage = new_stage(layer)
    for _ in range(64):
        scenario = worst_scenario(layer)
        if slowest(layer, scenario) <= (rules.target if used == 0 else goal(rules)):
            return used
        action = best_action(layer, search, stage, left_of(rules, used, rules.tried))
        if action.kind == NOTHING:
            break
        used += apply(layer, search, action, scenario)
        settle(layer, EFFORT, search.scratch)
    return used if used == 0 else reconsider(layer, search, stage, rules, (before, used))


@jit_inner
def best_action(layer: Layer, search: Search, stage: Layer, rules: Rules) -> Action:
    """The action that gains most for its price within `rules.budget`, of those that are tried out."""
    scenario = worst_scenario(layer)
    reach = Reach(scenario, rules, coldest(layer, scenario, rules.cold))
    least = LEAST_GAIN * total_score(layer)
    short = new_shortlist(rules.tried, least)
    list_replacements(layer, search, reach, short)
    best = Action(NOTHING, -1, -1, -1, -1, 1.0, least)
    strongest = int(short.gain.argmax())
    if short.expert[strongest] >= 0:
        best = listed(short, strongest)
    best = best_swap(layer, search, reach, best)
    if layer.uniform or rules.tried == 1 or short.expert[strongest] < 0:
        return best
    chosen, most = best, rehearse(layer, search, stage, best, scenario)
    for i in range(len(short.gain)):
        if short.expert[i] < 0 or (i == strongest and best.kind == REPLACE):
            continue
        action = listed(short, i)
        gain = rehearse(layer, search, stage, action, scenario)
        if gain > most:
            chosen, most = action, gain
    return chosen


@jit_inner
def reconsider(layer: Layer, search: Search, stage: Layer, rules: Rules, done: tuple[NDArray[np.int64], int]) -> int:
    """Takes moves back that bring little, for others that bring more; returns the moves used then.

    `done`: the placement before the repair, and the moves used so far. What does not lower the score is put back.
    """
    original, used = done
    tried = np.zeros(layer.place.shape, np.bool_)
    for _ in range(SECOND_THOUGHTS):
        rank, slot = least_missed(layer, search, original, tried)
        if rank < 0 or slowest(layer, worst_scenario(layer)) <= goal(rules):
            break
        score, expert = total_score(layer), layer.place[rank, slot]
        used += apply(layer, search, to_slot(original[rank, slot], rank, slot), 0)
        settle(layer, EFFORT, search.scratch)
        action = best_action(layer, search, stage, left_of(rules, used, 1))
        tried[rank, slot] = True
        if action.kind == REPLACE and (action.rank != rank or action.slot != slot or action.expert != expert):
            back = layer.place[action.rank, action.slot]
            used += apply(layer, search, action, 0)
            settle(layer, EFFORT, search.scratch)
            if total_score(layer) < score * (1.0 - LEAST_GAIN):
                tried[:] = False
                continue
            used += apply(layer, search, to_slot(back, action.rank, action.slot), 0)
        used += apply(layer, search, to_slot(expert, rank, slot), 0)
        settle(layer, EFFORT, search.scratch)
    return used


@jit_inner
def least_missed(
    layer: Layer, search: Search, original: NDArray[np.int64], tried: NDArray[np.bool_]
) -> tuple[int, int]:
    """Rank and slot of the move not yet `tried` that, taken back, raises the score least; -1, -1 if there is none."""
    search.trial[:] = layer.load
    best_rank, best_slot, most = -1, -1, -np.inf
    for rank in range(len(layer.speed)):
        if search.received[rank] == 0:
            continue
        for slot in range(layer.place.shape[1]):
            expert, was = layer.place[rank, slot], original[rank, slot]
            if expert < 0 or tried[rank, slot] or search.held_before[rank, expert] or layer.replicas[expert] < 2:
                continue
            if was < 0 or search.barred[rank, was] or layer.replicas[was] >= layer.host.shape[1]:
                continue
            gain = depart(layer, search, expert, rank) + arrival_gain(layer, search, was, rank)
            come_back(layer, search, expert)
            if gain > most:
                best_rank, best_slot, most = rank, slot, gain
    return best_rank, best_slot


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


@jit_inlined
def listed(short: Shortlist, nth: int) -> Action:
    """An action of the shortlist."""
    return Action(REPLACE, short.expert[nth], -1, short.rank[nth], short.slot[nth], short.price[nth], short.gain[nth])


@jit_inlined
def to_slot(expert: int, rank: int, slot: int) -> Action:
    """An expert takes a slot, whatever that gains."""
    return Action(REPLACE, expert, -1, rank, slot, 1.0, 0.0)


@jit_inlined
def left_of(rules: Rules, used: int, tried: int) -> Rules:
    """`rules` after some moves, with so many actions tried out."""
    return Rules(rules.budget - used, rules.staging, rules.target, rules.hot, rules.cold, tried)


@jit_inlined
def goal(rules: Rules) -> float:
    """The slowest time at which a repair that has begun ends."""
    return 0.5 * (1.0 + rules.target)
