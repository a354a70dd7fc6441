"""How far an action would lower a layer's score (the sum over scenarios and ranks of time^8)."""

from __future__ import annotations

from swiftbalancer_worker.kernels.compiler import jit_inlined
from swiftbalancer_worker.kernels.layout import power
from swiftbalancer_worker.kernels.search import Search
from swiftbalancer_worker.kernels.water import Layer, divide


@jit_inlined
def depart(layer: Layer, search: Search, expert: int, rank: int) -> float:
    """The score drop if an expert leaves a rank and its other replicas take over; `search.trial` is left so."""
    gain = 0.0
    host, speed, slow = layer.host[expert], layer.speed, search.slow
    base, pace, part = search.scratch.base, search.scratch.pace, search.scratch.part
    for c in range(len(layer.load)):
        trial, share = search.trial[c], layer.share[c, expert]
        num = 0
        for k in range(layer.replicas[expert]):
            if host[k] == rank:
                gain += power(trial[rank] * slow[rank])
                trial[rank] -= share[k] + layer.fixed[expert]
                gain -= power(trial[rank] * slow[rank])
            else:
                base[num] = trial[host[k]] - share[k]
                pace[num] = speed[host[k]]
                num += 1
        divide(layer, num, layer.weight[c, expert], search.scratch)
        num = 0
        for k in range(layer.replicas[expert]):
            if host[k] != rank:
                gain += power(trial[host[k]] * slow[host[k]])
                trial[host[k]] = base[num] + part[num]
                gain -= power(trial[host[k]] * slow[host[k]])
                num += 1
    return gain


@jit_inlined
def come_back(layer: Layer, search: Search, expert: int) -> None:
    """Sets `search.trial` back after `depart`."""
    for c in range(len(layer.load)):
        for k in range(layer.replicas[expert]):
            rank = layer.host[expert, k]
            search.trial[c, rank] = layer.load[c, rank]


@jit_inlined
def arrival_gain(layer: Layer, search: Search, expert: int, rank: int) -> float:
    """The score drop, on top of `search.trial`, if an expert gets a replica on a rank and is split afresh."""
    gain = 0.0
    host, speed, slow, num = layer.host[expert], layer.speed, search.slow, layer.replicas[expert]
    base, pace, part = search.scratch.base, search.scratch.pace, search.scratch.part
    for k in range(num):
        pace[k] = speed[host[k]]
    pace[num] = speed[rank]
    for c in range(len(layer.load)):
        trial, share = search.trial[c], layer.share[c, expert]
        for k in range(num):
            gain += power(trial[host[k]] * slow[host[k]])
            base[k] = trial[host[k]] - share[k]
        gain += power(trial[rank] * slow[rank])
        base[num] = trial[rank] + layer.fixed[expert]
        divide(layer, num + 1, layer.weight[c, expert], search.scratch)
        for k in range(num):
            gain -= power((base[k] + part[k]) * slow[host[k]])
        gain -= power((base[num] + part[num]) * slow[rank])
    return gain


@jit_inlined
def score_of_rank(layer: Layer, rank: int) -> float:
    """Sum over scenarios of a rank's time^8."""
    score = 0.0
    for c in range(len(layer.load)):
        score += power(layer.load[c, rank] / layer.speed[rank])
    return score


@jit_inlined
def score_after_swap(layer: Layer, search: Search, ranks: tuple[int, int], slots: tuple[int, int]) -> float:
    """The score of two ranks once the experts of `search.own` and `search.others` slots have changed places."""
    first, second = ranks
    slow, slow_too = search.slow[first], search.slow[second]
    score = 0.0
    for c in range(len(layer.load)):
        moved = search.own[c, slots[0]] - search.others[c, slots[1]]
        score += power((layer.load[c, first] - moved) * slow)
        score += power((layer.load[c, second] + moved) * slow_too)
    return score


@jit_inlined
def levelling_gain(layer: Layer, first: int, second: int) -> float:
    """About the most that any exchange between two ranks can gain: equal times in every scenario."""
    gain = 0.0
    for c in range(len(layer.load)):
        here, there = layer.load[c, first], layer.load[c, second]
        level = (here + there) / (layer.speed[first] + layer.speed[second])
        gain += power(here / layer.speed[first]) + power(there / layer.speed[second])
        gain -= 2.0 * power(level)
    return gain


@jit_inlined
def total_score(layer: Layer) -> float:
    """Sum over scenarios and serving ranks of time^8."""
    total = 0.0
    for c in range(len(layer.load)):
        for r in range(len(layer.speed)):
            if layer.speed[r] > 0.0:
                total += power(layer.load[c, r] / layer.speed[r])
    return total
