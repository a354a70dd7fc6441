"""Budgeted repair: the few moves that relieve a layer's slowest ranks most, starting from where experts are.

Every step looks at the slowest rank of the worst scenario and lists what would help: giving the experts that load
it another replica on an idle rank (one move), or exchanging an expert with an idle rank (two moves). Each is scored
by how far the sum over scenarios and ranks of time^8 falls once the touched experts are split afresh, over what the
moves cost. The best of the list are tried out, with all experts split afresh, and the best of those is done. That
ends at the target, at the budget, or where nothing helps.
"""

from __future__ import annotations

import numpy as np

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
from swiftbalancer_worker.kernels.gains import total_score
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


@jit_inner
def repair(layer: Layer, ground: Ground, rules: Rules) -> int:
    """Improves `layer` in place within `rules`; returns the moves used. Loads are scaled to a mean time of 1."""
    search = begin(layer, ground)
    used = fill_empty_slots(layer, search)
    begin_split(layer, EFFORT, search.scratch)
    stage = new_stage(layer)
    for _ in range(64):
        scenario = worst_scenario(layer)
        if slowest(layer, scenario) <= (rules.target if used == 0 else goal(rules)):
            break
        action = best_action(layer, search, stage, left_of(rules, used))
        if action.kind == NOTHING:
            break
        used += apply(layer, search, action, scenario)
        settle(layer, EFFORT, search.scratch)
    return used


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
def left_of(rules: Rules, used: int) -> Rules:
    """`rules` after some moves."""
    return Rules(rules.budget - used, rules.staging, rules.target, rules.hot, rules.cold, rules.tried)


@jit_inlined
def goal(rules: Rules) -> float:
    """The slowest time at which a repair that has begun ends."""
    return 0.5 * (1.0 + rules.target)
