"""How far an action would lower a layer's score, tried on the touched ranks only."""

from __future__ import annotations

from typing import NamedTuple

from swiftbalancer_worker.kernels.compiler import jit
from swiftbalancer_worker.kernels.search import Search, replica_on, score_of
from swiftbalancer_worker.kernels.water import Layer, divide


class Exchange(NamedTuple):
    """`expert` is to take the place of `leaving` on `rank`; -1 for either: nobody comes, or nobody leaves."""

    expert: int
    leaving: int
    rank: int


@jit
def exchange_gain(layer: Layer, search: Search, new: Exchange) -> float:
    """The score drop if an exchange is done and the touched experts are split afresh."""
    gain = 0.0
    for c in range(len(layer.load)):
        if new.leaving >= 0:
            try_without(layer, search, c, new)
        if new.expert >= 0:
            try_with(layer, search, c, new)
        gain += untry(layer, search, c, new.rank)
        if new.leaving >= 0:
            for k in range(layer.replicas[new.leaving]):
                gain += untry(layer, search, c, layer.host[new.leaving, k])
        if new.expert >= 0:
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
def untry(layer: Layer, search: Search, scenario: int, rank: int) -> float:
    """The score drop of one rank's trial load, which is set back."""
    tried, load = search.trial[scenario, rank], layer.load[scenario, rank]
    if tried == load:
        return 0.0
    search.trial[scenario, rank] = load
    return float(search.score[scenario, rank]) - score_of(layer, rank, tried)


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
