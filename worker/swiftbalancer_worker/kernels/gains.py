"""How far an action would lower a layer's score (the sum over scenarios and ranks of time^8)."""

from __future__ import annotations

from swiftbalancer_worker.kernels.compiler import jit, jit_inlined
from swiftbalancer_worker.kernels.layout import power
from swiftbalancer_worker.kernels.search import Search, replica_on
from swiftbalancer_worker.kernels.water import Layer, divide


@jit_inlined
def depart(layer: Layer, search: Search, expert: int, rank: int) -> float:
    """The score drop if an expert leaves a rank and its other replicas take over; `search.trial` is left so."""
    gain = 0.0
    host, speed = layer.host[expert], layer.speed
    base, pace, part = search.scratch.base, search.scratch.pace, search.scratch.part
    for c in range(len(layer.load)):
        trial, share = search.trial[c], layer.share[c, expert]
        num = 0
        for k in range(layer.replicas[expert]):
            if host[k] == rank:
                gain += power(trial[rank] / speed[rank])
                trial[rank] -= share[k] + layer.fixed[expert]
                gain -= power(trial[rank] / speed[rank])
            else:
                base[num] = trial[host[k]] - share[k]
                pace[num] = speed[host[k]]
                num += 1
        divide(layer, num, layer.weight[c, expert], search.scratch)
        num = 0
        for k in range(layer.replicas[expert]):
            if host[k] != rank:
                gain += power(trial[host[k]] / speed[host[k]])
                trial[host[k]] = base[num] + part[num]
                gain -= power(trial[host[k]] / speed[host[k]])
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
    host, speed, num = layer.host[expert], layer.speed, layer.replicas[expert]
    base, pace, part = search.scratch.base, search.scratch.pace, search.scratch.part
    for k in range(num):
        pace[k] = speed[host[k]]
    pace[num] = speed[rank]
    for c in range(len(layer.load)):
        trial, share = search.trial[c], layer.share[c, expert]
        for k in range(num):
            gain += power(trial[host[k]] / pace[k])
            base[k] = trial[host[k]] - share[k]
        gain += power(trial[rank] / pace[num])
        base[num] = trial[rank] + layer.fixed[expert]
        divide(layer, num + 1, layer.weight[c, expert], search.scratch)
        for k in range(num + 1):
            gain -= power((base[k] + part[k]) / pace[k])
    return gain


@jit_inlined
def swap_gain(layer: Layer, experts: tuple[int, int], ranks: tuple[int, int]) -> float:
    """The score drop if two experts exchange the ranks they are on and keep the loads they have there."""
    first, second = ranks
    own, other = replica_on(layer, experts[0], first), replica_on(layer, experts[1], second)
    extra = layer.fixed[experts[0]] - layer.fixed[experts[1]]
    gain = 0.0
    for c in range(len(layer.load)):
        moved = layer.share[c, experts[0], own] - layer.share[c, experts[1], other] + extra
        here, there = layer.load[c, first], layer.load[c, second]
        gain += power(here / layer.speed[first]) + power(there / layer.speed[second])
        gain -= power((here - moved) / layer.speed[first]) + power((there + moved) / layer.speed[second])
    return gain


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


@jit
def total_score(layer: Layer) -> float:
    """Sum over scenarios and serving ranks of time^8."""
    total = 0.0
    for c in range(len(layer.load)):
        for r in range(len(layer.speed)):
            if layer.speed[r] > 0.0:
                total += power(layer.load[c, r] / layer.speed[r])
    return total
