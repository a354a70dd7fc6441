"""Water-filling: how an expert's tokens are split over its replicas so that ranks finish together.

For one expert, given what else its replicas' ranks carry, the split that minimises the sum of squared rank
times fills the least loaded ranks up to a common level. Repeating it over all replicated experts descends to
the minimum of the whole layer's sum of squares, whose largest rank time is the least possible one too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit


class Layer(NamedTuple):
    """One MoE layer under several load scenarios; arrays are updated in place.

    `place` `[ranks, slots]` int64, the expert of each slot, -1 for a slot that holds nothing useful.
    `replicas` `[experts]` int64, replicas on ranks that serve; `host` `[experts, max_replicas]` int64, their ranks.
    `share` `[scenarios, experts, max_replicas]` float64, load each replica carries.
    `load` `[scenarios, ranks]` float64, load of each rank. `weight` `[scenarios, experts]` float64, load of each
    expert. `fixed` `[experts]` float64, load a replica adds by being there at all.
    `speed` `[ranks]` float64, 0 for a rank that serves nothing. `uniform`: replicas share evenly.
    `overshoot`: how far a refill goes, 1.0 exactly to the level; more is faster where many refills follow.
    """

    place: NDArray[np.int64]
    replicas: NDArray[np.int64]
    host: NDArray[np.int64]
    share: NDArray[np.float64]
    load: NDArray[np.float64]
    weight: NDArray[np.float64]
    fixed: NDArray[np.float64]
    speed: NDArray[np.float64]
    uniform: bool
    overshoot: float


class Scratch(NamedTuple):
    """Working memory for one expert, each `[max_replicas]` float64.

    `base`: what the ranks of its replicas carry without it; `pace`: their speed; `part`: its load on each.
    """

    base: NDArray[np.float64]
    pace: NDArray[np.float64]
    part: NDArray[np.float64]


@jit
def new_scratch(size: int) -> Scratch:
    """Working memory for experts of up to `size` replicas."""
    return Scratch(np.empty(size), np.empty(size), np.empty(size))


@jit
def fill(num: int, weight: float, scratch: Scratch) -> None:
    """Splits `weight` over `num` ranks that carry `base` at speed `pace`; writes `part`.

    The common level starts as if every rank took part and falls as those above it drop out.
    """
    base, pace, part = scratch.base, scratch.pace, scratch.part
    carried, speed = weight, 0.0
    for k in range(num):
        part[k] = 1.0
        carried += base[k]
        speed += pace[k]
    left = num
    before = num + 1
    while left < before and left > 1:
        before = left
        for k in range(num):
            if part[k] > 0.0 and left > 1 and base[k] * speed > carried * pace[k]:
                part[k] = 0.0
                carried -= base[k]
                speed -= pace[k]
                left -= 1
    level = carried / speed
    for k in range(num):
        if part[k] > 0.0:
            part[k] = max(0.0, level * pace[k] - base[k])


@jit
def divide(layer: Layer, num: int, weight: float, scratch: Scratch) -> None:
    """Writes `scratch.part`: `weight` over `num` replicas as this layer's engine splits it."""
    if layer.uniform:
        for k in range(num):
            scratch.part[k] = weight / num
    else:
        fill(num, weight, scratch)


@jit
def refill(layer: Layer, scenario: int, experts: NDArray[np.int64], scratch: Scratch) -> float:
    """Splits the load of some experts afresh, one after the other; returns the largest change of a share.

    Overshoots where no share would fall below zero (successive over-relaxation).
    """
    host, replicas, speed = layer.host, layer.replicas, layer.speed
    share, load, weight = layer.share[scenario], layer.load[scenario], layer.weight[scenario]
    base, pace, part = scratch.base, scratch.pace, scratch.part
    largest = 0.0
    for e in experts:
        num = replicas[e]
        for k in range(num):
            base[k] = load[host[e, k]] - share[e, k]
            pace[k] = speed[host[e, k]]
        divide(layer, num, weight[e], scratch)
        step = 1.0 if layer.uniform else layer.overshoot
        for k in range(num):
            change = part[k] - share[e, k]
            largest = max(largest, abs(change))
            if share[e, k] + layer.overshoot * change < 0.0:
                step = 1.0
        for k in range(num):
            change = step * (part[k] - share[e, k])
            share[e, k] += change
            load[host[e, k]] += change
    return largest


@jit
def locate(layer: Layer) -> None:
    """Fills `replicas` and `host` from `place`; a second replica on a rank becomes an empty slot."""
    ranks, slots = layer.place.shape
    layer.replicas[:] = 0
    for r in range(ranks):
        if layer.speed[r] <= 0.0:
            continue
        for s in range(slots):
            expert = layer.place[r, s]
            if expert < 0:
                continue
            num = layer.replicas[expert]
            if num > 0 and layer.host[expert, num - 1] == r:
                layer.place[r, s] = -1
            else:
                layer.host[expert, num] = r
                layer.replicas[expert] = num + 1


@jit
def spread_evenly(layer: Layer) -> None:
    """Starts every scenario with an even split of each expert over its replicas."""
    layer.load[:] = 0.0
    scenarios, experts = layer.weight.shape
    for c in range(scenarios):
        for e in range(experts):
            num = layer.replicas[e]
            for k in range(num):
                layer.share[c, e, k] = layer.weight[c, e] / num
                layer.load[c, layer.host[e, k]] += layer.weight[c, e] / num + layer.fixed[e]


@jit
def settle(layer: Layer, tolerance: float, sweeps: int, scratch: Scratch) -> None:
    """Refills all replicated experts of all scenarios until no share changes by more than `tolerance`."""
    several = np.nonzero(layer.replicas > 1)[0]
    for c in range(len(layer.load)):
        for _ in range(sweeps):
            if refill(layer, c, several, scratch) < tolerance or layer.uniform:
                break


@jit
def slowest(layer: Layer, scenario: int) -> float:
    """The largest time (load over speed) of a rank in one scenario."""
    longest = 0.0
    for r in range(layer.load.shape[1]):
        if layer.speed[r] > 0.0:
            longest = max(longest, layer.load[scenario, r] / layer.speed[r])
    return longest
